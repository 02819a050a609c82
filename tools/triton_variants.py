"""Times Triton's kernels with other launch parameters than the written rules', for `benchmark_ops.py --variants`.

The best then go into the `*_tile` functions and constants of megatron_xmoe/kernels/triton_*.py; nothing is tuned at run
time.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from unittest import mock

from benchmark_systems import Inputs, backend_calls

TILE_FUNCTIONS = {
    "permute": "spread_tile",
    "unpermute": "sum_tile",
    "unpermute backward": "spread_tile",
    "gather": "gather_tile",
}
ROUTE_CONSTANTS = [
    {},
    *({"ROUTES": routes, "MAX_PROGRAMS": programs} for routes in (64, 128, 256) for programs in (64, 128, 256)),
    {"TILE": 4096},
    {"TILE": 16384},
]
VECTOR_BYTES = 16
MOST_COLUMNS = 8192  # of a tile
SHOWN = 6  # best variants of an operation


def measure(data: Inputs, milliseconds: Callable[..., float]) -> list[dict]:
    """Prints the best variants of each operation; returns a record per variant."""
    from megatron_xmoe.kernels import triton_routes, triton_rows

    print("\nT{} K{} E{} H{}".format(*data.shape), flush=True)
    calls, records = backend_calls("triton", data), []
    for column, function in TILE_FUNCTIONS.items():
        rule = tile_of(triton_rows, function, calls[column])
        changes = list(variants(column, rule, data))
        places = [partial(changed_tile, triton_rows, function, change) for change in changes]
        records += compare(column, calls[column], changes, places, data, milliseconds)
        print(f"    the rule is {rule}", flush=True)
    places = [partial(mock.patch.multiple, triton_routes, **change) for change in ROUTE_CONSTANTS if change]
    places.insert(0, partial(mock.patch.multiple, triton_routes, TILE=triton_routes.TILE))
    return records + compare("metadata", calls["metadata"], ROUTE_CONSTANTS, places, data, milliseconds)


def compare(
    column: str,
    call: Callable[[], Any],
    changes: list[dict],
    places: list[Callable[[], AbstractContextManager]],
    data: Inputs,
    milliseconds: Callable[..., float],
) -> list[dict]:
    """Times `call` under each of `places`, the first of which changes nothing, and prints the best."""
    times = []
    for change, place in zip(changes, places, strict=True):
        with place():
            times.append((milliseconds(call, data.x.device), str(change or "the rule")))
    best = "; ".join(f"{ms:.4f} {name}" for ms, name in sorted(times)[:SHOWN])
    print(f"  {column}: the rule {times[0][0]:.4f} ms; best {best}", flush=True)
    return [{"shape": data.shape, "column": column, "variant": name, "ms": ms} for ms, name in times]


def tile_of(module: Any, function: str, call: Callable[[], Any]) -> dict[str, Any]:
    """The launch parameters that the rule gives a call."""
    original, found = getattr(module, function), {}
    with mock.patch.object(module, function, lambda *args: found.update(original(*args)) or found):
        call()
    return found


def changed_tile(module: Any, function: str, change: dict[str, Any]) -> AbstractContextManager:
    """While this lasts, the rule gives some other parameters."""
    original = getattr(module, function)
    return mock.patch.object(module, function, lambda *args: {**original(*args), **change})


def variants(column: str, rule: dict[str, Any], data: Inputs) -> Iterator[dict[str, Any]]:
    """Changes to the rule's parameters: threads and accesses of a thread in a row, then one other thing at a time."""
    from megatron_xmoe.kernels.triton_common import warp_size

    warp = warp_size(data.x.device)
    widest = min(MOST_COLUMNS, 2 * data.shape[3] - 1)
    yield {}
    for warps in (1, 2, 4, 8):
        for accesses in (1, 2, 4):
            block = warps * warp * accesses * VECTOR_BYTES // data.dtype.itemsize
            if block <= widest and (block, warps) != (rule["BLOCK"], rule["num_warps"]):
                yield {"BLOCK": block, "num_warps": warps}
    if column == "gather":
        yield from ({"ROWS": rows} for rows in (1, 2, 8, 16))
    else:
        yield {"TOKENS": 2 * rule["TOKENS"]}
        yield {"LOAD": "evict_first"}
        yield {"LOAD": "evict_first", "STORE": ".cs"}
    if column == "permute":
        yield from ({"CLEARED": rows} for rows in (4, 64))
    yield {"STORE": ".cs"}
