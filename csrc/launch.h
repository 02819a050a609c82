// Host code that picks the types and shapes of a launch over rows.
#pragma once

#include <type_traits>

#include "common.h"

namespace xmoe {

// As many lanes (a power of two) as leave each of them about `each` packs of a row.
inline int lanes_for(int64_t packs, int each, int threads) {
    int lanes = 1;
    while (lanes * each < packs && lanes < threads) lanes *= 2;
    return lanes;
}
inline dim3 row_block(int64_t packs, int each, int threads) {
    const int lanes = lanes_for(packs, each, threads);
    return dim3(lanes, threads / lanes);
}

// Calls f with K as a constant where there is a kernel for it, else with 0.
template <typename F>
void for_few(int64_t K, F&& f) {
    switch (K) {
        case 1: return f(std::integral_constant<int, 1>{});
        case 2: return f(std::integral_constant<int, 2>{});
        case 4: return f(std::integral_constant<int, 4>{});
        case 6: return f(std::integral_constant<int, 6>{});
        case 8: return f(std::integral_constant<int, 8>{});
        default: return f(std::integral_constant<int, 0>{});
    }
}
// The common case, for which there are kernels for a fixed number of routes.
template <typename I, int N>
constexpr bool kCommon = sizeof(I) == 4 && N > 2;

inline bool aligned(const void* p) { return p == nullptr || reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Calls f(element, index, packed) with values of the types; packed is true where all rows are aligned to 16 bytes.
template <typename F>
void dispatch(Float type, Int index, int64_t H, bool addresses, F&& f) {
    for_float(type, [&](auto element) {
        const bool packed = addresses && H * sizeof(element) % 16 == 0;
        for_int(index, [&](auto i) {
            if (packed)
                f(element, i, std::integral_constant<int, 16 / sizeof(element)>{});
            else
                f(element, i, std::integral_constant<int, 1>{});
        });
    });
}

// Calls f(scale, dot) with constants that say which of the two are wanted.
template <typename F>
void for_wanted(bool scale, bool dot, F&& f) {
    using yes = std::true_type;
    using no = std::false_type;
    if (scale) return dot ? f(yes{}, yes{}) : f(yes{}, no{});
    return dot ? f(no{}, yes{}) : f(no{}, no{});
}

}  // namespace xmoe
