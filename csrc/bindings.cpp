// megatron_xmoe._C: the kernels as functions on torch tensors. Only the bindings and arguments.h know torch. Contiguous
// tensors of one device; `stream` is the raw handle of the device's current stream (0 on the CPU).
#include <torch/csrc/utils/pybind.h>

#ifdef __linux__
#include <sys/mman.h>
#include <sys/sysinfo.h>
#endif
#include <tuple>

#include "arguments.h"
#include "cpu/rows.h"
#include "facts.h"
#include "rows.h"

namespace {

using at::Tensor;
using xmoe::check;
using xmoe::check_below;
using xmoe::Float;
using xmoe::float_type;
using xmoe::Index;
using xmoe::index_of;
using xmoe::launch;
using xmoe::parallel;
using xmoe::require;
using OptionalTensor = std::optional<Tensor>;

at::ScalarType accumulator(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// Memory for rows. On a CPU a large result is new memory, and most of the time would go into its faults, one per 4 KiB.
// Huge pages have 512 times fewer, but the kernel must not have to make room for them: that takes even longer.
Tensor empty_rows(int64_t rows, int64_t columns, const Tensor& like) {
    Tensor out = at::empty({rows, columns}, like.options());
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t huge = uintptr_t(2) << 20;
    struct sysinfo memory;
    if (out.is_cpu() && out.nbytes() >= 4 * huge && !sysinfo(&memory) && memory.freeram > memory.totalram / 2) {
        const auto begin = reinterpret_cast<uintptr_t>(out.data_ptr());
        const uintptr_t from = (begin + huge - 1) & -huge, to = (begin + out.nbytes()) & -huge;
        madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);  // advice: a refusal changes nothing
    }
#endif
    return out;
}

const void* data_or_null(const OptionalTensor& x) { return x ? x->const_data_ptr() : nullptr; }

Tensor gather_rows(const Tensor& x, const Tensor& index, int64_t stream) {
    check("x", x, 2, x);
    check("index", index, 1, x);
    const Index positions = index_of(index);
    const Float type = float_type(x);
    check_below(index, x.size(0));
    const int64_t M = index.size(0), H = x.size(1);
    Tensor out = empty_rows(M, H, x);
    if (out.numel() == 0) return out;
    const void* in = x.const_data_ptr();
    launch(x, stream, [&] { xmoe::cpu::gather_rows(in, positions, out.data_ptr(), M, H, type, parallel); },
           [&](auto s) { xmoe::gather_rows(in, positions, out.data_ptr(), M, H, type, s); });
    return out;
}

// The second result is empty when there is no y.
std::tuple<Tensor, Tensor> spread_rows(const Tensor& x, const Tensor& index, const Tensor& owners,
                                       const OptionalTensor& weights, const OptionalTensor& y, int64_t stream) {
    check("x", x, 2, x);
    check("index", index, 2, x);
    check("owners", owners, 1, x);
    const int64_t T = x.size(0), K = index.size(1), R = owners.size(0), H = x.size(1);
    require("index and x must have the same number of rows", index.size(0) == T);
    require("owners and index must have the same dtype", owners.scalar_type() == index.scalar_type());
    if (weights) {
        check("weights", *weights, 2, x);
        require("weights must have index's shape and the accumulator's dtype",
                   weights->sizes() == index.sizes() && weights->scalar_type() == accumulator(x));
    }
    if (y) {
        check("y", *y, 2, x);
        require("y must be [number of owners, H] and of x's dtype",
                   y->size(0) == R && y->size(1) == H && y->scalar_type() == x.scalar_type());
    }
    const Index positions = index_of(index);
    const Float type = float_type(x);
    check_below(index, R);
    Tensor out = empty_rows(R, H, x);
    Tensor dots = at::empty({y ? T : 0, K}, x.options().dtype(accumulator(x)));
    if (H == 0) dots.zero_();
    if (H == 0 || (R == 0 && T * K == 0)) return {out, dots};
    const void *in = x.const_data_ptr(), *factors = data_or_null(weights), *other = data_or_null(y);
    void* products = y ? dots.data_ptr() : nullptr;
    launch(x, stream,
           [&] {
               xmoe::cpu::spread_rows(in, positions, owners.const_data_ptr(), factors, other, out.data_ptr(), products,
                                      T, K, R, H, type, parallel);
           },
           [&](auto s) {
               xmoe::spread_rows(in, positions, owners.const_data_ptr(), factors, other, out.data_ptr(), products, T, K,
                                 R, H, type, s);
           });
    return {out, dots};
}

Tensor sum_rows(const Tensor& y, const Tensor& index, const OptionalTensor& weights, const OptionalTensor& offsets,
                int64_t stream) {
    check("y", y, 2, y);
    check("index", index, offsets ? 1 : 2, y);
    if (weights) {
        check("weights", *weights, index.dim(), y);
        require("weights must have index's shape and the accumulator's dtype",
                   weights->sizes() == index.sizes() && weights->scalar_type() == accumulator(y));
    }
    int64_t T = index.size(0), K = offsets ? 0 : index.size(1);
    if (offsets) {
        check("offsets", *offsets, 1, y);
        require("offsets must be int64 and have at least one element",
                   offsets->scalar_type() == at::kLong && offsets->size(0) >= 1);
        T = offsets->size(0) - 1;
        if (y.is_cpu()) {
            const int64_t* at = offsets->const_data_ptr<int64_t>();
            bool ascending = at[0] >= 0 && at[T] <= index.size(0);
            for (int64_t t = 0; t < T; ++t) ascending = ascending && at[t] <= at[t + 1];
            require("offsets must ascend from 0 to the length of index", ascending);
        }
    }
    const Index positions = index_of(index);
    const Float type = float_type(y);
    check_below(index, y.size(0));
    const int64_t H = y.size(1);
    Tensor out = empty_rows(T, H, y);
    if (out.numel() == 0) return out;
    const void *in = y.const_data_ptr(), *factors = data_or_null(weights);
    const int64_t* starts = offsets ? offsets->const_data_ptr<int64_t>() : nullptr;
    launch(y, stream,
           [&] { xmoe::cpu::sum_rows(in, positions, starts, factors, out.data_ptr(), T, K, H, type, parallel); },
           [&](auto s) { xmoe::sum_rows(in, positions, starts, factors, out.data_ptr(), T, K, H, type, s); });
    return out;
}

Tensor dot_rows(const Tensor& y, const Tensor& index, const Tensor& x, int64_t stream) {
    check("y", y, 2, y);
    check("index", index, 2, y);
    check("x", x, 2, y);
    const int64_t T = index.size(0), K = index.size(1), H = y.size(1);
    require("x must be [rows of index, H] and of y's dtype",
               x.size(0) == T && x.size(1) == H && x.scalar_type() == y.scalar_type());
    const Index positions = index_of(index);
    const Float type = float_type(y);
    check_below(index, y.size(0));
    Tensor dots = at::empty({T, K}, y.options().dtype(accumulator(y)));
    if (dots.numel() == 0) return dots;
    if (H == 0) return dots.zero_();
    const void *left = y.const_data_ptr(), *right = x.const_data_ptr();
    launch(y, stream, [&] { xmoe::cpu::dot_rows(left, positions, right, dots.data_ptr(), T, K, H, type, parallel); },
           [&](auto s) { xmoe::dot_rows(left, positions, right, dots.data_ptr(), T, K, H, type, s); });
    return dots;
}

// What was built and what for.
pybind11::dict build_facts() {
    const xmoe::Facts& built = xmoe::facts();
    pybind11::dict facts;
    facts["sources"] = built.sources;
    facts["torch"] = built.torch;
    facts["gpu"] = built.gpu;
    facts["archs"] = built.archs;
    facts["compiler"] = built.compiler;
    facts["cpu"] = xmoe::cpu::instruction_set();
    return facts;
}

}  // namespace

void define_bypass(pybind11::module_& m);  // bindings_bypass.cpp
void define_routes(pybind11::module_& m);  // bindings_routes.cpp

PYBIND11_MODULE(_C, m) {
    const auto released = pybind11::call_guard<pybind11::gil_scoped_release>();
    m.def("gather_rows", &gather_rows, released);
    m.def("spread_rows", &spread_rows, released);
    m.def("sum_rows", &sum_rows, released);
    m.def("dot_rows", &dot_rows, released);
    m.def("build_facts", &build_facts);
    define_bypass(m);
    define_routes(m);
}
