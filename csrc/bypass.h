// Index arithmetic of redundancy bypassing: which rows a rank sends, what it tells of them, and what it reads of what
// others tell. The functions are those of megatron_xmoe/kernels/reference_bypass.py, where tables and letters are
// explained. Bins have a table's last entry for -1. Metadata are words of 4 bytes.
#pragma once

#include "dtypes.h"

namespace xmoe {

// Routes of a token that number_copies takes on a GPU: a block compares them with each other.
constexpr int64_t kMostPerToken = 512;

// T tokens, K routes of a token, E experts, G ranks; R of the largest node; bins are 0 .. staying.
struct Choice {
    const int32_t* inverse;     // [T, K]
    const int32_t* expert_ids;  // by position in expert order
    const int64_t* experts;     // [E + 1, 3]: key, hash, multiplier
    const int64_t* bin_of;      // [G + 1]
    const int32_t* place_of;    // [G + 1]
    const int64_t* mirror;      // [G * R]
    const int64_t* tokens_per_expert;  // [E]
    int64_t T, K, E, staying, width, slots, salt;
    bool balanced;              // keys have a hash, by `salt`
};

// What a route is told of its copy, before copies are numbered; in the order of a token's keys.
struct Link {
    int32_t position;       // in expert order, -1 for none
    int32_t place;          // its copy comes from
    int16_t leader, pilot;  // columns of the first route with this copy, and with a copy on this node
};

struct Copies {
    int64_t* bins;          // [T, K]
    int32_t* number;        // [T, K]
    int32_t* pilot_number;  // [T, K]
    int32_t* words;         // [T*K]
    int64_t* told;          // [G, 2R + E / G]
};

// Tokens of a chunk, by which a GPU counts copies: of at least 512 routes, of 2048 at most; 256 chunks if that suffices.
inline int64_t tokens_of_chunk(const Choice& c) {
    const int64_t routes = (c.T * c.K + 255) / 256;
    return (routes < kMostPerToken ? kMostPerToken : routes > 2048 ? 2048 : routes) / c.K;
}
// Scratch memory that number_copies needs: links [T, K], and on a GPU int counts of each bin in each chunk.
inline int64_t copies_scratch_bytes(const Choice& c) {
    const int64_t tokens = tokens_of_chunk(c), chunks = (c.T + tokens - 1) / tokens;
    return c.T * c.K * int64_t(sizeof(Link)) + chunks * (c.staying + 1) * int64_t(sizeof(int));
}

template <typename Stream>
void number_copies(const Choice& choice, Copies copies, void* scratch, Stream stream);

template <typename Stream>
void sources_of_rows(const int64_t* bins, const int32_t* number, const int64_t* table, int64_t none, int64_t T,
                     int64_t K, int64_t rows, int64_t* sources, Stream stream);

struct Meta {
    int32_t* out;
    const int64_t* bins;  // [entries], as number and pilot_number
    const int32_t* number;
    const int32_t* pilot_number;
    const int64_t* list_out;  // [none + 1]
    const int32_t* words;     // [routes], as expert_ids
    const int32_t* weights;   // [routes, weight_words]
    const int32_t* expert_ids;
    const int64_t* routes_out;  // [G]
    int64_t none, experts_per_rank, entries, routes, weight_words;
};
template <typename Stream>
void write_meta(const Meta& meta, Stream stream);

// What arrived in segments: the i-th thing is in the segment whose end is the first above i.
struct Segments {
    const int32_t* in;
    const int64_t* ends;    // [count]
    const int64_t* begins;  // [count], less the things before the segment
    int64_t count, total;
};
struct Lists {
    const int64_t* list_rows;  // [count, 2]
    int64_t* segment;          // [total], as the others
    int32_t* number;
    int64_t* pilots;
};
template <typename Stream>
void read_lists(const Segments& from, const Lists& lists, Stream stream);

struct Records {
    const int64_t* sources;  // [count]
    const int64_t* copies;   // by copy
    int64_t width, slots, weight_words;
    int64_t* segment;  // [total], as the others
    int64_t* copy;
    int32_t* number;
    int32_t* slotted;
    int64_t* rows;
    int32_t* weights;  // [total, weight_words]
};
template <typename Stream>
void read_routes(const Segments& from, const Records& records, Stream stream);

template <typename Stream>
void routes_of_rows(const int64_t* copy, const int32_t* slotted, const int64_t* copies, int64_t total, int64_t rows,
                    int64_t slots, int64_t* table, Stream stream);

struct Forwarded {
    const int64_t* segment;  // [total]
    const int32_t* number;   // [total]
    const int64_t* list_rows;
    int64_t total;
};
template <typename Stream>
void parts_of_sums(const Forwarded& forwarded, int64_t first, int64_t rows, int64_t members, int64_t local,
                   int64_t* table, Stream stream);

// Weights among the bytes of rows, of `size` bytes each.
template <typename Stream>
void write_weights(uint8_t* bytes, const int64_t* segment, const uint8_t* weights, const int64_t* begins, int64_t total,
                   int64_t size, Stream stream);
template <typename Stream>
void read_weights(const uint8_t* bytes, const int32_t* expert_ids, const int64_t* begins, int64_t experts_per_rank,
                  int64_t total, uint8_t* weights, int64_t size, Stream stream);

}  // namespace xmoe
