"""One table of tolerances, and the two comparisons that tests make: arithmetic within it, data movement bit for bit."""

import torch
from torch import Tensor

RELATIVE_RMS = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float64: 1e-12}
"""Largest root-mean-square error over the root mean square of what is expected."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def relative_rms_error(actual: Tensor, expected: Tensor) -> float:
    """RMS of the difference over the RMS of `expected`; the plain RMS where that is 0, and 0 for empty tensors."""
    if actual.numel() == 0:
        return 0.0
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    error = (actual - expected).square().mean().sqrt().item()
    scale = expected.square().mean().sqrt().item()
    return error / scale if scale > 0 else error


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Fail unless the relative RMS error is within the table; NaN and infinity on either side fail.

    Args:
        actual: what is tested.
        expected: of the same shape, any dtype.
        dtype: precision of the computation, where it is lower than that of `actual`'s dtype.
    """
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error, bound = relative_rms_error(actual, expected), RELATIVE_RMS[dtype or actual.dtype]
    assert error <= bound, f"relative RMS error {error:.3g}, allowed {bound:.3g}"  # NaN compares false


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Fail unless shape, dtype and every bit are equal; so 0.0 differs from -0.0, and a NaN equals itself."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{actual.dtype}, expected {expected.dtype}"
    different = (_bits(actual) != _bits(expected)).nonzero().tolist()
    assert not different, f"{len(different)} of {actual.numel()} elements differ, first at {different[0]}"


def _bits(x: Tensor) -> Tensor:
    x = x.detach().cpu().contiguous()
    return x.view(_BITS[x.element_size()])
