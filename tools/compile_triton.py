#!/usr/bin/env python3
"""Compiles every Triton kernel for NVIDIA (sm_90) and AMD (gfx90a, gfx942), without a GPU.

The kernels' own launchers run on tensors without memory, over shapes and types used in practice; what they would
launch is compiled for each target. A kernel that no launch reaches is an error, so a new kernel needs a call here. That
a kernel compiles does not prove that it is right or fast on that device.
"""

import argparse
import inspect
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installation, too

from megatron_xmoe.kernels import triton_activation as activation  # noqa: E402
from megatron_xmoe.kernels import triton_balance as balance  # noqa: E402
from megatron_xmoe.kernels import triton_choices as choices  # noqa: E402
from megatron_xmoe.kernels import triton_grouped_gemm as gemm  # noqa: E402
from megatron_xmoe.kernels import triton_rotary as rotary  # noqa: E402
from megatron_xmoe.kernels import triton_router as router  # noqa: E402
from megatron_xmoe.kernels import triton_routes as routes  # noqa: E402
from megatron_xmoe.kernels import triton_rows as rows  # noqa: E402
from megatron_xmoe.ops.router import RoutingRule  # noqa: E402

TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SUFFIX = "_kernel"  # of the functions that are launched; other jitted functions are called by these
TYPE_NAMES = {
    **{torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"},
    **{torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8"},
}
ALIGNMENT = 16  # bytes of a pointer, and what a number can be divided by, for Triton to specialise on it


@dataclass(frozen=True)
class Launch:
    """One compiled form of a kernel: where it is, argument types, constants, what can be divided by 16, options."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]


@dataclass
class Recorder:
    """Stands in for JITFunction.run: notes launches instead of making them."""

    launches: dict[Launch, None] = field(default_factory=dict)

    def run(self, kernel: JITFunction, *args, grid: tuple, warmup: bool, **named) -> None:
        """Notes the form of the kernel that such a launch needs; follows Triton's own rules of specialisation."""
        assert grid[0] > 0 and not warmup
        options = {name: named.pop(name) for name in list(named) if name not in kernel.signature.parameters}
        bound = kernel.signature.bind(*args, **named)
        signature, constants, aligned = {}, {}, []
        for number, parameter in enumerate(kernel.params):
            value = bound.arguments[parameter.name]
            special = not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (special and isinstance(value, int) and value == 1):
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, TensorDescriptor):
                signature[parameter.name] = f"tensordesc<{TYPE_NAMES[value.base.dtype]}{value.block_shape}>"
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = f"*{TYPE_NAMES[value.dtype]}"
                aligned += [number]
            else:
                signature[parameter.name] = "i32"
                aligned += [number] if special and value % ALIGNMENT == 0 else []
        items = (tuple(signature.items()), tuple(constants.items()), tuple(aligned), tuple(options.items()))
        self.launches[Launch(kernel.__module__, kernel.__name__, *items)] = None


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def row_calls() -> None:
    """Calls the row functions, with and without what is optional."""
    shapes = (
        (torch.bfloat16, torch.int32, 4096, 8, 7168, True),
        (torch.float32, torch.int64, 8192, 6, 2048, True),
        (torch.float16, torch.int32, 4096, 8, 2048, False),
        (torch.float64, torch.int64, 100, 2, 512, False),
        (torch.bfloat16, torch.int64, 100, 17, 72, False),  # more routes than are unrolled, a row in several blocks
        (torch.float32, torch.int32, 100, 1, 1001, False),  # no 16-byte accesses
    )
    for dtype, index_type, tokens, per_token, hidden, all_options in shapes:
        x, y = (empty(n, hidden, dtype=dtype) for n in (tokens, tokens * per_token))
        index, owners = empty(tokens, per_token, dtype=index_type), empty(tokens * per_token, dtype=index_type)
        weights = empty(tokens, per_token, dtype=rows.accumulator(dtype))
        rows.gather_rows(x, owners)
        rows.dot_rows(y, index, x)
        rows.spread_rows(x, index, owners, weights, y)
        rows.sum_rows(y, index, weights, None)
        rows.sum_rows(y, index.view(-1), weights.view(-1), empty(tokens + 1, dtype=torch.int64))
        if all_options:
            for w, other in ((None, None), (weights, None), (None, y)):
                rows.spread_rows(x, index, owners, w, other)
            rows.sum_rows(y, index, None, None)


def route_calls() -> None:
    """Calls the routing functions, with both policies of dropping."""
    for tokens, per_token, experts, index_type, dtype in (
        (4096, 8, 128, torch.int64, torch.float32),
        (16384, 6, 60, torch.int32, torch.bfloat16),
        (4096, 8, 1000, torch.int64, torch.float64),
        (4096, 1, 8, torch.int32, torch.float16),
    ):
        ids, weights = empty(tokens, per_token, dtype=index_type), empty(tokens, per_token, dtype=dtype)
        for capacity, by_weight in ((-1, False), (64, False), (64, True)):
            routes.build_routes(ids, weights, experts, capacity, by_weight)
        probs, inverse = empty(tokens, experts, dtype=dtype), empty(tokens, per_token, dtype=torch.int32)
        choices.choices_of_map(empty(tokens, experts, dtype=torch.bool), probs, per_token)
        choices.gradient_of_map(weights.view(-1), inverse, inverse, experts)
    for sources, experts in ((8, 16), (64, 4), (1, 1), (3, 1000)):
        routes.merge_order(empty(sources, experts, dtype=torch.int64), 10_000)


def activation_calls() -> None:
    """Calls the activation's functions, forward and backward."""
    for dtype, (kind, gated) in product(
        (torch.bfloat16, torch.float32), (("silu", True), ("gelu", True), ("squared_relu", False))
    ):
        width = 1536 if gated else 768
        hidden, grad = empty(4096, width, dtype=dtype), empty(4096, 768, dtype=dtype)
        weights = empty(4096, dtype=torch.float32)
        activation.activate(hidden, weights, kind, gated)
        activation.activate_backward(hidden, weights, grad, kind, gated)


def rotary_calls() -> None:
    """Calls the rotary embedding: all orders of pairs, whole and part of a head, a view of a fused projection."""
    for (dtype, heads, size, rotated, scale), (paired, paired_result), backward in product(
        ((torch.bfloat16, 16, 128, 128, 1.0), (torch.float16, 1, 64, 64, 1.2), (torch.float32, 20, 96, 50, 1.0)),
        ((False, False), (True, True), (True, False)),
        (False, True),
    ):
        x = empty(2048, 4, heads, 3 * size, dtype=dtype)[..., :size]
        angles = empty(2048, 1, 1, rotated, dtype=torch.float32)
        rotary.rotate(x, angles, paired, paired_result, scale, backward)
    angles_of_all, spread = empty(2048, 4, 1, rotated, dtype=torch.float32), empty(2048, 4, size, heads, dtype=dtype)
    rotary.rotate(spread.transpose(2, 3), angles_of_all, True, False)


def gemm_calls() -> None:
    """Calls the experts' matrix products: with sizes for every way of moving tiles."""
    for dtype, features, ffn in ((torch.bfloat16, 2048, 768), (torch.float16, 1001, 99), (torch.float32, 2048, 768)):
        rows_, hidden = empty(4096, features, dtype=dtype), empty(4096, ffn, dtype=dtype)
        weight, ends = empty(8, ffn, features, dtype=dtype), empty(8, dtype=torch.int32)
        gemm.multiply(rows_, weight, ends)
        gemm.multiply(rows_, weight, ends, empty(4096, dtype=torch.int32))
        gemm.multiply(hidden, weight, ends, transposed=True)
        gemm.multiply(hidden, weight, ends, empty(4096, dtype=torch.int32), transposed=True)
        gemm.weight_gradient(hidden, rows_, ends)
        gemm.weight_gradient(hidden, rows_, ends, empty(8, ffn, features, dtype=torch.float32), accumulate=True)


def router_calls() -> None:
    """Calls the router's functions: each way to score, with and without groups, bias, padding and losses."""
    for dtype, tokens, sequences, rule, biased, padded, losses in (
        (torch.bfloat16, 4096, 1, RoutingRule(8, 128, "softmax"), False, False, 1),
        (torch.float32, 8192, 2, RoutingRule(6, 60, "softmax", pre_softmax=True, scaling=2.5), False, False, 3),
        (torch.float32, 4096, 1, RoutingRule(8, 256, "sigmoid", scaling=2.5, groups=8, group_topk=4), True, False, 1),
        (torch.float64, 4096, 4, RoutingRule(32, 384, "sqrtsoftplus"), True, True, 2),
        (torch.float64, 100, 1, RoutingRule(6, 15, "softmax", groups=3, group_topk=2), False, False, 0),
        (torch.float16, 3, 1, RoutingRule(1, 4096, "sigmoid"), False, True, 0),
    ):
        logits, scalar = empty(tokens, rule.experts, dtype=dtype), empty(1, dtype=torch.float32)
        bias, added = (empty(rule.experts, dtype=kind) if biased else None for kind in (torch.float32, torch.int32))
        padding = empty(tokens, dtype=torch.uint8) if padded else None
        given = rule.constants, sequences
        probs, chosen, sums, counts = router.route(logits, bias, padding, added, *given, losses > 0)
        slopes = empty(3, sequences, rule.experts, dtype=torch.float32) if losses else None
        for total in (tokens, scalar) if losses else ():
            balance.balance(sums, balance.count(counts).unsqueeze(0), total, 0.5, slopes)
            balance.balance(sums, counts, total, 0.5, slopes)
        router.route_backward(logits, chosen, padding, probs, slopes, (scalar,) * losses, *given)


def launches(target: str) -> list[Launch]:
    """All forms of all kernels that the calls need on a device of the named target, each once."""
    recorder = Recorder()
    run = lambda kernel, *args, **named: recorder.run(kernel, *args, **named)  # noqa: E731  (a method of JITFunction)
    is_hip, warp = TARGETS[target].backend == "hip", TARGETS[target].warp_size
    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(torch.version, "hip", "some version" if is_hip else None),
        mock.patch.object(rows, "warp_size", lambda device: warp),
        mock.patch.object(rotary, "warp_size", lambda device: warp),
        mock.patch.object(gemm, "has_tma", lambda device: not is_hip),
    ):
        row_calls()
        route_calls()
        activation_calls()
        rotary_calls()
        gemm_calls()
        router_calls()
    return list(recorder.launches)


def kernels() -> set[tuple[str, str]]:
    """(module, name) of every kernel in the package's triton_* modules."""
    folder = Path(inspect.getfile(rows)).parent
    modules = [import_module(f"megatron_xmoe.kernels.{path.stem}") for path in sorted(folder.glob("triton_*.py"))]
    jitted = [(m, name, value) for m in modules for name, value in vars(m).items() if isinstance(value, JITFunction)]
    return {(m.__name__, name) for m, name, value in jitted if name.endswith(SUFFIX) and value.__module__ == m.__name__}


def compile_one(task: tuple[Launch, str]) -> str:
    """Compiles for the named target; returns what went wrong, or nothing."""
    launch, target = task
    kernel = getattr(import_module(launch.module), launch.kernel)
    attributes = {(number,): [["tt.divisibility", ALIGNMENT]] for number in launch.aligned}
    try:
        source = ASTSource(kernel, dict(launch.signature), dict(launch.constants), attributes)
        triton.compile(source, target=TARGETS[target], options=dict(launch.options))
    except Exception as error:  # compilers raise all kinds
        while error.__cause__ is not None:  # the call sites come first, the fault last
            error = error.__cause__
        return f"{launch.kernel} for {target}: {type(error).__name__}: {error}\n{launch}"
    return ""


def main() -> int:
    """Compiles everything; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Example: python tools/compile_triton.py --jobs 8",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=2, help="compilations at a time (default: 2)")
    args = parser.parse_args()
    start = time.monotonic()
    tasks = [(launch, name) for name in TARGETS for launch in launches(name)]
    with ProcessPoolExecutor(args.jobs) as pool:
        problems = list(pool.map(compile_one, tasks, chunksize=8))
    compiled, failed = Counter(), Counter()
    for (launch, target), problem in zip(tasks, problems, strict=True):
        (failed if problem else compiled)[launch.module, launch.kernel, target] += 1
    found = kernels() | {(launch.module, launch.kernel) for launch, _ in tasks}
    print(f"{'kernel':40}" + "".join(f"{target:>20}" for target in TARGETS))
    for module, kernel in sorted(found):
        cells = []
        for target in TARGETS:
            good, bad = compiled[module, kernel, target], failed[module, kernel, target]
            cells.append(f"{bad} of {good + bad} FAILED" if bad else f"{good} compiled" if good else "NOT REACHED")
        print(f"{module.rpartition('.')[2] + '.' + kernel:40}" + "".join(f"{cell:>20}" for cell in cells))
    problems = [problem for problem in problems if problem]
    unreached = found - {(launch.module, launch.kernel) for launch, _ in tasks}
    problems += [f"{module}.{kernel}: no call of this tool launches it" for module, kernel in sorted(unreached)]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    print(f"triton {triton.__version__}: {sum(compiled.values())} forms compiled in {time.monotonic() - start:.0f} s")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
