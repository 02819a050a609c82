"""What the router's kernels compute of rows of logits [rows, columns]: the choice of experts, their scores, gradients.

All rows of a tile at once. Among equal experts the lowest is chosen.
"""

import triton
import triton.language as tl


@triton.jit
def ordered(x, there):
    """Signed integers in the order of x, NaN above all; where there is nothing, the lowest, which nothing else has."""
    if x.dtype == tl.float64:
        integer: tl.constexpr = tl.int64
        highest: tl.constexpr = 2**63 - 1
    else:
        integer: tl.constexpr = tl.int32
        highest: tl.constexpr = 2**31 - 1
    bits = tl.where(x == 0, 0.0, x).to(integer, bitcast=True)  # -0.0 and 0.0 are equal
    key = tl.where(x != x, highest, tl.where(bits < 0, bits ^ highest, bits))
    lowest = tl.full([], -highest - 1, integer)
    return tl.where(there, key, lowest), lowest


@triton.jit
def best(x, there, K: tl.constexpr):
    """Marks the K largest of each row [rows, columns] that are there, among equals the first."""
    key, lowest = ordered(x, there)
    column = tl.arange(0, x.shape[1])[None, :]
    for _ in range(K):
        _, at = tl.max(key, axis=1, return_indices=True)
        key = tl.where(column == at[:, None], lowest, key)
    return there & (key == lowest)


@triton.jit
def in_best_groups(
    x, there, GROUPS: tl.constexpr, GROUP_TOPK: tl.constexpr, GROUP_BEST: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Marks the slots of the GROUP_TOPK groups with the largest sum of their GROUP_BEST best x."""
    grouped: tl.constexpr = [x.shape[0], x.shape[1] // WIDTH, WIDTH]
    key, lowest = ordered(x, there)
    key, value = tl.reshape(key, grouped), tl.reshape(x, grouped)
    column = tl.arange(0, WIDTH)[None, None, :]
    total = tl.zeros([grouped[0], grouped[1]], x.dtype)
    for _ in range(GROUP_BEST):
        _, at = tl.max(key, axis=2, return_indices=True)
        hit = column == at[:, :, None]
        total += tl.sum(tl.where(hit, value, 0), axis=2)
        key = tl.where(hit, lowest, key)
    exists = tl.broadcast_to((tl.arange(0, grouped[1]) < GROUPS)[None, :], [grouped[0], grouped[1]])
    allowed = best(total, exists, GROUP_TOPK)
    return there & tl.reshape(tl.broadcast_to(allowed[:, :, None], grouped), x.shape)


@triton.jit
def softmax(x, there):
    """Of the marked elements of each row; 0 elsewhere."""
    top = tl.max(tl.where(there, x, float("-inf")), axis=1)
    power = tl.where(there, tl.exp(x - top[:, None]), 0.0)
    return power / tl.sum(power, axis=1)[:, None]


@triton.jit
def score(x, there, SCORE: tl.constexpr):
    """An expert's score by itself, 0 where there is none, and its derivative: sigmoid, or root of softplus."""
    sigmoid = 1 / (1 + tl.exp(-x))
    if SCORE == 1:
        value = sigmoid
        slope = sigmoid * (1 - sigmoid)
    else:
        power = tl.exp(tl.minimum(x, 20.0))
        above = 1 + power  # log(1 + power) without the rounding of 1 + power
        log = tl.where(above == 1, power, tl.log(above) * (power / tl.where(above == 1, 1.0, above - 1)))
        value = tl.sqrt(tl.where(x > 20, x, log))
        slope = tl.where(value > 0, tl.where(x > 20, 1.0, sigmoid) / (2 * value), 0.0)
    return tl.where(there, value, 0.0), slope


@triton.jit
def through_softmax(result, grad):
    """The gradient of a softmax's input from that of its result."""
    return result * (grad - tl.sum(result * grad, axis=1)[:, None])


@triton.jit
def through_sum(scores, grad):
    """The gradient of scores from that of scores / their sum."""
    total = (tl.sum(scores, axis=1) + 1e-20)[:, None]
    return (grad - tl.sum(grad * (scores / total), axis=1)[:, None]) / total
