// What the bindings share: checks of torch tensors, and the choice between the CPU and a GPU.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/DeviceGuard.h>

#include <functional>

#include "dtypes.h"
#ifdef XMOE_WITH_GPU
#include "runtime.h"
#endif

namespace xmoe {

using at::Tensor;

inline void parallel(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
    at::parallel_for(0, n, grain, body);
}

// One of the arguments: contiguous, of `dim` dimensions, on the device of the first one.
inline void check(const char* name, const Tensor& x, int64_t dim, const Tensor& first) {
    TORCH_CHECK_VALUE(x.dim() == dim && x.is_contiguous() && x.device() == first.device(), name, " has shape ",
                      x.sizes(), ", strides ", x.strides(), " and device ", x.device(), "; it must be contiguous, of ",
                      dim, " dimension(s), on ", first.device());
}

inline void require(const char* rule, bool kept) { TORCH_CHECK_VALUE(kept, rule); }

inline Float float_type(const Tensor& x) {
    switch (x.scalar_type()) {
        case at::kFloat: return Float::f32;
        case at::kBFloat16: return Float::bf16;
        case at::kHalf: return Float::f16;
        case at::kDouble: return Float::f64;
        default:
            TORCH_CHECK_VALUE(false, "dtype ", x.scalar_type(), "; it must be float32, bfloat16, float16 or float64");
    }
}

inline Index index_of(const Tensor& x) {
    TORCH_CHECK_VALUE(x.scalar_type() == at::kInt || x.scalar_type() == at::kLong, "an index has dtype ",
                      x.scalar_type(), "; it must be int32 or int64");
    return {x.const_data_ptr(), x.scalar_type() == at::kInt ? Int::i32 : Int::i64};
}

// On the CPU a wrong index is an error; on a GPU it would cost a synchronisation.
inline void check_below(const Tensor& index, int64_t count, const char* of = "row") {
    if (!index.is_cpu()) return;
    const auto largest = [&](auto* data) {
        int64_t found = -1;
        for (int64_t i = 0; i < index.numel(); ++i) found = data[i] > found ? int64_t(data[i]) : found;
        return found;
    };
    const int64_t found = index.scalar_type() == at::kInt ? largest(index.const_data_ptr<int32_t>())
                                                          : largest(index.const_data_ptr<int64_t>());
    TORCH_CHECK_INDEX(found < count, "index ", found, " is out of range for ", count, " ", of, "(s)");
}

// Calls cpu() or, for a GPU's tensors, gpu(stream).
template <typename Cpu, typename Gpu>
void launch(const Tensor& first, int64_t stream, Cpu cpu, Gpu gpu) {
    if (first.is_cpu()) {
        cpu();
        return;
    }
#ifdef XMOE_WITH_GPU
    TORCH_CHECK_VALUE(first.is_cuda(), "tensors are on ", first.device(), "; the kernels run on CPU and CUDA or HIP");
    const c10::DeviceGuard guard(first.device());
    gpu(reinterpret_cast<gpuStream_t>(stream));
    const char* error = last_error();  // of the launch; what happens later is torch's to find
    TORCH_CHECK(!error, "kernel launch: ", error);
#else
    TORCH_CHECK_VALUE(false, "tensors are on ", first.device(), "; megatron_xmoe._C was built for the CPU only");
#endif
}

}  // namespace xmoe
