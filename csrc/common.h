// What the kernels share, and the only place that knows whether this is CUDA or HIP. No torch headers here.
#pragma once

#include <cstdint>

#ifdef USE_ROCM
#include <hip/hip_bf16.h>
#include <hip/hip_fp16.h>
#include <hip/hip_runtime.h>
#define gpuStream_t hipStream_t
#define gpuError_t hipError_t
#define gpuGetLastError hipGetLastError
#define gpuGetErrorString hipGetErrorString
#define gpuSuccess hipSuccess
using bfloat16 = __hip_bfloat16;
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define gpuStream_t cudaStream_t
#define gpuError_t cudaError_t
#define gpuGetLastError cudaGetLastError
#define gpuGetErrorString cudaGetErrorString
#define gpuSuccess cudaSuccess
using bfloat16 = __nv_bfloat16;
#endif
