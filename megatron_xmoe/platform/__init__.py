"""Replacements in torch and Megatron-Core, each with its reason, for what a machine or the wheel lacks."""
