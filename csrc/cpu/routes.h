// Routing metadata on the CPU: what ../routes.h describes, with the caller's parallel loop in place of a stream.
#pragma once

#include "../routes.h"
#include "parallel.h"

namespace xmoe::cpu {

// Returns false, with `routes` unspecified, when an id is not below E.
bool build_routes(Index ids, const void* weights, Float weight_type, int64_t T, int64_t K, int64_t E, int64_t capacity,
                  bool by_weight, Routes routes, Parallel parallel);

void choices_of_map(const bool* map, const void* probs, Float type, Choices choices, int64_t T, int64_t K, int64_t E,
                    Parallel parallel);

void gradient_of_map(const void* grad, Float type, const int32_t* inverse, const int32_t* ids, void* result, int64_t T,
                     int64_t K, int64_t E, Parallel parallel);

// The counts must be at least 0 and sum to the number of rows.
void merge_order(const int64_t* counts, int32_t* to_expert_order, int32_t* to_arrival_order, int64_t G, int64_t E);

}  // namespace xmoe::cpu
