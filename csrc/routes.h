// Routing metadata of a padding-free buffer by a stable counting sort: order expert, then token, then choice.
#pragma once

#include "dtypes.h"

namespace xmoe {

struct Routes {
    int32_t* token_ids;          // [T*K], -1 after the last kept route
    int32_t* expert_ids;         // [T*K], -1 after the last kept route
    int64_t* tokens_per_expert;  // [E], kept routes
    void* combine_weights;       // [T*K] in the weights' type, 0 after the last kept route
    int32_t* inverse;            // [T, K] position of each choice in the arrays above, -1 where it was dropped
};

struct Choices {
    int32_t* ids;   // [T, K], filled up with -1
    void* weights;  // [T, K] in the type of probs, filled up with 0
};

// Bytes of scratch memory that build_routes needs on a GPU.
int64_t routes_scratch_bytes(int64_t T, int64_t K, int64_t E, bool by_weight);

// Most experts that build_routes takes on a GPU, and most counts (G * E) for merge_order: their counters fit into
// 48 KB of shared memory.
constexpr int64_t kMaxExperts = 2048;

// ids [T, K]: expert of each choice, negative for none; weights [T, K]. T*K < 2^31.
// capacity < 0 keeps all; otherwise an expert keeps at most that many: the earliest choices, or (by_weight) those of
// largest weight, the earliest among equals.
template <typename Stream>
void build_routes(Index ids, const void* weights, Float weight_type, int64_t T, int64_t K, int64_t E, int64_t capacity,
                  bool by_weight, Routes routes, void* scratch, Stream stream);
// Nothing is written when T*K is 0: the caller clears tokens_per_expert then.

// The first K experts of each row of a boolean map [T, E], ascending, and their probs [T, E].
template <typename Stream>
void choices_of_map(const bool* map, const void* probs, Float type, Choices choices, int64_t T, int64_t K, int64_t E,
                    Stream stream);

// The gradient [T, E] of probs: grad[inverse[t, k]] at ids[t, k], 0 elsewhere. ids [T, K] as choices_of_map gives them,
// inverse [T, K] as build_routes does.
template <typename Stream>
void gradient_of_map(const void* grad, Float type, const int32_t* inverse, const int32_t* ids, void* result, int64_t T,
                     int64_t K, int64_t E, Stream stream);

// Rows that arrive ordered (source, expert) and are wanted as (expert, source): counts [G, E] int64 with sum M.
//   to_expert_order[p] = arrival position of the row at expert-major position p; to_arrival_order is its inverse. [M]
template <typename Stream>
void merge_order(const int64_t* counts, int32_t* to_expert_order, int32_t* to_arrival_order, int64_t G, int64_t E,
                 int64_t M, Stream stream);

}  // namespace xmoe
