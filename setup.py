"""Packaging entry; the metadata is in pyproject.toml. Compiled kernels (`megatron_xmoe._C`) hook in here."""

from setuptools import setup

setup()
