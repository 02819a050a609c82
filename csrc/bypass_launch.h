// The operations of bypass.h out of their items, for whoever has run(stream, count, item), which calls item(i) for
// every i below count, and clear(stream, table, count), which makes it -1. bypass.cu and cpu/bypass.cpp have.
#pragma once

#include "bypass_items.h"

namespace xmoe {

template <>
void sources_of_rows(const int64_t* bins, const int32_t* number, const int64_t* table, int64_t none, int64_t T,
                     int64_t K, int64_t rows, int64_t* sources, Stream stream) {
    clear(stream, sources, rows);
    run(stream, T * K, SourceItem{bins, number, table, none, K, rows - 1, sources});
}

template <>
void write_meta(const Meta& meta, Stream stream) {
    run(stream, meta.entries, MetaItem{meta});
}

template <>
void read_lists(const Segments& from, const Lists& lists, Stream stream) {
    run(stream, from.total, ListItem{from, lists});
}

template <>
void read_routes(const Segments& from, const Records& records, Stream stream) {
    run(stream, from.total, RecordItem{from, records});
}

template <>
void routes_of_rows(const int64_t* copy, const int32_t* slotted, const int64_t* copies, int64_t total, int64_t rows,
                    int64_t slots, int64_t* table, Stream stream) {
    clear(stream, table, rows * slots);
    run(stream, total, RouteItem{copy, slotted, copies, slots, table});
}

template <>
void parts_of_sums(const Forwarded& forwarded, int64_t first, int64_t rows, int64_t members, int64_t local,
                   int64_t* table, Stream stream) {
    clear(stream, table, rows * members);
    const int64_t items = rows < forwarded.total ? forwarded.total : rows;
    run(stream, items, PartItem{forwarded, first, rows, members, local, table});
}

template <>
void write_weights(uint8_t* bytes, const int64_t* segment, const uint8_t* weights, const int64_t* begins, int64_t total,
                   int64_t size, Stream stream) {
    run(stream, total, WriteWeightItem{bytes, segment, weights, begins, size});
}

template <>
void read_weights(const uint8_t* bytes, const int32_t* expert_ids, const int64_t* begins, int64_t experts_per_rank,
                  int64_t total, uint8_t* weights, int64_t size, Stream stream) {
    run(stream, total, ReadWeightItem{bytes, expert_ids, begins, experts_per_rank, weights, size});
}

}  // namespace xmoe
