// megatron_xmoe._C: the kernels as functions on torch tensors. Only the bindings and arguments.h know torch. Contiguous
// tensors of one device; `stream` is the raw handle of the device's current stream (0 on the CPU).
#include <torch/csrc/utils/pybind.h>

#ifdef __linux__
#include <sys/mman.h>
#include <sys/sysinfo.h>
#endif
#include <tuple>

#include "arguments.h"
#include "cpu/routes.h"
#include "cpu/rows.h"
#include "facts.h"
#include "routes.h"
#include "rows.h"

namespace {

using at::Tensor;
using xmoe::check;
using xmoe::Float;
using xmoe::Index;
using xmoe::launch;
using xmoe::parallel;
using xmoe::require;
using OptionalTensor = std::optional<Tensor>;

Float float_type(const Tensor& x) {
    switch (x.scalar_type()) {
        case at::kFloat: return Float::f32;
        case at::kBFloat16: return Float::bf16;
        case at::kHalf: return Float::f16;
        case at::kDouble: return Float::f64;
        default:
            TORCH_CHECK_VALUE(false, "dtype ", x.scalar_type(), "; it must be float32, bfloat16, float16 or float64");
    }
}

Index index_of(const Tensor& x) {
    TORCH_CHECK_VALUE(x.scalar_type() == at::kInt || x.scalar_type() == at::kLong, "an index has dtype ",
                      x.scalar_type(), "; it must be int32 or int64");
    return {x.const_data_ptr(), x.scalar_type() == at::kInt ? xmoe::Int::i32 : xmoe::Int::i64};
}

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

// On the CPU a wrong index is an error; on a GPU it would cost a synchronisation.
void check_below(const Tensor& index, int64_t rows) {
    if (!index.is_cpu()) return;
    const auto largest = [&](auto* data) {
        int64_t found = -1;
        for (int64_t i = 0; i < index.numel(); ++i) found = data[i] > found ? int64_t(data[i]) : found;
        return found;
    };
    const int64_t found = index.scalar_type() == at::kInt ? largest(index.const_data_ptr<int32_t>())
                                                          : largest(index.const_data_ptr<int64_t>());
    TORCH_CHECK_INDEX(found < rows, "index ", found, " is out of range for ", rows, " row(s)");
}

// The GPU keeps the counts of all experts (for merge_order, of all sources too) in fast memory.
inline void check_experts(int64_t count) {
    TORCH_CHECK_VALUE(count <= xmoe::kMaxExperts, count, " experts (times sources); the GPU kernels take at most ",
                      xmoe::kMaxExperts, ": pin the kernels triton or reference (--xmoe-kernels, XMOE_KERNELS)");
}

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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> build_routes(const Tensor& ids, const Tensor& weights, int64_t E,
                                                                int64_t capacity, bool by_weight, int64_t stream) {
    check("ids", ids, 2, ids);
    check("weights", weights, 2, ids);
    require("ids and weights must have the same shape", ids.sizes() == weights.sizes());
    TORCH_CHECK_VALUE(E >= 1, "num_experts is ", E, "; it must be at least 1");
    const int64_t T = ids.size(0), K = ids.size(1);
    TORCH_CHECK_VALUE(T * K < INT32_MAX, T * K, " routes; fewer than 2^31 - 1 fit");
    const Index experts = index_of(ids);
    const Float type = float_type(weights);
    const auto options = ids.options().dtype(at::kInt);
    Tensor token_ids = at::empty({T * K}, options), expert_ids = at::empty({T * K}, options);
    Tensor tokens_per_expert = at::empty({E}, options.dtype(at::kLong));
    Tensor combine_weights = at::empty({T * K}, weights.options()), inverse = at::empty({T, K}, options);
    if (T * K == 0) {
        tokens_per_expert.zero_();
        return {token_ids, expert_ids, tokens_per_expert, combine_weights, inverse};
    }
    const xmoe::Routes routes{token_ids.data_ptr<int32_t>(), expert_ids.data_ptr<int32_t>(),
                              tokens_per_expert.data_ptr<int64_t>(), combine_weights.data_ptr(),
                              inverse.data_ptr<int32_t>()};
    const void* factors = weights.const_data_ptr();
    launch(ids, stream,
           [&] {
               const bool valid = xmoe::cpu::build_routes(experts, factors, type, T, K, E, capacity, by_weight, routes,
                                                          parallel);
               TORCH_CHECK_INDEX(valid, "an expert id is not below num_experts, ", E);
           },
           [&](auto s) {
               check_experts(E);
               Tensor scratch = at::empty({xmoe::routes_scratch_bytes(T, K, E, by_weight)}, options.dtype(at::kByte));
               xmoe::build_routes(experts, factors, type, T, K, E, capacity, by_weight, routes, scratch.data_ptr(), s);
           });
    return {token_ids, expert_ids, tokens_per_expert, combine_weights, inverse};
}

Tensor map_to_ids(const Tensor& map, int64_t K, int64_t stream) {
    check("routing_map", map, 2, map);
    TORCH_CHECK_VALUE(map.scalar_type() == at::kBool, "routing_map has dtype ", map.scalar_type(), "; it must be bool");
    TORCH_CHECK_VALUE(K >= 0, "K is ", K, "; it must not be negative");
    const int64_t T = map.size(0), E = map.size(1);
    Tensor ids = at::empty({T, K}, map.options().dtype(at::kInt));
    if (E == 0) return ids.fill_(-1);
    if (ids.numel() == 0) return ids;
    const bool* chosen = map.const_data_ptr<bool>();
    int32_t* out = ids.data_ptr<int32_t>();
    launch(map, stream, [&] { xmoe::cpu::map_to_ids(chosen, out, T, K, E, parallel); },
           [&](auto s) { xmoe::map_to_ids(chosen, out, T, K, E, s); });
    return ids;
}

std::tuple<Tensor, Tensor> merge_order(const Tensor& counts, int64_t M, int64_t stream) {
    check("counts", counts, 2, counts);
    TORCH_CHECK_VALUE(counts.scalar_type() == at::kLong, "counts has dtype ", counts.scalar_type(),
                      "; it must be int64");
    TORCH_CHECK_VALUE(M >= 0 && M < INT32_MAX, M, " rows; 0 to 2^31 - 2 fit");
    Tensor to_expert_order = at::empty({M}, counts.options().dtype(at::kInt));
    Tensor to_arrival_order = at::empty_like(to_expert_order);
    const int64_t* data = counts.const_data_ptr<int64_t>();
    const int64_t G = counts.size(0), E = counts.size(1);
    if (counts.is_cpu()) {
        int64_t sum = 0;
        bool valid = true;
        for (int64_t i = 0; i < G * E; ++i) valid = valid && data[i] >= 0, sum += data[i];
        TORCH_CHECK_VALUE(valid && sum == M, "counts sum to ", sum, "; they must not be negative and sum to ", M);
    }
    if (M == 0) return {to_expert_order, to_arrival_order};
    int32_t *forward = to_expert_order.data_ptr<int32_t>(), *back = to_arrival_order.data_ptr<int32_t>();
    launch(counts, stream, [&] { xmoe::cpu::merge_order(data, forward, back, G, E); },
           [&](auto s) {
               check_experts(G * E);
               xmoe::merge_order(data, forward, back, G, E, M, s);
           });
    return {to_expert_order, to_arrival_order};
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

PYBIND11_MODULE(_C, m) {
    const auto released = pybind11::call_guard<pybind11::gil_scoped_release>();
    m.def("gather_rows", &gather_rows, released);
    m.def("spread_rows", &spread_rows, released);
    m.def("sum_rows", &sum_rows, released);
    m.def("dot_rows", &dot_rows, released);
    m.def("build_routes", &build_routes, released);
    m.def("map_to_ids", &map_to_ids, released);
    m.def("merge_order", &merge_order, released);
    m.def("build_facts", &build_facts);
    define_bypass(m);
}
