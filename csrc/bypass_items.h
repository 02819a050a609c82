// One item of each operation in bypass.h, the same for a thread of a GPU and for a turn of a loop on the CPU.
#pragma once

#include "bypass.h"

#if defined(__CUDACC__) || defined(__HIPCC__)
#define XMOE_ITEM __host__ __device__ inline
#else
#define XMOE_ITEM inline
#endif

namespace xmoe {

constexpr int kNodeBit = 47, kRankBits = 16;  // of a key: node above, rank below; the 31 bits between are a hash
constexpr int64_t kNodeBelow = (int64_t(1) << kNodeBit) - 1, kRank = (int64_t(1) << kRankBits) - 1;
constexpr uint64_t kWeyl = 0x9E3779B97F4A7C15u;
constexpr int64_t kNowhere = int64_t(1) << 59;  // FAR is twice as much, and numbers are added to it

// The expert of a route, E for none.
XMOE_ITEM int64_t expert_at(const Choice& c, int64_t route) {
    const int32_t position = c.inverse[route];
    return position < 0 ? c.E : c.expert_ids[position];
}

// A route's key; `sum` adds up the hashes of all experts of the token.
XMOE_ITEM int64_t key_of(const Choice& c, int64_t expert, int64_t token, uint64_t sum) {
    const int64_t key = c.experts[3 * expert];
    if (!c.balanced) return key;
    const uint64_t mixed = sum + (uint64_t(c.salt) + uint64_t(token)) * kWeyl;
    const uint64_t folded = mixed ^ uint64_t(int64_t(mixed) >> 32);
    return key | int64_t(folded * uint64_t(c.experts[3 * expert + 2]) & uint64_t(kNodeBelow - kRank));
}

// Puts the k-th route of a token in the order of the token's keys; returns the bin of its copy.
XMOE_ITEM int64_t order_route(const Choice& c, const int64_t* keys, int64_t token, int k, int64_t* bins, Link* links) {
    const int64_t key = keys[k], node = key & ~kNodeBelow;
    int leader = 0, slot = 0, pilot = 0;
    int64_t first = key;  // of the node
    for (int j = 0; j < int(c.K); ++j) {
        const int64_t other = keys[j];
        leader += other < key;
        slot += other == key && j < k;
        pilot += other < node;
        if (other >= node && other < first) first = other;
    }
    const int64_t via = first & kRank, bin = slot ? -1 : c.bin_of[key & kRank] + via * c.width;
    const int64_t target = token * c.K + leader + slot;
    bins[target] = bin;
    links[target] = {c.inverse[token * c.K + k], c.place_of[via], int16_t(leader), int16_t(pilot)};
    return bin;
}

// Writes what depends on the numbers [K] of a token's copies, for the k-th in order.
XMOE_ITEM void tell_route(const Choice& c, const Link* links, const int32_t* numbers, int64_t token, int k,
                          const Copies& copies) {
    const int64_t entry = token * c.K + k;
    const Link link = links[entry];
    copies.number[entry] = numbers[k];
    copies.pilot_number[entry] = numbers[link.pilot];
    if (link.position < 0) return;
    const int64_t copy = numbers[link.leader] * c.width + link.place;
    copies.words[link.position] = int32_t(copy * c.slots + k - link.leader);
}

// Numbers of `told`, and the i-th of them; count(bin) gives the copies in a bin.
XMOE_ITEM int64_t told_size(const Choice& c) { return 2 * c.staying + c.E; }
template <typename Count>
XMOE_ITEM int64_t told_at(const Choice& c, int64_t i, Count count) {
    const int64_t ranks = c.staying / c.width, local = c.E / ranks, columns = 2 * c.width + local;
    const int64_t rank = i / columns, column = i % columns, bin = rank * c.width + column;
    if (column < c.width) return count(bin);
    if (column < 2 * c.width) return count(c.mirror[bin - c.width]);
    return c.tokens_per_expert[rank * local + column - 2 * c.width];
}

template <typename T>
XMOE_ITEM void copy_all(const T* from, T* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

// The first segment that ends above i.
XMOE_ITEM int64_t segment_of(const Segments& from, int64_t i) {
    int64_t low = 0, high = from.count;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (from.ends[middle] <= i)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

struct SourceItem {
    const int64_t* bins;
    const int32_t* number;
    const int64_t* table;
    int64_t none, K, last;
    int64_t* sources;

    XMOE_ITEM void operator()(int64_t i) const {
        const int64_t row = table[bins[i] < 0 ? none : bins[i]] + number[i];
        if (row < last) sources[row] = i / K;
    }
};

struct MetaItem {
    Meta m;

    XMOE_ITEM void operator()(int64_t i) const {
        const int64_t first = m.list_out[m.bins[i] < 0 ? m.none : m.bins[i]];
        if (first < kNowhere) m.out[first + m.number[i]] = m.pilot_number[i];
        if (i >= m.routes) return;
        int32_t* at = m.out + m.routes_out[m.expert_ids[i] / m.experts_per_rank] + i * (1 + m.weight_words);
        at[0] = m.words[i];
        copy_all(m.weights + i * m.weight_words, at + 1, m.weight_words);
    }
};

struct ListItem {
    Segments from;
    Lists lists;

    XMOE_ITEM void operator()(int64_t i) const {
        const int64_t segment = segment_of(from, i);
        const int32_t number = from.in[from.begins[segment] + i];
        lists.segment[i] = segment;
        lists.number[i] = number;
        lists.pilots[i] = lists.list_rows[2 * segment] + number;
    }
};

struct RecordItem {
    Segments from;
    Records r;

    XMOE_ITEM void operator()(int64_t i) const {
        const int64_t segment = segment_of(from, i);
        const int32_t* at = from.in + from.begins[segment] + i * (1 + r.weight_words);
        const int32_t word = at[0], slots = int32_t(r.slots), width = int32_t(r.width);
        const int32_t whole = word / slots, number = whole / width;
        const int64_t copy = r.sources[segment] + whole % width;
        r.segment[i] = segment;
        r.copy[i] = copy;
        r.number[i] = number;
        r.slotted[i] = number * slots + word % slots;
        r.rows[i] = r.copies[copy] + number;
        copy_all(at + 1, r.weights + i * r.weight_words, r.weight_words);
    }
};

struct RouteItem {
    const int64_t* copy;
    const int32_t* slotted;
    const int64_t* copies;
    int64_t slots;
    int64_t* table;

    XMOE_ITEM void operator()(int64_t i) const { table[copies[copy[i]] * slots + slotted[i]] = i; }
};

struct PartItem {
    Forwarded forwarded;
    int64_t first, rows, members, local;
    int64_t* table;

    XMOE_ITEM void operator()(int64_t i) const {
        if (i < rows) table[i * members + local] = first + i;
        if (i >= forwarded.total) return;
        const int64_t part = forwarded.list_rows[2 * forwarded.segment[i] + 1];
        table[part + forwarded.number[i] * members] = first + rows + i;
    }
};

struct WriteWeightItem {
    uint8_t* bytes;
    const int64_t* segment;
    const uint8_t* weights;
    const int64_t* begins;
    int64_t size;

    XMOE_ITEM void operator()(int64_t i) const {
        copy_all(weights + i * size, bytes + begins[segment[i]] + i * size, size);
    }
};

struct ReadWeightItem {
    const uint8_t* bytes;
    const int32_t* expert_ids;
    const int64_t* begins;
    int64_t experts_per_rank;
    uint8_t* weights;
    int64_t size;

    XMOE_ITEM void operator()(int64_t i) const {
        copy_all(bytes + begins[expert_ids[i] / experts_per_rank] + i * size, weights + i * size, size);
    }
};

}  // namespace xmoe
