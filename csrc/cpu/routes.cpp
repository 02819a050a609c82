#include "routes.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "elements.h"

namespace xmoe::cpu {
namespace {

// A counting sort of the choices by expert. The choices are counted in chunks whose size does not depend on the number
// of threads; a choice's rank is the number of earlier choices of the same expert.
template <typename I>
class Sort {
public:
    Sort(const I* ids, int64_t count, int64_t E, Parallel parallel)
        : ids_(ids), count_(count), E_(E), chunk_(std::max<int64_t>(8192, 4 * E)), parallel_(parallel),
          chunks_((count + chunk_ - 1) / chunk_), ranks_(chunks_ * E), totals_(E) {}

    // Fills totals(); false when an id is not below E.
    bool count() {
        std::atomic<bool> valid{true};
        parallel_(chunks_, 1, [&](int64_t begin, int64_t end) {
            for (int64_t c = begin; c < end; ++c) {
                int64_t* counts = ranks_.data() + c * E_;
                for (int64_t p = c * chunk_; p < std::min(count_, (c + 1) * chunk_); ++p) {
                    if (ids_[p] >= E_) valid = false;
                    if (ids_[p] >= 0 && ids_[p] < E_) ++counts[ids_[p]];
                }
            }
        });
        for (int64_t c = 0; c < chunks_; ++c)
            for (int64_t e = 0; e < E_; ++e) {
                const int64_t counted = ranks_[c * E_ + e];
                ranks_[c * E_ + e] = totals_[e];
                totals_[e] += counted;
            }
        return valid;
    }

    const std::vector<int64_t>& totals() const { return totals_; }

    // Calls visit(choice, expert, rank) for every choice, expert -1 for none; count() comes before, once.
    template <typename Visit>
    void visit(Visit visit) {
        parallel_(chunks_, 1, [&](int64_t begin, int64_t end) {
            for (int64_t c = begin; c < end; ++c) {
                int64_t* ranks = ranks_.data() + c * E_;
                for (int64_t p = c * chunk_; p < std::min(count_, (c + 1) * chunk_); ++p) {
                    const int64_t e = ids_[p];
                    visit(p, e < 0 ? -1 : e, e < 0 ? 0 : ranks[e]++);
                }
            }
        });
    }

private:
    const I* ids_;
    int64_t count_, E_, chunk_;
    Parallel parallel_;
    int64_t chunks_;
    std::vector<int64_t> ranks_;  // [chunks, E] of a chunk's first choice of each expert
    std::vector<int64_t> totals_;
};

std::vector<int64_t> starts_of(const std::vector<int64_t>& counts) {
    std::vector<int64_t> starts(counts.size() + 1);
    for (size_t e = 0; e < counts.size(); ++e) starts[e + 1] = starts[e] + counts[e];
    return starts;
}

// Moves the `kept` choices of largest weight to the front, in ascending order. The earliest among equals win; a NaN
// counts as the largest weight, as in torch's sort.
template <typename W>
void keep_largest(int32_t* choices, int64_t count, int64_t kept, const W* weights) {
    const auto before = [=](int32_t a, int32_t b) {
        const auto first = load(weights[a]), second = load(weights[b]);
        const bool first_nan = std::isnan(first), second_nan = std::isnan(second);
        if (first_nan != second_nan) return first_nan;
        return first > second || (!(first < second) && a < b);
    };
    std::nth_element(choices, choices + kept, choices + count, before);
    std::sort(choices, choices + kept);
}

template <typename I, typename W>
bool build(const I* ids, const W* weights, int64_t T, int64_t K, int64_t E, int64_t capacity, bool by_weight,
           Routes routes, Parallel parallel) {
    const int64_t count = T * K;
    Sort<I> sort(ids, count, E, parallel);
    if (!sort.count()) return false;
    std::vector<int64_t> kept = sort.totals();
    if (capacity >= 0)
        for (int64_t& n : kept) n = std::min(n, capacity);
    const std::vector<int64_t> starts = starts_of(kept);
    std::copy(kept.begin(), kept.end(), routes.tokens_per_expert);

    W* combine_weights = static_cast<W*>(routes.combine_weights);
    const auto put = [=](int64_t position, int64_t choice, int64_t expert) {
        routes.token_ids[position] = int32_t(choice / K);
        routes.expert_ids[position] = int32_t(expert);
        combine_weights[position] = weights[choice];
        routes.inverse[choice] = int32_t(position);
    };
    if (!by_weight || kept == sort.totals()) {
        sort.visit([&](int64_t choice, int64_t expert, int64_t rank) {
            if (expert >= 0 && rank < kept[expert])
                put(starts[expert] + rank, choice, expert);
            else
                routes.inverse[choice] = -1;
        });
    } else {
        const std::vector<int64_t> all_starts = starts_of(sort.totals());
        std::vector<int32_t> choices(all_starts[E]);
        sort.visit([&](int64_t choice, int64_t expert, int64_t rank) {
            routes.inverse[choice] = -1;
            if (expert >= 0) choices[all_starts[expert] + rank] = int32_t(choice);
        });
        parallel(E, 1, [&](int64_t begin, int64_t end) {
            for (int64_t e = begin; e < end; ++e) {
                int32_t* of_expert = choices.data() + all_starts[e];
                const int64_t total = all_starts[e + 1] - all_starts[e];
                if (kept[e] < total) keep_largest(of_expert, total, kept[e], weights);
                for (int64_t i = 0; i < kept[e]; ++i) put(starts[e] + i, of_expert[i], e);
            }
        });
    }
    std::fill(routes.token_ids + starts[E], routes.token_ids + count, -1);
    std::fill(routes.expert_ids + starts[E], routes.expert_ids + count, -1);
    std::fill(combine_weights + starts[E], combine_weights + count, W{});
    return true;
}

// Tokens with rows of E elements that a thread takes at least.
int64_t tokens_of_thread(int64_t E) { return 1 + 16384 / (E + 1); }

}  // namespace

bool build_routes(Index ids, const void* weights, Float weight_type, int64_t T, int64_t K, int64_t E, int64_t capacity,
                  bool by_weight, Routes routes, Parallel parallel) {
    return for_float(weight_type, [&](auto weight) {
        const auto* typed = static_cast<const decltype(weight)*>(weights);
        if (ids.type == Int::i32)
            return build(static_cast<const int32_t*>(ids.data), typed, T, K, E, capacity, by_weight, routes, parallel);
        return build(static_cast<const int64_t*>(ids.data), typed, T, K, E, capacity, by_weight, routes, parallel);
    });
}

void choices_of_map(const bool* map, const void* probs, Float type, Choices choices, int64_t T, int64_t K, int64_t E,
                    Parallel parallel) {
    for_float(type, [&](auto weight) {
        using W = decltype(weight);
        const W* in = static_cast<const W*>(probs);
        int32_t* ids = choices.ids;
        W* weights = static_cast<W*>(choices.weights);
        parallel(T, tokens_of_thread(E), [=](int64_t begin, int64_t end) {
            for (int64_t t = begin; t < end; ++t) {
                const bool *row = map + t * E, *from = row;
                for (int64_t k = 0; k < K; ++k) {
                    const void* found = std::memchr(from, 1, row + E - from);
                    if (!found) {
                        std::fill(ids + t * K + k, ids + (t + 1) * K, -1);
                        std::fill(weights + t * K + k, weights + (t + 1) * K, W{});
                        break;
                    }
                    from = static_cast<const bool*>(found) + 1;
                    const int64_t e = from - 1 - row;
                    ids[t * K + k] = int32_t(e);
                    weights[t * K + k] = in[t * E + e];
                }
            }
        });
    });
}

void gradient_of_map(const void* grad, Float type, const int32_t* inverse, const int32_t* ids, void* result, int64_t T,
                     int64_t K, int64_t E, Parallel parallel) {
    for_float(type, [&](auto weight) {
        using W = decltype(weight);
        const W* in = static_cast<const W*>(grad);
        W* out = static_cast<W*>(result);
        parallel(T, tokens_of_thread(E), [=](int64_t begin, int64_t end) {
            for (int64_t t = begin; t < end; ++t) {
                W* row = out + t * E;
                std::fill(row, row + E, W{});
                for (int64_t route = t * K; route < (t + 1) * K; ++route)
                    if (inverse[route] >= 0 && ids[route] >= 0) row[ids[route]] = in[inverse[route]];
            }
        });
    });
}

void merge_order(const int64_t* counts, int32_t* to_expert_order, int32_t* to_arrival_order, int64_t G, int64_t E) {
    std::vector<int64_t> all(counts, counts + G * E);
    const std::vector<int64_t> arrival = starts_of(all);
    int64_t position = 0;
    for (int64_t e = 0; e < E; ++e)
        for (int64_t g = 0; g < G; ++g)
            for (int64_t row = arrival[g * E + e]; row < arrival[g * E + e + 1]; ++row) {
                to_expert_order[position] = int32_t(row);
                to_arrival_order[row] = int32_t(position++);
            }
}

}  // namespace xmoe::cpu
