// Row movement on a GPU. A row is moved in packs of 16 bytes where H and the addresses allow it. No atomics: every
// output element has one writer, and sums run over ascending k.
#include "common.h"
#include "launch.h"
#include "rows.h"

namespace xmoe {
namespace {

constexpr int kThreads = 256;    // of a block, at most
constexpr int kSumThreads = 64;  // of a block that sums, and packs of each thread: measured
constexpr int kTurns = 2;
constexpr int kUnroll = 4;  // packs that a thread has in flight

template <typename T, int N>
__device__ inline Pack<T, N> zero_pack() {
    Pack<T, N> result;
    __builtin_memset(&result, 0, sizeof(result));
    return result;
}

// What p points to, or zeros. As one load with a predicate: with a branch around each, loads would wait for each other.
template <typename T, int N>
__device__ inline Pack<T, N> load_if(bool wanted, const Pack<T, N>* p) {
    Pack<T, N> result;
    if constexpr (sizeof(result) == 16) {
        uint4 bits = make_uint4(0, 0, 0, 0);
        if (wanted) bits = *reinterpret_cast<const uint4*>(p);
        __builtin_memcpy(&result, &bits, 16);
    } else {
        result = wanted ? *p : zero_pack<T, N>();
    }
    return result;
}

// ---- gather: blockDim.x lanes move a row, blockDim.y rows a block
template <typename T, int N, typename I>
__global__ void __launch_bounds__(kThreads)
gather_kernel(const T* __restrict__ x, const I* __restrict__ index, T* __restrict__ out, int64_t M, int64_t packs) {
    const int64_t m = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
    if (m >= M) return;
    const int64_t from = index[m];
    auto* to = reinterpret_cast<Pack<T, N>*>(out) + m * packs;
    if (from < 0) {
        for (int64_t c = threadIdx.x; c < packs; c += blockDim.x) to[c] = zero_pack<T, N>();
        return;
    }
    const auto* source = reinterpret_cast<const Pack<T, N>*>(x) + from * packs;
    int64_t c = threadIdx.x;
    const int64_t step = blockDim.x;
    for (; c + (kUnroll - 1) * step < packs; c += kUnroll * step) {
        Pack<T, N> held[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) held[u] = source[c + u * step];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) to[c + u * step] = held[u];
    }
    for (; c < packs; c += step) to[c] = source[c];
}

// Clears the rows of `out` among first .. first + warpSize that nobody owns. Called by a whole warp.
template <typename T, int N, typename I>
__device__ void clear_holes(const I* owners, T* out, int64_t first, int64_t R, int64_t packs) {
    const int lane = threadIdx.x % warpSize;
    if (first >= R) return;
    for (lane_mask holes = ballot(first + lane < R && owners[first + lane] < 0); holes; holes &= holes - 1) {
        auto* to = reinterpret_cast<Pack<T, N>*>(out) + (first + first_bit(holes)) * packs;
        for (int64_t c = lane; c < packs; c += warpSize) to[c] = zero_pack<T, N>();
    }
}

// ---- spread and dot, few routes a token: a group of lanes reads x[t] once and serves the K routes of the token.
// Blocks after the last token look for rows without an owner and clear them.
template <typename T, int N, typename I, int K, bool kScale, bool kDot>
__global__ void __launch_bounds__(kThreads)
spread_few_kernel(const T* __restrict__ x, const I* __restrict__ index, const I* __restrict__ owners,
                  const typename accumulator<T>::type* __restrict__ weights, const T* __restrict__ y,
                  T* __restrict__ out, typename accumulator<T>::type* __restrict__ dots, int64_t tokens, int64_t R,
                  int64_t packs, int lanes) {
    using A = typename accumulator<T>::type;
    using P = Pack<T, N>;
    constexpr int kAhead = kDot ? 1 : 4;  // packs of x in flight
    const int groups = blockDim.x / lanes, group = threadIdx.x / lanes, lane = threadIdx.x % lanes;
    const int64_t token_blocks = (tokens + groups - 1) / groups;
    if (blockIdx.x >= token_blocks) {
        clear_holes<T, N>(owners, out, (blockIdx.x - token_blocks) * blockDim.x + threadIdx.x / warpSize * warpSize, R,
                          packs);
        return;
    }
    const int64_t t = int64_t(blockIdx.x) * groups + group;
    A dot[K];
    if (t < tokens) {
        int64_t row[K];
        A weight[K];
#pragma unroll
        for (int k = 0; k < K; ++k) {
            row[k] = index[t * K + k];
            weight[k] = kScale ? weights[t * K + k] : A(1);
            dot[k] = 0;
        }
        const P* from = reinterpret_cast<const P*>(x) + t * packs;
        for (int64_t first = lane; first < packs; first += kAhead * lanes) {
            P held[kAhead];
#pragma unroll
            for (int u = 0; u < kAhead; ++u) {
                held[u] = load_if(first + u * lanes < packs, from + first + u * lanes);
            }
            P other[kDot ? K : 1];
            if constexpr (kDot) {
#pragma unroll
                for (int k = 0; k < K; ++k) {
                    other[k] = load_if(row[k] >= 0, reinterpret_cast<const P*>(y) + row[k] * packs + first);
                }
            }
#pragma unroll
            for (int k = 0; k < K; ++k) {
                if (row[k] < 0) continue;
                P* to = reinterpret_cast<P*>(out) + row[k] * packs;
#pragma unroll
                for (int u = 0; u < kAhead; ++u) {
                    if (first + u * lanes >= packs) continue;
                    P moved = held[u];
#pragma unroll
                    for (int n = 0; n < N; ++n) {
                        const A value = to_float(held[u].at[n]);
                        if constexpr (kDot) dot[k] += value * to_float(other[k].at[n]);
                        if constexpr (kScale) moved.at[n] = from_float<T>(value * weight[k]);
                    }
                    to[first + u * lanes] = moved;
                }
            }
        }
    }
    if constexpr (kDot) {
        __shared__ A partial[kThreads / 32][K];
        const int warp = threadIdx.x / warpSize, warps = lanes / warpSize;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            for (int mask = warpSize / 2; mask > 0; mask /= 2) dot[k] += shuffle_xor(dot[k], mask);
            if (threadIdx.x % warpSize == 0) partial[warp][k] = dot[k];
        }
        __syncthreads();
        if (t < tokens && lane < K) {
            A total = 0;
            for (int w = 0; w < warps; ++w) total += partial[group * warps + w][lane];
            dots[t * K + lane] = total;
        }
    }
}

// ---- spread and dot, any number: a warp per route; the warps of a block read the same x[t], so all but the first find
// it in L1. Warps after the last route look for rows without an owner and clear them.
template <typename T, int N, typename I, bool kWrite, bool kScale, bool kDot>
__global__ void __launch_bounds__(kThreads)
spread_kernel(const T* __restrict__ x, const I* __restrict__ index, const I* __restrict__ owners,
              const typename accumulator<T>::type* __restrict__ weights, const T* __restrict__ y, T* __restrict__ out,
              typename accumulator<T>::type* __restrict__ dots, int64_t routes, int K, int64_t R, int64_t packs) {
    using A = typename accumulator<T>::type;
    using P = Pack<T, N>;
    const int lane = threadIdx.x % warpSize;
    const int64_t warp = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / warpSize;
    if (warp >= routes) {
        if constexpr (kWrite) clear_holes<T, N>(owners, out, (warp - routes) * warpSize, R, packs);
        return;
    }
    const int64_t row = index[warp];
    if (row < 0) {
        if (kDot && lane == 0) dots[warp] = 0;
        return;
    }
    const P* from = reinterpret_cast<const P*>(x) + (warp / K) * packs;
    const P* with = reinterpret_cast<const P*>(y) + row * packs;
    P* to = reinterpret_cast<P*>(out) + row * packs;
    const A weight = kScale ? weights[warp] : A(1);
    A dot = 0;
    auto move = [&](const P& held, const P& other, int64_t c) {
        if constexpr (kDot) {
#pragma unroll
            for (int n = 0; n < N; ++n) dot += to_float(held.at[n]) * to_float(other.at[n]);
        }
        if constexpr (kWrite && kScale) {
            P scaled;
#pragma unroll
            for (int n = 0; n < N; ++n) scaled.at[n] = from_float<T>(to_float(held.at[n]) * weight);
            to[c] = scaled;
        } else if constexpr (kWrite) {
            to[c] = held;
        }
    };
    int64_t c = lane;
    const int64_t step = warpSize;
    for (; c + (kUnroll - 1) * step < packs; c += kUnroll * step) {
        P held[kUnroll], other[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            held[u] = from[c + u * step];
            if constexpr (kDot) other[u] = with[c + u * step];
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) move(held[u], other[u], c + u * step);
    }
    for (; c < packs; c += step) {
        P other{};
        if constexpr (kDot) other = with[c];
        move(from[c], other, c);
    }
    if constexpr (kDot) {
        for (int mask = warpSize / 2; mask > 0; mask /= 2) dot += shuffle_xor(dot, mask);
        if (lane == 0) dots[warp] = dot;
    }
}

// One more row of a sum. Product and sum are rounded one after the other, as the reference does.
template <bool kScale, typename A, typename T, int N>
__device__ inline void add(A (&total)[N], const Pack<T, N>& row, A weight) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
        const A value = to_float(row.at[n]);
        if constexpr (kScale && sizeof(A) == 4)
            total[n] = __fadd_rn(total[n], __fmul_rn(value, weight));
        else if constexpr (kScale)
            total[n] = __dadd_rn(total[n], __dmul_rn(value, weight));
        else
            total[n] += value;
    }
}

// ---- sum: a thread sums kTurns packs of a row of the result; blocks next to each other serve the parts of a row.
// K > 0 is the number of rows in each sum; with 0 it is `count`, or differs from sum to sum (offsets).
template <typename T, int N, typename I, int K, bool kScale>
__global__ void __launch_bounds__(kSumThreads)
sum_kernel(const T* __restrict__ y, const I* __restrict__ index, const int64_t* __restrict__ offsets,
           const typename accumulator<T>::type* __restrict__ weights, T* __restrict__ out, int64_t rows, int64_t count,
           int64_t packs, int parts) {
    using A = typename accumulator<T>::type;
    using P = Pack<T, N>;
    constexpr int kAhead = K > 0 ? K : 8;  // rows in flight
    const int64_t t = int64_t(blockIdx.x / parts) * blockDim.y + threadIdx.y;
    int64_t c = int64_t(blockIdx.x % parts) * blockDim.x * kTurns + threadIdx.x;
    if (t >= rows) return;
    const int64_t first = offsets ? offsets[t] : t * (K > 0 ? K : count);
    const int64_t last = K > 0 ? first + K : offsets ? offsets[t + 1] : first + count;
    I row[kAhead];
    A weight[kAhead];
    auto look_up = [&](int64_t k) {
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
            row[u] = K > 0 || k + u < last ? index[k + u] : I(-1);
            weight[u] = kScale && row[u] >= 0 ? weights[k + u] : A(0);
        }
    };
    if constexpr (K > 0) look_up(first);
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
        if (c >= packs) break;
        const P* from = reinterpret_cast<const P*>(y) + c;
        A total[N];
#pragma unroll
        for (int n = 0; n < N; ++n) total[n] = 0;
        for (int64_t k = first; k < last; k += kAhead) {
            if constexpr (K == 0) look_up(k);
            P held[kAhead];
#pragma unroll
            for (int u = 0; u < kAhead; ++u) held[u] = load_if(row[u] >= 0, from + int64_t(row[u]) * packs);
#pragma unroll
            for (int u = 0; u < kAhead; ++u) add<kScale>(total, held[u], weight[u]);
            if constexpr (K > 0) break;
        }
        P result;
#pragma unroll
        for (int n = 0; n < N; ++n) result.at[n] = from_float<T>(total[n]);
        reinterpret_cast<P*>(out)[t * packs + c] = result;
        c += blockDim.x;
    }
}

}  // namespace

template <>
void gather_rows(const void* x, Index index, void* out, int64_t M, int64_t H, Float type, gpuStream_t stream) {
    if (M == 0 || H == 0) return;
    dispatch(type, index.type, H, aligned(x) && aligned(out), [&](auto e, auto i, auto n) {
        using E = decltype(e);
        using I = decltype(i);
        constexpr int N = decltype(n)::value;
        const dim3 block = row_block(H / N, kUnroll, kThreads);
        gather_kernel<E, N, I><<<static_cast<unsigned>(ceil_div(M, block.y)), block, 0, stream>>>(
            static_cast<const E*>(x), static_cast<const I*>(index.data), static_cast<E*>(out), M, H / N);
    });
}

template <>
void spread_rows(const void* x, Index index, const void* owners, const void* weights, const void* y, void* out,
                 void* dots, int64_t T, int64_t K, int64_t R, int64_t H, Float type, gpuStream_t stream) {
    dispatch(type, index.type, H, aligned(x) && aligned(y) && aligned(out), [&](auto e, auto i, auto n) {
        using E = decltype(e);
        using I = decltype(i);
        using A = typename accumulator<E>::type;
        constexpr int N = decltype(n)::value;
        const auto *from = static_cast<const E*>(x), *with = static_cast<const E*>(y);
        const auto *rows = static_cast<const I*>(index.data), *owner = static_cast<const I*>(owners);
        const auto* factors = static_cast<const A*>(weights);
        auto *to = static_cast<E*>(out);
        auto* products = static_cast<A*>(dots);
        for_wanted(weights, dots, [&](auto scale, auto dot) {
            constexpr bool kScale = decltype(scale)::value, kDot = decltype(dot)::value;
            auto any = [&] {
                const int64_t blocks = ceil_div(T * K + ceil_div(R, 32), kLeastWarpsOf256);
                spread_kernel<E, N, I, true, kScale, kDot><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
                    from, rows, owner, factors, with, to, products, T * K, static_cast<int>(K), R, H / N);
            };
            if constexpr (kCommon<I, N>) {
                const int threads = kDot ? 128 : kThreads, lanes = lanes_for(H / N, kDot ? 2 : kUnroll, threads);
                if (lanes < 64) return any();  // a warp serves one token at most
                return for_few(K, [&](auto k) {
                    constexpr int kK = decltype(k)::value;
                    if constexpr (kK == 0) {
                        any();
                    } else {
                        const int64_t blocks = ceil_div(T, threads / lanes) + ceil_div(R, threads);
                        spread_few_kernel<E, N, I, kK, kScale, kDot>
                            <<<static_cast<unsigned>(blocks), threads, 0, stream>>>(
                                from, rows, owner, factors, with, to, products, T, R, H / N, lanes);
                    }
                });
            }
            any();
        });
    });
}

template <>
void dot_rows(const void* y, Index index, const void* x, void* dots, int64_t T, int64_t K, int64_t H, Float type,
              gpuStream_t stream) {
    if (T * K == 0) return;
    dispatch(type, index.type, H, aligned(x) && aligned(y), [&](auto e, auto i, auto n) {
        using E = decltype(e);
        using I = decltype(i);
        using A = typename accumulator<E>::type;
        constexpr int N = decltype(n)::value;
        const auto blocks = static_cast<unsigned>(ceil_div(T * K, kLeastWarpsOf256));
        spread_kernel<E, N, I, false, false, true><<<blocks, kThreads, 0, stream>>>(
            static_cast<const E*>(x), static_cast<const I*>(index.data), nullptr, nullptr, static_cast<const E*>(y),
            nullptr, static_cast<A*>(dots), T * K, static_cast<int>(K), 0, H / N);
    });
}

template <>
void sum_rows(const void* y, Index index, const int64_t* offsets, const void* weights, void* out, int64_t T, int64_t K,
              int64_t H, Float type, gpuStream_t stream) {
    if (T == 0 || H == 0) return;
    dispatch(type, index.type, H, aligned(y) && aligned(out), [&](auto e, auto i, auto n) {
        using E = decltype(e);
        using I = decltype(i);
        using A = typename accumulator<E>::type;
        constexpr int N = decltype(n)::value;
        const int64_t packs = H / N;
        const dim3 block = row_block(packs, kTurns, kSumThreads);
        const int64_t parts = ceil_div(packs, block.x * kTurns);
        const auto blocks = static_cast<unsigned>(ceil_div(T, block.y) * parts);
        auto launch = [&](auto k, auto scale) {
            sum_kernel<E, N, I, decltype(k)::value, decltype(scale)::value><<<blocks, block, 0, stream>>>(
                static_cast<const E*>(y), static_cast<const I*>(index.data), offsets, static_cast<const A*>(weights),
                static_cast<E*>(out), T, K, packs, static_cast<int>(parts));
        };
        auto for_scale = [&](auto k) { weights ? launch(k, std::true_type{}) : launch(k, std::false_type{}); };
        if constexpr (kCommon<I, N>) {
            if (!offsets) return for_few(K, for_scale);
        }
        for_scale(std::integral_constant<int, 0>{});
    });
}

}  // namespace xmoe
