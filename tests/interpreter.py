"""Triton kernels on the CPU, in Triton's interpreter.

The interpreter has to be chosen before Triton is first imported, so the kernels run in a process of their own. It
rounds to 16 bits by cutting off.
"""

import importlib
import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any
from unittest import mock

import harness
import numpy as np
import pytest


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable[..., Any]]:
    """Calls a function of megatron_xmoe.kernels.triton_* with poisoned memory: interpreted(module, name, *args).

    With `returned` the result is that argument, into which the function writes.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as worker:
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
            worker.submit(os.getpid).result()  # the process starts, and takes its environment, with the first task

        def call(
            module: str, name: str, *args, constants: dict[str, int] | None = None, returned: int | None = None
        ) -> Any:
            # plain bytes: torch would pass tensors to another process by file descriptors
            task = pickle.dumps((module, name, args, constants or {}, returned))
            return pickle.loads(worker.submit(run_interpreted, task).result())

        yield call


def run_interpreted(task: bytes) -> bytes:
    """In the process of its own: the pickled result of a pickled call, with constants of the module replaced."""
    module_name, function, args, constants, returned = pickle.loads(task)
    mend_interpreter()
    module = importlib.import_module(f"megatron_xmoe.kernels.{module_name}")
    replaced = mock.patch.multiple(module, **constants) if constants else mock.MagicMock()
    with harness.poisoned_memory(), replaced:
        result = getattr(module, function)(*args)
    return pickle.dumps(result if returned is None else args[returned])


def mend_interpreter() -> None:
    """Repairs of Triton 3.6's interpreter, in a process that uses it.

    Loops may run to a number that a kernel has loaded (since NumPy 2.5 an array of one element is no int), and products
    of bf16 matrices are right (it multiplies their bits as integers).
    """
    from triton.runtime import interpreter

    class Integer(type(int)):
        def __instancecheck__(cls, value):
            return isinstance(value, int)

    class integer(metaclass=Integer):
        def __new__(cls, value):
            return int(value.item() if isinstance(value, np.ndarray) else value)

    def in_fp32(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if handle.data.dtype != np.uint16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), interpreter.tl.float32)

    def create_dot(self, a, b, *args):
        return original(self, in_fp32(a), in_fp32(b), *args)

    original = interpreter.InterpreterBuilder.create_dot
    if original.__module__ != __name__:
        interpreter.InterpreterBuilder.create_dot = create_dot
        interpreter.int = integer
