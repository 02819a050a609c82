// Between the router's map of choices and ids, on a GPU: a warp takes a token.
#include "common.h"
#include "routes.h"

namespace xmoe {
namespace {

// The token of a warp in a block of 256 threads.
__device__ inline int64_t token_of_warp() {
    return (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / warpSize;
}
inline unsigned blocks_of_warps(int64_t T) { return static_cast<unsigned>(ceil_div(T, kLeastWarpsOf256)); }

template <typename W>
__global__ void __launch_bounds__(256)
choices_kernel(const bool* __restrict__ map, const W* __restrict__ probs, int32_t* __restrict__ ids,
               W* __restrict__ weights, int64_t T, int64_t K, int64_t E) {
    const int64_t token = token_of_warp();
    const int lane = threadIdx.x % warpSize;
    if (token >= T) return;
    int64_t found = 0;
    for (int64_t first = 0; first < E && found < K; first += warpSize) {
        const int64_t e = first + lane;
        const bool chosen = e < E && map[token * E + e];
        const lane_mask mask = ballot(chosen);
        const int64_t k = found + count_bits(mask & ((lane_mask(1) << lane) - 1));
        if (chosen && k < K) {
            ids[token * K + k] = static_cast<int32_t>(e);
            weights[token * K + k] = probs[token * E + e];
        }
        found += count_bits(mask);
    }
    for (int64_t k = found + lane; k < K; k += warpSize) {
        ids[token * K + k] = -1;
        weights[token * K + k] = W{};
    }
}

template <typename W>
__global__ void __launch_bounds__(256)
choices_gradient_kernel(const W* __restrict__ grad, const int32_t* __restrict__ inverse,
                        const int32_t* __restrict__ ids, W* __restrict__ result, int64_t T, int64_t K, int64_t E) {
    const int64_t token = token_of_warp();
    if (token >= T) return;
    const int64_t end = token * K + K;
    for (int64_t e = threadIdx.x % warpSize; e < E; e += warpSize) {
        // a token's experts ascend, also with -1 after the last one: as an unsigned number it is the largest
        int64_t at = token * K, high = end;
        while (at < high) {
            const int64_t middle = (at + high) / 2;
            if (static_cast<uint32_t>(ids[middle]) < e)
                at = middle + 1;
            else
                high = middle;
        }
        const int32_t position = at < end && ids[at] == e ? inverse[at] : -1;
        result[token * E + e] = position < 0 ? W{} : grad[position];
    }
}

}  // namespace

template <>
void choices_of_map(const bool* map, const void* probs, Float type, Choices choices, int64_t T, int64_t K, int64_t E,
                    gpuStream_t stream) {
    if (T == 0 || K == 0) return;
    for_float(type, [&](auto w) {
        using W = decltype(w);
        choices_kernel<W><<<blocks_of_warps(T), 256, 0, stream>>>(map, static_cast<const W*>(probs), choices.ids,
                                                                  static_cast<W*>(choices.weights), T, K, E);
    });
}

template <>
void gradient_of_map(const void* grad, Float type, const int32_t* inverse, const int32_t* ids, void* result, int64_t T,
                     int64_t K, int64_t E, gpuStream_t stream) {
    if (T == 0 || E == 0) return;
    for_float(type, [&](auto w) {
        using W = decltype(w);
        choices_gradient_kernel<W><<<blocks_of_warps(T), 256, 0, stream>>>(static_cast<const W*>(grad), inverse, ids,
                                                                           static_cast<W*>(result), T, K, E);
    });
}

}  // namespace xmoe
