// Row elements on the CPU: their bits, their accumulator and the exact conversions, free of branches so that compilers
// vectorise loops over them.
#pragma once

#include <cstdint>
#include <cstring>

#include "../dtypes.h"

namespace xmoe::cpu {

struct BFloat16 {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};

// Calls f with a value of the C++ type that `type` names.
template <typename F>
auto for_float(Float type, F&& f) {
    switch (type) {
        case Float::f32: return f(float{});
        case Float::bf16: return f(BFloat16{});
        case Float::f16: return f(Half{});
        default: return f(double{});
    }
}

template <typename T>
struct AccumulatorOf {
    using type = float;
};
template <>
struct AccumulatorOf<double> {
    using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float load(float x) { return x; }
inline double load(double x) { return x; }
inline float load(BFloat16 x) { return float_of(uint32_t(x.bits) << 16); }

// The half's exponent and mantissa, read as a float, are 2^112 too small; infinity and NaN need the full exponent.
inline float load(Half x) {
    const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
    const uint32_t finite = bits_of(float_of(magnitude) * 0x1p112f);
    const uint32_t special = magnitude | 0x7f800000u;
    return float_of((magnitude < 0x0f800000u ? finite : special) | uint32_t(x.bits & 0x8000) << 16);
}

inline void store(float* to, float x) { *to = x; }
inline void store(double* to, double x) { *to = x; }

// Round to nearest, ties to even; a NaN stays one.
inline void store(BFloat16* to, float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    to->bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
inline void store(Half* to, float x) {
    const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffffu;
    // adding 0.5 leaves the unit of a subnormal half, 2^-24, in the float's last place, rounded as it must be
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // from 65520 on: infinity
    half = magnitude > 0x7f800000u ? 0x7e00u : half;
    to->bits = uint16_t(half | (bits >> 16 & 0x8000u));
}

}  // namespace xmoe::cpu
