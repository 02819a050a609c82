// Element types of rows and indices at the kernels' interfaces.
#pragma once

#include <cstdint>

namespace xmoe {

enum class Float { f32, bf16, f16, f64 };
enum class Int { i32, i64 };

// A contiguous array of indices.
struct Index {
    const void* data;
    Int type;
};

}  // namespace xmoe
