// What the device code shares, and the only file that knows whether this is CUDA or HIP. No torch headers here.
#pragma once

#include <cstdint>

#ifdef USE_ROCM
#include <hip/hip_fp16.h>
#include <hip/hip_runtime.h>
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include "dtypes.h"

namespace xmoe {

#ifdef USE_ROCM
using gpuStream_t = hipStream_t;
inline void fill_bytes(void* at, int byte, size_t bytes, gpuStream_t stream) {
    (void)hipMemsetAsync(at, byte, bytes, stream);  // what goes wrong is found by last_error
}
constexpr int kLeastWarpsOf256 = 4;  // waves of 64 lanes on CDNA; RDNA has twice as many of 32
using lane_mask = uint64_t;  // one bit per lane of a wave of up to 64
__device__ inline lane_mask ballot(bool yes) { return __ballot(yes); }
__device__ inline float shuffle_xor(float x, int mask) { return __shfl_xor(x, mask); }
__device__ inline double shuffle_xor(double x, int mask) { return __shfl_xor(x, mask); }
__device__ inline int shuffle(int x, int lane) { return __shfl(x, lane); }
__device__ inline int count_bits(lane_mask mask) { return __popcll(mask); }
__device__ inline int first_bit(lane_mask mask) { return __ffsll(static_cast<unsigned long long>(mask)) - 1; }
// lanes of a wave run in lockstep; this keeps the compiler from moving memory accesses across
__device__ inline void sync_warp() {
    __builtin_amdgcn_fence(__ATOMIC_ACQ_REL, "wavefront");
    __builtin_amdgcn_wave_barrier();
}
#else
using gpuStream_t = cudaStream_t;
inline void fill_bytes(void* at, int byte, size_t bytes, gpuStream_t stream) {
    cudaMemsetAsync(at, byte, bytes, stream);  // what goes wrong is found by last_error
}
constexpr int kLeastWarpsOf256 = 8;
using lane_mask = uint32_t;
__device__ inline lane_mask ballot(bool yes) { return __ballot_sync(0xffffffffu, yes); }
__device__ inline float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
__device__ inline double shuffle_xor(double x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
__device__ inline int shuffle(int x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
__device__ inline int count_bits(lane_mask mask) { return __popc(mask); }
__device__ inline int first_bit(lane_mask mask) { return __ffs(mask) - 1; }
__device__ inline void sync_warp() { __syncwarp(); }
#endif

// bfloat16 as its bits: the headers of CUDA and of old and new ROCm differ
struct bf16 {
    uint16_t bits;
};
using f16 = __half;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(f16 x) { return __half2float(x); }
__device__ inline float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ inline double to_float(double x) { return x; }

template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) { return x; }
template <>
__device__ inline f16 from_float<f16>(float x) { return __float2half_rn(x); }
template <>
__device__ inline bf16 from_float<bf16>(float x) {
#ifdef USE_ROCM
    const uint32_t bits = __float_as_uint(x);
    if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
    return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};  // to nearest, ties to even
#else
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#endif
}
template <typename T>
__device__ inline T from_float(double x);
template <>
__device__ inline double from_float<double>(double x) { return x; }

// The type in which rows are summed.
template <typename T>
struct accumulator {
    using type = float;
};
template <>
struct accumulator<double> {
    using type = double;
};

// N elements that are loaded and stored at once; 16 bytes where rows are aligned to that, else one element.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
    T at[N];
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f with a value of the C++ type that `type` names.
template <typename F>
void for_float(Float type, F&& f) {
    switch (type) {
        case Float::f32: return f(float{});
        case Float::bf16: return f(bf16{});
        case Float::f16: return f(f16{});
        case Float::f64: return f(double{});
    }
}
template <typename F>
void for_int(Int type, F&& f) {
    if (type == Int::i32) return f(int32_t{});
    return f(int64_t{});
}

}  // namespace xmoe
