// The host side of the GPU runtime, under one name for CUDA and HIP: all that the bindings need. Device code includes
// common.h instead.
#pragma once

#ifdef USE_ROCM
#include <hip/hip_runtime_api.h>
#else
#include <cuda_runtime_api.h>
#endif

namespace xmoe {

#ifdef USE_ROCM
using gpuStream_t = hipStream_t;
inline const char* last_error() {
    const hipError_t error = hipGetLastError();
    return error == hipSuccess ? nullptr : hipGetErrorString(error);
}
#else
using gpuStream_t = cudaStream_t;
inline const char* last_error() {
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif

}  // namespace xmoe
