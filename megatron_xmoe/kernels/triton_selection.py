"""Dropping by weight in Triton: the largest of each expert's routes, exactly, and the earliest among equals."""

import triton
import triton.language as tl


@triton.jit
def fill(token_ids, expert_ids, combine_weights, place, mask):
    """Marks places after the last kept route."""
    nothing = tl.full(place.shape, -1, tl.int32)
    tl.store(token_ids + place, nothing, mask=mask)
    tl.store(expert_ids + place, nothing, mask=mask)
    tl.store(combine_weights + place, tl.zeros(place.shape, combine_weights.dtype.element_ty), mask=mask)


@triton.jit
def key_of(weight):
    """Integers (signed, of 32 or 64 bits) whose unsigned order is that of the weights; NaN is the largest."""
    if weight.dtype == tl.float64:
        bits = tl.where(weight == 0, 0.0, weight).to(tl.int64, bitcast=True)  # -0.0 and 0.0 are equal
        key = tl.where(bits < 0, ~bits, bits ^ (-(2**63)))
    else:
        weight = weight.to(tl.float32)
        bits = tl.where(weight == 0, 0.0, weight).to(tl.int32, bitcast=True)
        key = tl.where(bits < 0, ~bits, bits ^ (-(2**31)))
    return tl.where(weight != weight, -1, key)


@triton.jit(do_not_specialize=["count", "capacity"])
def select_kernel(
    keys, order, totals, weights, token_ids, expert_ids, tokens_per_expert, combine_weights, inverse, count, capacity,
    K: tl.constexpr, E: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keeps the `capacity` largest of one expert's routes, which lie together in `order`, and moves them up."""
    expert = tl.program_id(0)
    bins = tl.arange(0, BINS)
    total = tl.load(totals + bins, mask=bins < E, other=0).to(tl.int32)
    kept = tl.minimum(total, capacity)
    first = tl.sum(tl.where(bins < expert, total, 0), axis=0)
    size = tl.sum(tl.where(bins == expert, total, 0), axis=0)
    place = tl.sum(tl.where(bins < expert, kept, 0), axis=0)
    tl.store(tokens_per_expert + expert, tl.minimum(size, capacity).to(tl.int64))
    # kept are keys above `least`, and the earliest `equals` of those that equal it
    least, equals = _threshold(keys, first, size, tl.minimum(size, capacity), BLOCK)
    start = tl.full([], 0, tl.int32)
    while start < size:
        j = start + tl.arange(0, BLOCK)
        key = _load_keys(keys, first + j, j < size)
        same = ((key == least) & (j < size)).to(tl.int32)
        earlier = tl.cumsum(same, axis=0) - same
        keep = ((key > least) | (key == least) & (earlier < equals)) & (j < size)
        number = keep.to(tl.int32)
        target = place + tl.cumsum(number, axis=0) - number
        i = tl.load(order + first + j, mask=j < size, other=0)
        tl.store(inverse + i, tl.where(keep, target, -1), mask=j < size)
        tl.store(token_ids + target, i // K, mask=keep)
        tl.store(expert_ids + target, tl.zeros([BLOCK], dtype=tl.int32) + expert, mask=keep)
        tl.store(combine_weights + target, tl.load(weights + i, mask=keep, other=0), mask=keep)
        equals -= tl.sum(same, axis=0)
        place += tl.sum(number, axis=0)
        start += BLOCK
    # the places after the last kept route are shared out among all experts
    start = tl.sum(kept, axis=0) + expert * BLOCK
    while start < count:
        at = start + tl.arange(0, BLOCK)
        fill(token_ids, expert_ids, combine_weights, at, at < count)
        start += E * BLOCK


@triton.jit
def _load_keys(keys, at, mask):
    unsigned: tl.constexpr = tl.uint64 if keys.dtype.element_ty == tl.int64 else tl.uint32
    return tl.load(keys + at, mask=mask, other=0).to(unsigned, bitcast=True)


@triton.jit
def _threshold(keys, first, size, wanted, BLOCK: tl.constexpr):
    """The `wanted`-th largest of keys[first : first + size], and how many equal to it are among the `wanted` largest.

    From the highest byte down, the byte is chosen by a histogram of those keys that agree in all bytes before.
    """
    unsigned: tl.constexpr = tl.uint64 if keys.dtype.element_ty == tl.int64 else tl.uint32
    BITS: tl.constexpr = unsigned.primitive_bitwidth
    least = tl.full([], 0, unsigned)
    if wanted < size:
        digits = tl.arange(0, 256)
        for step in range(BITS // 8):
            shift = (tl.full([], BITS - 8, tl.int32) - 8 * step).to(unsigned)
            counts = tl.zeros([256], dtype=tl.int32)
            start = tl.full([], 0, tl.int32)
            while start < size:
                j = start + tl.arange(0, BLOCK)
                key = _load_keys(keys, first + j, j < size) >> shift
                agrees = (j < size) & ((key >> 8) == ((least >> shift) >> 8))
                counts += tl.histogram((key & 255).to(tl.int32), 256, mask=agrees)
                start += BLOCK
            at_least = tl.cumsum(counts, axis=0, reverse=True)
            digit = tl.sum((at_least >= wanted).to(tl.int32), axis=0) - 1
            wanted -= tl.sum(tl.where(digits > digit, counts, 0), axis=0)
            least |= digit.to(unsigned) << shift
    return least, wanted
