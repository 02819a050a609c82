#include "rows.h"

#include <cstdlib>
#include <string>
#include <type_traits>
#include <vector>

#include "elements.h"
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define XMOE_X86 1
#endif

namespace xmoe::cpu {
namespace {

constexpr int64_t BLOCK = 2048;                    // columns at a time: sums and their result stay in the first cache
constexpr int64_t AHEAD = 4;                       // rows that a sum asks for before it needs them
constexpr int64_t STREAM_FROM = int64_t(4) << 20;  // bytes of a result that the next reader will not find cached

// The inner loops for one element type, for the instruction set of this machine.
template <typename T>
struct RowLoops {
    void (*copy)(void* to, const void* from, int64_t bytes, bool stream);
    void (*finish)();
    void (*scale)(T* to, const T* from, Accumulator<T> weight, int64_t H, bool stream);
    void (*dot_four)(const T* const* rows, const T* x, int64_t H, Accumulator<T>* dots);
    void (*sum)(T* to, const T* const* rows, const Accumulator<T>* weights, int64_t count, const T* const* next,
                int64_t next_count, int64_t H, bool stream);
};

#if XMOE_X86
#define XMOE_STREAM_BYTES 16
#else
#define XMOE_STREAM_BYTES 0
#endif
namespace baseline {
#include "rows_simd.h"
}
#undef XMOE_STREAM_BYTES

#if XMOE_X86
#define XMOE_STREAM_BYTES 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#include "rows_simd.h"
}
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq")
#endif
#undef XMOE_STREAM_BYTES
#define XMOE_STREAM_BYTES 64
namespace avx512 {
#include "rows_simd.h"
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef XMOE_STREAM_BYTES
#endif

enum class Level { baseline, avx2, avx512 };

// What this machine has, or less where XMOE_CPU asks for SSE2 or AVX2.
Level level() {
#if XMOE_X86
    static const Level found = [] {
        const char* asked = std::getenv("XMOE_CPU");
        const std::string most = asked ? asked : "";
        __builtin_cpu_init();
        if (most == "SSE2" || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Level::baseline;
        const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
        return wide && most != "AVX2" ? Level::avx512 : Level::avx2;
    }();
    return found;
#else
    return Level::baseline;
#endif
}

template <typename T>
RowLoops<T> loops() {
#if XMOE_X86
    if (level() == Level::avx512) return avx512::Loops<T>::get();
    if (level() == Level::avx2) return avx2::Loops<T>::get();
#endif
    return baseline::Loops<T>::get();
}

// Rows that a thread takes at least, when one row means moving `bytes` bytes.
int64_t grain(int64_t bytes) { return 1 + 65536 / (bytes + 1); }

// dots[k] = y[index[k]] . x, 0 where index[k] < 0. A place without a row in a group of four repeats one, so that the
// bits of a dot product depend on its row and x alone.
template <typename T, typename I>
void dot_token(const RowLoops<T>& loop, const T* y, const I* index, const T* x, Accumulator<T>* dots, int64_t K,
               int64_t H) {
    const T* rows[4];
    Accumulator<T> found[4];
    Accumulator<T>* places[4];
    for (int64_t k = 0, n = 0; k < K; ++k) {
        dots[k] = 0;
        if (index[k] >= 0) {
            places[n] = dots + k;
            rows[n++] = y + int64_t(index[k]) * H;
        }
        if (n == 0 || (n < 4 && k + 1 < K)) continue;
        for (int64_t i = n; i < 4; ++i) rows[i] = rows[0];
        loop.dot_four(rows, x, H, found);
        for (int64_t i = 0; i < n; ++i) *places[i] = found[i];
        n = 0;
    }
}

template <typename T, typename I>
void gather(const T* x, const I* index, T* out, int64_t M, int64_t H, Parallel parallel) {
    const int64_t bytes = H * int64_t(sizeof(T));
    const bool stream = M * bytes >= STREAM_FROM;
    const RowLoops<T> loop = loops<T>();
    parallel(M, grain(bytes), [=](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; ++m) {
            const int64_t row = index[m];
            if (row < 0)
                std::memset(out + m * H, 0, bytes);
            else
                loop.copy(out + m * H, x + row * H, bytes, stream);
        }
        loop.finish();
    });
}

template <typename T, typename I>
void spread(const T* x, const I* index, const I* owners, const Accumulator<T>* weights, const T* y, T* out,
            Accumulator<T>* dots, int64_t T_, int64_t K, int64_t R, int64_t H, Parallel parallel) {
    const int64_t bytes = H * int64_t(sizeof(T));
    const bool stream = R * bytes >= STREAM_FROM;
    const RowLoops<T> loop = loops<T>();
    parallel(R, 4096, [=](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r)
            if (owners[r] < 0) std::memset(out + r * H, 0, bytes);
    });
    parallel(T_, grain(K * bytes), [=](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            if (dots) dot_token(loop, y, index + t * K, x + t * H, dots + t * K, K, H);
            for (int64_t p = t * K; p < (t + 1) * K; ++p) {
                const int64_t row = index[p];
                if (row < 0) continue;
                if (weights)
                    loop.scale(out + row * H, x + t * H, weights[p], H, stream);
                else
                    loop.copy(out + row * H, x + t * H, bytes, stream);
            }
        }
        loop.finish();
    });
}

template <typename T, typename I>
void sum(const T* y, const I* index, const int64_t* offsets, const Accumulator<T>* weights, T* out, int64_t T_,
         int64_t K, int64_t H, Parallel parallel) {
    const int64_t bytes = H * int64_t(sizeof(T));
    const bool stream = T_ * bytes >= STREAM_FROM;
    const RowLoops<T> loop = loops<T>();
    parallel(T_, grain((K + 1) * bytes), [=](int64_t begin, int64_t end) {
        std::vector<const T*> rows, next;
        std::vector<Accumulator<T>> factors, next_factors;
        const auto find = [&](int64_t t) {  // the rows of token t, into `next`
            next.clear();
            next_factors.clear();
            if (t == end) return;
            const int64_t first = offsets ? offsets[t] : t * K, last = offsets ? offsets[t + 1] : (t + 1) * K;
            for (int64_t p = first; p < last; ++p) {
                if (index[p] < 0) continue;
                next.push_back(y + int64_t(index[p]) * H);
                next_factors.push_back(weights ? weights[p] : 1);
            }
        };
        find(begin);
        for (int64_t t = begin; t < end; ++t) {
            rows.swap(next);
            factors.swap(next_factors);
            find(t + 1);
            loop.sum(out + t * H, rows.data(), factors.data(), int64_t(rows.size()), next.data(), int64_t(next.size()),
                     H, stream);
        }
        loop.finish();
    });
}

template <typename T, typename I>
void dot(const T* y, const I* index, const T* x, Accumulator<T>* dots, int64_t T_, int64_t K, int64_t H,
         Parallel parallel) {
    const RowLoops<T> loop = loops<T>();
    parallel(T_, grain(K * H * int64_t(sizeof(T))), [=](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t)
            dot_token(loop, y, index + t * K, x + t * H, dots + t * K, K, H);
    });
}

// Calls function(T{}, I{}) with the element and index types.
template <typename Function>
void with_types(Float type, Int index_type, Function function) {
    for_float(type, [&](auto element) {
        if (index_type == Int::i32)
            function(element, int32_t{});
        else
            function(element, int64_t{});
    });
}

}  // namespace

void gather_rows(const void* x, Index index, void* out, int64_t M, int64_t H, Float type, Parallel parallel) {
    with_types(type, index.type, [&](auto element, auto position) {
        using E = decltype(element);
        using I = decltype(position);
        gather(static_cast<const E*>(x), static_cast<const I*>(index.data), static_cast<E*>(out), M, H, parallel);
    });
}

void spread_rows(const void* x, Index index, const void* owners, const void* weights, const void* y, void* out,
                 void* dots, int64_t T, int64_t K, int64_t R, int64_t H, Float type, Parallel parallel) {
    with_types(type, index.type, [&](auto element, auto position) {
        using E = decltype(element);
        using I = decltype(position);
        spread(static_cast<const E*>(x), static_cast<const I*>(index.data), static_cast<const I*>(owners),
               static_cast<const Accumulator<E>*>(weights), static_cast<const E*>(y), static_cast<E*>(out),
               static_cast<Accumulator<E>*>(dots), T, K, R, H, parallel);
    });
}

void sum_rows(const void* y, Index index, const int64_t* offsets, const void* weights, void* out, int64_t T, int64_t K,
              int64_t H, Float type, Parallel parallel) {
    with_types(type, index.type, [&](auto element, auto position) {
        using E = decltype(element);
        using I = decltype(position);
        sum(static_cast<const E*>(y), static_cast<const I*>(index.data), offsets,
            static_cast<const Accumulator<E>*>(weights), static_cast<E*>(out), T, K, H, parallel);
    });
}

void dot_rows(const void* y, Index index, const void* x, void* dots, int64_t T, int64_t K, int64_t H, Float type,
              Parallel parallel) {
    with_types(type, index.type, [&](auto element, auto position) {
        using E = decltype(element);
        using I = decltype(position);
        dot(static_cast<const E*>(y), static_cast<const I*>(index.data), static_cast<const E*>(x),
            static_cast<Accumulator<E>*>(dots), T, K, H, parallel);
    });
}

const char* instruction_set() {
#if XMOE_X86
    return level() == Level::avx512 ? "AVX-512" : level() == Level::avx2 ? "AVX2" : "SSE2";
#elif defined(__aarch64__)
    return "NEON";
#else
    return "the compiler's default";
#endif
}

}  // namespace xmoe::cpu
