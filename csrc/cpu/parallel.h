// How the CPU versions use threads: the caller gives the loop, so that its thread setting is obeyed.
#pragma once

#include <cstdint>
#include <functional>

namespace xmoe::cpu {

// Calls body(begin, end) on parts of 0 .. n with at least `grain` items each (the last may have fewer), on any thread.
using Parallel = void (*)(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

}  // namespace xmoe::cpu
