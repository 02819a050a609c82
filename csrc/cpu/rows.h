// Row movement on the CPU: what ../rows.h describes, with the caller's parallel loop in place of a stream. Results do
// not depend on the number of threads.
#pragma once

#include "../dtypes.h"
#include "parallel.h"

namespace xmoe::cpu {

void gather_rows(const void* x, Index index, void* out, int64_t M, int64_t H, Float type, Parallel parallel);

void spread_rows(const void* x, Index index, const void* owners, const void* weights, const void* y, void* out,
                 void* dots, int64_t T, int64_t K, int64_t R, int64_t H, Float type, Parallel parallel);

void sum_rows(const void* y, Index index, const int64_t* offsets, const void* weights, void* out, int64_t T, int64_t K,
              int64_t H, Float type, Parallel parallel);

void dot_rows(const void* y, Index index, const void* x, void* dots, int64_t T, int64_t K, int64_t H, Float type,
              Parallel parallel);

// The instruction set that the functions above use on this machine.
const char* instruction_set();

}  // namespace xmoe::cpu
