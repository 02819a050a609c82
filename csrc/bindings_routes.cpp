// Routing metadata as functions on torch tensors, see bindings.cpp.
#include <torch/csrc/utils/pybind.h>

#include <tuple>

#include "arguments.h"
#include "cpu/routes.h"
#include "routes.h"

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

// The GPU keeps the counts of all experts (for merge_order, of all sources too) in fast memory.
void check_experts(int64_t count) {
    TORCH_CHECK_VALUE(count <= xmoe::kMaxExperts, count, " experts (times sources); the GPU kernels take at most ",
                      xmoe::kMaxExperts, ": pin the kernels triton or reference (--xmoe-kernels, XMOE_KERNELS)");
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

std::tuple<Tensor, Tensor> choices_of_map(const Tensor& map, const Tensor& probs, int64_t K, int64_t stream) {
    check("routing_map", map, 2, map);
    check("probs", probs, 2, map);
    TORCH_CHECK_VALUE(map.scalar_type() == at::kBool, "routing_map has dtype ", map.scalar_type(), "; it must be bool");
    require("routing_map and probs must have the same shape", map.sizes() == probs.sizes());
    const int64_t T = map.size(0), E = map.size(1);
    TORCH_CHECK_VALUE(K >= 0 && K <= E, "K is ", K, "; it must be from 0 to the number of experts, ", E);
    const Float type = float_type(probs);
    Tensor ids = at::empty({T, K}, map.options().dtype(at::kInt)), weights = at::empty({T, K}, probs.options());
    if (ids.numel() == 0) return {ids, weights};
    const bool* chosen = map.const_data_ptr<bool>();
    const void* in = probs.const_data_ptr();
    const xmoe::Choices out{ids.data_ptr<int32_t>(), weights.data_ptr()};
    launch(map, stream, [&] { xmoe::cpu::choices_of_map(chosen, in, type, out, T, K, E, parallel); },
           [&](auto s) { xmoe::choices_of_map(chosen, in, type, out, T, K, E, s); });
    return {ids, weights};
}

Tensor gradient_of_map(const Tensor& grad, const Tensor& inverse, const Tensor& ids, int64_t E, int64_t stream) {
    check("grad", grad, 1, grad);
    check("inverse", inverse, 2, grad);
    check("ids", ids, 2, grad);
    require("inverse and ids must be int32 and have the same shape",
            inverse.scalar_type() == at::kInt && ids.scalar_type() == at::kInt && inverse.sizes() == ids.sizes());
    TORCH_CHECK_VALUE(E >= 0, "experts is ", E, "; it must not be negative");
    const Float type = float_type(grad);
    check_below(inverse, grad.size(0), "route");
    check_below(ids, E, "expert");
    const int64_t T = ids.size(0), K = ids.size(1);
    Tensor result = at::empty({T, E}, grad.options());
    if (result.numel() == 0) return result;
    const void* in = grad.const_data_ptr();
    const int32_t *positions = inverse.const_data_ptr<int32_t>(), *experts = ids.const_data_ptr<int32_t>();
    launch(grad, stream,
           [&] { xmoe::cpu::gradient_of_map(in, type, positions, experts, result.data_ptr(), T, K, E, parallel); },
           [&](auto s) { xmoe::gradient_of_map(in, type, positions, experts, result.data_ptr(), T, K, E, s); });
    return result;
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

}  // namespace

void define_routes(pybind11::module_& m) {
    const auto released = pybind11::call_guard<pybind11::gil_scoped_release>();
    m.def("build_routes", &build_routes, released);
    m.def("choices_of_map", &choices_of_map, released);
    m.def("gradient_of_map", &gradient_of_map, released);
    m.def("merge_order", &merge_order, released);
}
