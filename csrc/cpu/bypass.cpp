// Index arithmetic of redundancy bypassing on the CPU, with the caller's parallel loop in place of a stream.
#include <algorithm>
#include <vector>

#include "../bypass_items.h"
#include "parallel.h"

namespace xmoe {
namespace {

using Stream = cpu::Parallel;
constexpr int64_t kGrain = 8192;

template <typename Item>
void run(Stream parallel, int64_t count, const Item& item) {
    parallel(count, kGrain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) item(i);
    });
}

void clear(Stream, int64_t* table, int64_t count) { std::fill(table, table + count, -1); }

}  // namespace

template <>
void number_copies(const Choice& c, Copies copies, void* scratch, Stream parallel) {
    Link* links = static_cast<Link*>(scratch);
    const int64_t grain = 1 + kGrain / c.K;
    parallel(c.T, grain, [&](int64_t begin, int64_t end) {
        std::vector<int64_t> keys(c.K);
        for (int64_t token = begin; token < end; ++token) {
            uint64_t sum = 0;
            for (int64_t k = 0; k < c.K; ++k) sum += uint64_t(c.experts[3 * expert_at(c, token * c.K + k) + 1]);
            for (int64_t k = 0; k < c.K; ++k) keys[k] = key_of(c, expert_at(c, token * c.K + k), token, sum);
            for (int64_t k = 0; k < c.K; ++k) order_route(c, keys.data(), token, int(k), copies.bins, links);
        }
    });
    std::vector<int32_t> numbers(c.T * c.K, -1);
    std::vector<int64_t> counts(c.staying + 1);
    for (int64_t entry = 0; entry < c.T * c.K; ++entry) {
        const int64_t bin = copies.bins[entry];
        if (bin < 0) continue;
        const int64_t before = counts[bin]++;
        numbers[entry] = int32_t(bin == c.staying ? entry / c.K : before);
    }
    for (int64_t i = 0; i < told_size(c); ++i)
        copies.told[i] = told_at(c, i, [&](int64_t bin) { return counts[bin]; });
    parallel(c.T, grain, [&](int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; ++token)
            for (int64_t k = 0; k < c.K; ++k)
                tell_route(c, links, numbers.data() + token * c.K, token, int(k), copies);
    });
}

}  // namespace xmoe

#include "../bypass_launch.h"
