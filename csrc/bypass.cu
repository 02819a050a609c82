// Index arithmetic of redundancy bypassing on a GPU. Copies are ordered and counted by chunks of tokens; then each block
// numbers those of its chunk, after what the chunks before it hold. Integer counts may be added in any order, so atomics
// on them change nothing. Every other number has one writer.
#include "common.h"
#include "bypass_items.h"

namespace xmoe {
namespace {

using Stream = gpuStream_t;
constexpr int kThreads = 256;

template <typename Item>
__global__ void __launch_bounds__(kThreads) item_kernel(Item item, int64_t count) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i < count) item(i);
}

template <typename Item>
void run(Stream stream, int64_t count, const Item& item) {
    if (count == 0) return;
    item_kernel<<<static_cast<unsigned>(ceil_div(count, kThreads)), kThreads, 0, stream>>>(item, count);
}

void clear(Stream stream, int64_t* table, int64_t count) {
    if (count) fill_bytes(table, 0xff, count * sizeof(int64_t), stream);
}

__global__ void __launch_bounds__(kThreads)
order_kernel(Choice c, int64_t* __restrict__ bins, Link* __restrict__ links, int* __restrict__ counts, int chunk) {
    extern __shared__ int64_t shared[];
    int64_t* keys = shared;                 // of the chunk's routes
    int64_t* hashes = keys + chunk * c.K;   // of their experts
    const int64_t first = int64_t(blockIdx.x) * chunk;
    const int K = int(c.K), routes = int(min(int64_t(chunk), c.T - first)) * K;
    int* own = counts + blockIdx.x * (c.staying + 1);
    for (int64_t bin = threadIdx.x; bin <= c.staying; bin += kThreads) own[bin] = 0;
    for (int i = threadIdx.x; i < routes; i += kThreads) hashes[i] = c.experts[3 * expert_at(c, first * K + i) + 1];
    __syncthreads();
    for (int i = threadIdx.x; i < routes; i += kThreads) {
        const int token = i / K;
        uint64_t sum = 0;
        for (int j = 0; j < K; ++j) sum += uint64_t(hashes[token * K + j]);
        keys[i] = key_of(c, expert_at(c, first * K + i), first + token, sum);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < routes; i += kThreads) {
        const int token = i / K;
        const int64_t bin = order_route(c, keys + token * K, first + token, i - token * K, bins, links);
        if (bin >= 0) atomicAdd(&own[bin], 1);
    }
}

// A token has at most one copy in a bin, so a copy's number counts tokens before.
__global__ void __launch_bounds__(kThreads)
number_kernel(Choice c, const Link* __restrict__ links, const int* __restrict__ counts, Copies copies, int chunk) {
    extern __shared__ int64_t shared[];
    int* bins = reinterpret_cast<int*>(shared);  // of the chunk's copies
    int* numbers = bins + chunk * c.K;
    const int64_t first = int64_t(blockIdx.x) * chunk, all = c.staying + 1;
    const int K = int(c.K), routes = int(min(int64_t(chunk), c.T - first)) * K, staying = int(c.staying);
    for (int i = threadIdx.x; i < routes; i += kThreads) bins[i] = int(copies.bins[first * K + i]);
    const auto count = [&](int64_t bin) {
        int64_t sum = 0;
#pragma unroll 8
        for (int b = 0; b < gridDim.x; ++b) sum += counts[b * all + bin];
        return sum;
    };
    const int64_t threads = int64_t(gridDim.x) * kThreads;
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < told_size(c); i += threads)
        copies.told[i] = told_at(c, i, count);
    __syncthreads();
    for (int i = threadIdx.x; i < routes; i += kThreads) {
        const int bin = bins[i];
        int number = -1;
        if (bin == staying) {
            number = int(first) + i / K;
        } else if (bin >= 0) {
            number = 0;
#pragma unroll 8
            for (int b = 0; b < blockIdx.x; ++b) number += counts[b * all + bin];
#pragma unroll 8
            for (int j = 0; j < i; ++j) number += bins[j] == bin;
        }
        numbers[i] = number;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < routes; i += kThreads) {
        const int token = i / K;
        tell_route(c, links, numbers + token * K, first + token, i - token * K, copies);
    }
}

}  // namespace

template <>
void number_copies(const Choice& c, Copies copies, void* scratch, Stream stream) {
    const int64_t chunk = tokens_of_chunk(c);
    const auto blocks = static_cast<unsigned>(ceil_div(c.T, chunk));
    Link* links = static_cast<Link*>(scratch);
    int* counts = reinterpret_cast<int*>(links + c.T * c.K);
    order_kernel<<<blocks, kThreads, 2 * sizeof(int64_t) * chunk * c.K, stream>>>(c, copies.bins, links, counts,
                                                                                int(chunk));
    number_kernel<<<blocks, kThreads, 2 * sizeof(int) * chunk * c.K, stream>>>(c, links, counts, copies, int(chunk));
}

}  // namespace xmoe

#include "bypass_launch.h"
