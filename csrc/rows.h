// Row movement. Matrices are row-major and contiguous; H columns. Index -1 (any negative) names no row; indices must be
// below the number of rows they point into. Sums run in fp32 (fp64 for f64) over ascending k, so they are the same
// bits every time. `Stream` is the type of the device's streams; the CPU versions in cpu/rows.h take none.
#pragma once

#include "dtypes.h"

namespace xmoe {

// out[m] = x[index[m]], zeros where index[m] < 0.   x [R, H], index [M], out [M, H]
template <typename Stream>
void gather_rows(const void* x, Index index, void* out, int64_t M, int64_t H, Float type, Stream stream);

// Token-major scatter: out[index[t, k]] = weights[t, k] * x[t]; every row of `out` that `index` does not name must have
// owners[r] < 0, and becomes zeros. No row is named twice. With y, also dots[t, k] = y[index[t, k]] . x[t] (0 where
// index < 0).
//   x [T, H], index [T, K], owners [R] (same integer type as index), out [R, H]
//   weights [T, K] in the accumulator's type (fp32; fp64 for f64) or null for ones
//   y [R, H] and dots [T, K] (accumulator's type), or both null
template <typename Stream>
void spread_rows(const void* x, Index index, const void* owners, const void* weights, const void* y, void* out,
                 void* dots, int64_t T, int64_t K, int64_t R, int64_t H, Float type, Stream stream);

// out[t] = sum over k of weights[t, k] * y[index[t, k]].   y [R, H], out [T, H]
//   offsets null: index and weights are [T, K]. Otherwise offsets [T + 1] int64 and row t sums over positions
//   offsets[t] .. offsets[t + 1] of flat index and weights (K is not used).
//   weights in the accumulator's type, or null for ones
template <typename Stream>
void sum_rows(const void* y, Index index, const int64_t* offsets, const void* weights, void* out, int64_t T, int64_t K,
              int64_t H, Float type, Stream stream);

// dots[t, k] = y[index[t, k]] . x[t], 0 where index < 0.   y [R, H], x [T, H], dots [T, K] in the accumulator's type
template <typename Stream>
void dot_rows(const void* y, Index index, const void* x, void* dots, int64_t T, int64_t K, int64_t H, Float type,
              Stream stream);

}  // namespace xmoe
