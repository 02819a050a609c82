// Routing metadata on a GPU. A chunk of routes is counted by one block; then each block adds up what the chunks before
// its own hold, and places its routes. Integer counts may be added in any order, so atomics on them change nothing.
#include "common.h"
#include "routes.h"

namespace xmoe {
namespace {

constexpr int kThreads = 512;        // of a block that counts or places
constexpr int kCounters = 4096;      // of all warps of a placing block: 16 KB
constexpr int64_t kMinChunk = 1024;  // routes
constexpr int64_t kMaxChunks = 128;

int64_t chunk_size(int64_t routes) {
    const int64_t size = ceil_div(routes, kMaxChunks);
    return size < kMinChunk ? kMinChunk : ceil_div(size, kMinChunk) * kMinChunk;
}

// Scratch memory: counts [chunks, E]; with selection by weight also the routes in expert order [T*K].
struct Scratch {
    int* counts;
    int* sorted;
};
Scratch split_scratch(void* scratch, int64_t chunks, int64_t E) {
    int* counts = static_cast<int*>(scratch);
    return {counts, counts + chunks * E};
}

// Exclusive prefix sum of data[n] in shared memory by the whole block; returns the total. `partial` has blockDim.x
// ints.
__device__ int block_prefix(int* data, int n, int* partial) {
    const int each = (n + blockDim.x - 1) / blockDim.x;
    const int begin = min(int(threadIdx.x) * each, n), end = min(begin + each, n);
    int sum = 0;
    for (int i = begin; i < end; ++i) sum += data[i];
    partial[threadIdx.x] = sum;
    __syncthreads();
    for (int distance = 1; distance < blockDim.x; distance *= 2) {
        const int left = threadIdx.x >= distance ? partial[threadIdx.x - distance] : 0;
        __syncthreads();
        partial[threadIdx.x] += left;
        __syncthreads();
    }
    int running = partial[threadIdx.x] - sum;
    for (int i = begin; i < end; ++i) {
        const int value = data[i];
        data[i] = running;
        running += value;
    }
    const int total = partial[blockDim.x - 1];
    __syncthreads();
    return total;
}

template <typename I>
__device__ inline int expert_of(const I* ids, int64_t route, int E) {
    const int64_t id = ids[route];
    return id >= 0 && id < E ? int(id) : -1;
}

template <typename I>
__global__ void __launch_bounds__(kThreads)
count_kernel(const I* __restrict__ ids, int* __restrict__ counts, int64_t routes, int64_t chunk, int E) {
    extern __shared__ int local[];
    for (int e = threadIdx.x; e < E; e += blockDim.x) local[e] = 0;
    __syncthreads();
    const int64_t begin = blockIdx.x * chunk, end = min(begin + chunk, routes);
    for (int64_t route = begin + threadIdx.x; route < end; route += blockDim.x) {
        const int e = expert_of(ids, route, E);
        if (e >= 0) atomicAdd(&local[e], 1);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < E; e += blockDim.x) counts[int64_t(blockIdx.x) * E + e] = local[e];
}

// Where a route ends up: all four arrays, or nowhere.
template <typename W>
struct Places {
    int32_t* token_ids;
    int32_t* expert_ids;
    W* combine_weights;
    int32_t* inverse;
    const W* weights;
    int K;

    __device__ void put(int route, int expert, int position) const {
        token_ids[position] = route / K;
        expert_ids[position] = expert;
        combine_weights[position] = weights[route];
        inverse[route] = position;
    }
    // What lies after the last kept route. Called by the whole grid.
    __device__ void clear_from(int kept, int routes) const {
        const int64_t first = int64_t(kept) + blockIdx.x * blockDim.x + threadIdx.x;
        for (int64_t position = first; position < routes; position += gridDim.x * blockDim.x) {
            token_ids[position] = -1;
            expert_ids[position] = -1;
            combine_weights[position] = W{};
        }
    }
};

// Lanes of a warp with the same expert as this one.
__device__ inline lane_mask lanes_alike(int expert, int bits) {
    lane_mask alike = ballot(true);  // a wave may have fewer lanes than the mask has bits
    for (int b = 0; b < bits; ++b) {
        const bool set = (expert >> b) & 1;
        const lane_mask with = ballot(set);
        alike &= set ? with : ~with;
    }
    return alike;
}

// Places the routes of a chunk. With `sorted`, only lists the routes in expert order, nothing dropped.
template <typename I, typename W>
__global__ void __launch_bounds__(kThreads)
place_kernel(const I* __restrict__ ids, const int* __restrict__ counts, int64_t* __restrict__ tokens_per_expert,
             int* __restrict__ sorted, Places<W> places, int routes, int chunk, int E, int capacity, int bits) {
    extern __shared__ int shared[];
    int* start = shared;          // [E] first position of an expert
    int* before = start + E;      // [E] its routes in chunks before this one
    int* of_warp = before + E;    // [warps, E] its routes in the warps of this block
    __shared__ int partial[kThreads];
    const int warps = blockDim.x / warpSize, warp = threadIdx.x / warpSize, lane = threadIdx.x % warpSize;

    for (int e = threadIdx.x; e < E; e += blockDim.x) start[e] = before[e] = 0;
    for (int i = threadIdx.x; i < warps * E; i += blockDim.x) of_warp[i] = 0;
    __syncthreads();
    // several threads add up the chunks of an expert
    const int groups = max(1, int(blockDim.x) / E);
    for (int i = threadIdx.x; i < groups * E; i += blockDim.x) {
        const int e = i % E;
        int sum = 0, earlier = 0;
#pragma unroll 8
        for (int b = i / E; b < gridDim.x; b += groups) {
            const int count = counts[int64_t(b) * E + e];
            sum += count;
            earlier += b < blockIdx.x ? count : 0;
        }
        atomicAdd(&start[e], sum);
        atomicAdd(&before[e], earlier);
    }
    const int each = (chunk + warps - 1) / warps;
    const int begin = min(int(blockIdx.x) * chunk + warp * each, routes);
    const int end = min(min(begin + each, (int(blockIdx.x) + 1) * chunk), routes);
    for (int route = begin + lane; route < end; route += warpSize) {
        const int e = expert_of(ids, route, E);
        if (e >= 0) atomicAdd(&of_warp[warp * E + e], 1);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < E; e += blockDim.x) {
        const int kept = min(start[e], capacity);
        if (blockIdx.x == 0) tokens_per_expert[e] = kept;
        if (!sorted) start[e] = kept;
        int running = before[e];
        for (int w = 0; w < warps; ++w) {
            const int count = of_warp[w * E + e];
            of_warp[w * E + e] = running;
            running += count;
        }
    }
    __syncthreads();
    const int total = block_prefix(start, E, partial);
    for (int first = begin; first < end; first += warpSize) {
        const int route = first + lane;
        const int e = route < end ? expert_of(ids, route, E) : -1;
        const lane_mask alike = lanes_alike(e < 0 ? E : e, bits);
        const int earlier = count_bits(alike & ((lane_mask(1) << lane) - 1));
        int rank = 0;
        if (e >= 0) rank = of_warp[warp * E + e] + earlier;
        sync_warp();  // all lanes have read the count before one changes it
        if (e >= 0 && earlier == 0) of_warp[warp * E + e] += count_bits(alike);
        sync_warp();
        if (route >= end) continue;
        if (sorted) {
            if (e >= 0) sorted[start[e] + rank] = route;
            places.inverse[route] = -1;
        } else if (e >= 0 && rank < capacity) {
            places.put(route, e, start[e] + rank);
        } else {
            places.inverse[route] = -1;
        }
    }
    if (sorted) return;
    places.clear_from(total, routes);
}

// Integers in the order of the weights; zero and minus zero are equal, and every NaN is the largest.
__device__ inline uint64_t order_key(double x) {
    if (x != x) return ~uint64_t(0);
    const uint64_t bits = __double_as_longlong(x + 0.0);
    return bits >> 63 ? ~bits : bits | (uint64_t(1) << 63);
}
__device__ inline uint32_t order_key(float x) {
    if (x != x) return ~uint32_t(0);
    const uint32_t bits = __float_as_uint(x + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The `rank`-th largest key (from 1) of the n keys that key(i) gives, digit by digit; `equal` becomes the number of
// keys with that value that are among the first `rank`. Called by the whole block; bins has 256 ints.
template <typename Key, typename F>
__device__ Key select_key(int n, int rank, F&& key, int* bins, int* equal) {
    __shared__ int digit_found, left;
    Key prefix = 0;
    for (int shift = 8 * sizeof(Key) - 8; shift >= 0; shift -= 8) {
        for (int i = threadIdx.x; i < 256; i += blockDim.x) bins[i] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < n; i += blockDim.x) {
            const Key k = key(i);
            // the digits above this one agree; a shift by the whole width is not defined
            if (shift == 8 * sizeof(Key) - 8 || (k >> shift >> 8) == (prefix >> shift >> 8)) {
                atomicAdd(&bins[(k >> shift) & 255], 1);
            }
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            int digit = 255;
            while (bins[digit] < rank) rank -= bins[digit--];
            digit_found = digit;
            left = rank;
        }
        __syncthreads();
        prefix |= Key(digit_found) << shift;
        rank = left;
        __syncthreads();
    }
    *equal = rank;
    return prefix;
}

// A block keeps the `capacity` heaviest routes of an expert, in their order.
template <typename W>
__global__ void __launch_bounds__(kThreads)
select_kernel(const int* __restrict__ sorted, const int* __restrict__ counts, Places<W> places, int chunks, int routes,
              int E, int capacity) {
    using Key = decltype(order_key(to_float(W{})));
    extern __shared__ int shared[];
    int* start = shared;          // [E] first position of an expert in `sorted`
    int* kept_start = start + E;  // [E] and in the result
    __shared__ int partial[kThreads], bins[256], of_warp[kThreads / 32];
    const int expert = blockIdx.x, lane = threadIdx.x % warpSize, warp = threadIdx.x / warpSize;
    for (int e = threadIdx.x; e < E; e += blockDim.x) {
        int sum = 0;
#pragma unroll 8
        for (int b = 0; b < chunks; ++b) sum += counts[int64_t(b) * E + e];
        start[e] = sum;
        kept_start[e] = min(sum, capacity);
    }
    __syncthreads();
    const int n = start[expert], kept = kept_start[expert];
    __syncthreads();
    block_prefix(start, E, partial);
    const int all_kept = block_prefix(kept_start, E, partial);
    const int* own = sorted + start[expert];
    auto key = [&](int i) { return order_key(to_float(places.weights[own[i]])); };
    Key threshold = 0;
    int equal = n;  // so many of the threshold's value stay
    if (kept > 0 && kept < n) threshold = select_key<Key>(n, kept, key, bins, &equal);

    int done = 0, equals_seen = 0;
    for (int first = 0; first < n && kept > 0; first += blockDim.x) {
        const int i = first + threadIdx.x;
        const Key k = i < n ? key(i) : 0;
        // rank among the equals before, then whether this one stays, both by counting lanes and warps
        const auto count_before = [&](bool yes, int* sum) {
            const lane_mask mask = ballot(yes);
            __syncthreads();
            if (lane == 0) of_warp[warp] = count_bits(mask);
            __syncthreads();
            int before = count_bits(mask & ((lane_mask(1) << lane) - 1)), all = 0;
            for (int w = 0; w < blockDim.x / warpSize; ++w) {
                if (w < warp) before += of_warp[w];
                all += of_warp[w];
            }
            *sum = all;
            return before;
        };
        int sum;
        const bool is_equal = i < n && k == threshold;
        const bool everything = kept == n;
        const int rank = equals_seen + count_before(is_equal, &sum);
        equals_seen += sum;
        const bool stays = i < n && (everything || k > threshold || (is_equal && rank < equal));
        const int position = done + count_before(stays, &sum);
        done += sum;
        if (stays) places.put(own[i], expert, kept_start[expert] + position);
    }
    places.clear_from(all_kept, routes);
}

__global__ void __launch_bounds__(kThreads)
merge_kernel(const int64_t* __restrict__ counts, int32_t* __restrict__ to_expert_order,
             int32_t* __restrict__ to_arrival_order, int G, int E, int M) {
    extern __shared__ int shared[];
    const int segments = G * E;
    int* arrival = shared;              // [G, E] first row of a segment as rows arrive
    int* expert_major = arrival + segments;  // [E, G] and in expert order
    __shared__ int partial[kThreads];
    for (int i = threadIdx.x; i < segments; i += blockDim.x) {
        const int count = static_cast<int>(counts[i]);
        arrival[i] = count;
        expert_major[(i % E) * G + i / E] = count;
    }
    __syncthreads();
    block_prefix(arrival, segments, partial);
    block_prefix(expert_major, segments, partial);
    for (int row = blockIdx.x * blockDim.x + threadIdx.x; row < M; row += gridDim.x * blockDim.x) {
        int low = 0, high = segments;  // the last segment that starts at or before this row; empty ones come before it
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            (arrival[middle] <= row ? low : high) = middle;
        }
        const int position = expert_major[(low % E) * G + low / E] + row - arrival[low];
        to_expert_order[position] = row;
        to_arrival_order[row] = position;
    }
}

}  // namespace

int64_t routes_scratch_bytes(int64_t T, int64_t K, int64_t E, bool by_weight) {
    const int64_t chunks = ceil_div(T * K, chunk_size(T * K));
    return 4 * (chunks * E + (by_weight ? T * K : 0));
}

template <>
void build_routes(Index ids, const void* weights, Float weight_type, int64_t T, int64_t K, int64_t E, int64_t capacity,
                  bool by_weight, Routes routes, void* scratch, gpuStream_t stream) {
    const int64_t N = T * K, chunk = chunk_size(N), chunks = ceil_div(N, chunk);
    if (N == 0) return;
    const bool select = capacity >= 0 && by_weight;
    const Scratch parts = split_scratch(scratch, chunks, E);
    const int limit = capacity < 0 || capacity > N ? static_cast<int>(N) : static_cast<int>(capacity);
    int bits = 1;
    while (E >> bits) ++bits;
    int threads = kThreads;
    while (threads > 64 && threads / 32 * E > kCounters) threads /= 2;
    const size_t shared = sizeof(int) * (2 * E + threads / 32 * E);
    for_int(ids.type, [&](auto i) {
        using I = decltype(i);
        count_kernel<I><<<chunks, kThreads, sizeof(int) * E, stream>>>(
            static_cast<const I*>(ids.data), parts.counts, N, chunk, static_cast<int>(E));
        for_float(weight_type, [&](auto w) {
            using W = decltype(w);
            const Places<W> places{routes.token_ids,    routes.expert_ids,
                                   static_cast<W*>(routes.combine_weights), routes.inverse,
                                   static_cast<const W*>(weights),          static_cast<int>(K)};
            place_kernel<I, W><<<chunks, threads, shared, stream>>>(
                static_cast<const I*>(ids.data), parts.counts, routes.tokens_per_expert,
                select ? parts.sorted : nullptr, places, static_cast<int>(N), static_cast<int>(chunk),
                static_cast<int>(E), limit, bits);
            if (select) {
                select_kernel<W><<<E, kThreads, sizeof(int) * 2 * E, stream>>>(
                    parts.sorted, parts.counts, places, static_cast<int>(chunks), static_cast<int>(N),
                    static_cast<int>(E), limit);
            }
        });
    });
}

template <>
void merge_order(const int64_t* counts, int32_t* to_expert_order, int32_t* to_arrival_order, int64_t G, int64_t E,
                 int64_t M, gpuStream_t stream) {
    if (M == 0) return;
    const int64_t wanted = ceil_div(M, kThreads);
    merge_kernel<<<static_cast<unsigned>(wanted < 264 ? wanted : 264), kThreads, 2 * sizeof(int) * G * E, stream>>>(
        counts, to_expert_order, to_arrival_order, static_cast<int>(G), static_cast<int>(E), static_cast<int>(M));
}

}  // namespace xmoe
