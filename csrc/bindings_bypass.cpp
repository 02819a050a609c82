// Redundancy bypassing's index arithmetic as functions on torch tensors, see bindings.cpp. The callers make all indices
// and tables, so their values are not checked. Types are: these are raw pointers to numbers of a certain size.
#include <torch/csrc/utils/pybind.h>

#include <tuple>

#include "arguments.h"
#include "bypass.h"
#include "cpu/parallel.h"

namespace {

using at::Tensor;
using xmoe::check;
using xmoe::require;

const int64_t* longs(const char* name, const Tensor& x, int64_t dim, const Tensor& first) {
    check(name, x, dim, first);
    TORCH_CHECK_VALUE(x.scalar_type() == at::kLong, name, " has dtype ", x.scalar_type(), "; it must be int64");
    return x.const_data_ptr<int64_t>();
}

const int32_t* ints(const char* name, const Tensor& x, int64_t dim, const Tensor& first) {
    check(name, x, dim, first);
    TORCH_CHECK_VALUE(x.scalar_type() == at::kInt, name, " has dtype ", x.scalar_type(), "; it must be int32");
    return x.const_data_ptr<int32_t>();
}

Tensor new_longs(at::IntArrayRef sizes, const Tensor& like) { return at::empty(sizes, like.options().dtype(at::kLong)); }
Tensor new_ints(at::IntArrayRef sizes, const Tensor& like) { return at::empty(sizes, like.options().dtype(at::kInt)); }

// Calls body(stream) with the caller's loop for the CPU, or the GPU's stream.
template <typename Body>
void on_device(const Tensor& first, int64_t stream, Body body) {
    const xmoe::cpu::Parallel loop = xmoe::parallel;
    xmoe::launch(first, stream, [&] { body(loop); }, body);
}

const uint8_t* bytes_of(const char* name, const Tensor& x, const Tensor& first) {
    check(name, x, 1, first);
    TORCH_CHECK_VALUE(x.scalar_type() == at::kByte, name, " has dtype ", x.scalar_type(), "; it must be uint8");
    return x.const_data_ptr<uint8_t>();
}

int64_t weight_words(int64_t weight_bytes) {
    require("weights must be of 4 or 8 bytes", weight_bytes == 4 || weight_bytes == 8);
    return weight_bytes / 4;
}

Tensor new_weights(int64_t total, int64_t weight_bytes, const Tensor& like) {
    return at::empty({total}, like.options().dtype(weight_bytes == 8 ? at::kDouble : at::kFloat));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> number_copies(
    const Tensor& inverse, const Tensor& expert_ids, const Tensor& experts, const Tensor& bin_of,
    const Tensor& place_of, const Tensor& mirror, const Tensor& tokens_per_expert, int64_t width, int64_t slots,
    std::optional<int64_t> salt, int64_t stream) {
    const int64_t T = inverse.size(0), K = inverse.size(1), G = bin_of.size(0) - 1, E = experts.size(0) - 1;
    const xmoe::Choice choice{ints("inverse", inverse, 2, inverse), ints("expert_ids", expert_ids, 1, inverse),
                              longs("experts", experts, 2, inverse), longs("bin_of", bin_of, 1, inverse),
                              ints("place_of", place_of, 1, inverse), longs("mirror", mirror, 1, inverse),
                              longs("tokens_per_expert", tokens_per_expert, 1, inverse), T, K, E, G * width, width,
                              slots, salt.value_or(0), salt.has_value()};
    require("a token has too many routes", K <= xmoe::kMostPerToken);
    Tensor bins = new_longs({T, K}, inverse), number = at::empty_like(inverse), pilot_number = at::empty_like(inverse);
    Tensor words = new_ints({T * K}, inverse), told = new_longs({2, G, 2 * width + E / G}, inverse);
    if (T * K == 0) return {bins, number, pilot_number, words, told.zero_()};
    const xmoe::Copies copies{bins.data_ptr<int64_t>(), number.data_ptr<int32_t>(), pilot_number.data_ptr<int32_t>(),
                              words.data_ptr<int32_t>(), told.data_ptr<int64_t>()};
    Tensor scratch = at::empty({xmoe::copies_scratch_bytes(choice)}, inverse.options().dtype(at::kByte));
    on_device(inverse, stream, [&](auto s) { xmoe::number_copies(choice, copies, scratch.data_ptr(), s); });
    return {bins, number, pilot_number, words, told};
}

Tensor sources_of_rows(const Tensor& bins, const Tensor& number, const Tensor& table, int64_t rows, int64_t stream) {
    const int64_t* of = longs("bins", bins, 2, bins);
    const int32_t* at = ints("number", number, 2, bins);
    const int64_t* first = longs("table", table, 1, bins);
    Tensor sources = new_longs({rows}, bins);
    on_device(bins, stream, [&](auto s) {
        xmoe::sources_of_rows(of, at, first, table.size(0) - 1, bins.size(0), bins.size(1), rows,
                              sources.data_ptr<int64_t>(), s);
    });
    return sources;
}

void write_meta(const Tensor& meta, const Tensor& bins, const Tensor& number, const Tensor& pilot_number,
                const Tensor& list_out, const Tensor& words, const Tensor& weights, const Tensor& expert_ids,
                const Tensor& routes_out, int64_t experts_per_rank, int64_t stream) {
    check("weights", weights, 1, meta);
    require("there must be an expert and a word for each weight",
            expert_ids.size(0) >= weights.size(0) && words.size(0) >= weights.size(0));
    ints("meta", meta, 1, meta);
    const xmoe::Meta written{meta.data_ptr<int32_t>(), longs("bins", bins, 2, meta), ints("number", number, 2, meta),
                             ints("pilot_number", pilot_number, 2, meta), longs("list_out", list_out, 1, meta),
                             ints("words", words, 1, meta), static_cast<const int32_t*>(weights.const_data_ptr()),
                             ints("expert_ids", expert_ids, 1, meta), longs("routes_out", routes_out, 1, meta),
                             list_out.size(0) - 1, experts_per_rank, bins.numel(), weights.size(0),
                             weight_words(weights.element_size())};
    on_device(meta, stream, [&](auto s) { xmoe::write_meta(written, s); });
}

xmoe::Segments segments(const Tensor& meta, const Tensor& ends, const Tensor& begins, int64_t total) {
    return {ints("meta", meta, 1, meta), longs("ends", ends, 1, meta), longs("begins", begins, 1, meta), ends.size(0),
            total};
}

std::tuple<Tensor, Tensor, Tensor> read_lists(const Tensor& meta, const Tensor& ends, const Tensor& list_in,
                                              const Tensor& list_rows, int64_t total, int64_t stream) {
    const xmoe::Segments from = segments(meta, ends, list_in, total);
    Tensor segment = new_longs({total}, meta), number = new_ints({total}, meta), pilots = new_longs({total}, meta);
    const xmoe::Lists lists{longs("list_rows", list_rows, 2, meta), segment.data_ptr<int64_t>(),
                            number.data_ptr<int32_t>(), pilots.data_ptr<int64_t>()};
    on_device(meta, stream, [&](auto s) { xmoe::read_lists(from, lists, s); });
    return {segment, number, pilots};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> read_routes(
    const Tensor& meta, const Tensor& ends, const Tensor& routes_in, const Tensor& sources, const Tensor& copies,
    int64_t total, int64_t width, int64_t slots, int64_t weight_bytes, int64_t stream) {
    const xmoe::Segments from = segments(meta, ends, routes_in, total);
    Tensor segment = new_longs({total}, meta), copy = new_longs({total}, meta), rows = new_longs({total}, meta);
    Tensor number = new_ints({total}, meta), slotted = new_ints({total}, meta);
    Tensor weights = new_weights(total, weight_bytes, meta);
    const xmoe::Records records{longs("sources", sources, 1, meta), longs("copies", copies, 1, meta), width, slots,
                                weight_words(weight_bytes), segment.data_ptr<int64_t>(), copy.data_ptr<int64_t>(),
                                number.data_ptr<int32_t>(), slotted.data_ptr<int32_t>(), rows.data_ptr<int64_t>(),
                                static_cast<int32_t*>(weights.data_ptr())};
    on_device(meta, stream, [&](auto s) { xmoe::read_routes(from, records, s); });
    return {segment, copy, number, slotted, rows, weights};
}

Tensor routes_of_rows(const Tensor& copy, const Tensor& slotted, const Tensor& copies, int64_t rows, int64_t slots,
                      int64_t stream) {
    const int64_t *of = longs("copy", copy, 1, copy), *first = longs("copies", copies, 1, copy);
    const int32_t* at = ints("slotted", slotted, 1, copy);
    Tensor table = new_longs({rows, slots}, copy);
    on_device(copy, stream, [&](auto s) {
        xmoe::routes_of_rows(of, at, first, copy.size(0), rows, slots, table.data_ptr<int64_t>(), s);
    });
    return table;
}

Tensor parts_of_sums(const Tensor& segment, const Tensor& number, const Tensor& list_rows, int64_t first, int64_t rows,
                     int64_t members, int64_t local, int64_t stream) {
    const xmoe::Forwarded of{longs("segment", segment, 1, segment), ints("number", number, 1, segment),
                             longs("list_rows", list_rows, 2, segment), segment.size(0)};
    Tensor table = new_longs({rows, members}, segment);
    on_device(segment, stream, [&](auto s) {
        xmoe::parts_of_sums(of, first, rows, members, local, table.data_ptr<int64_t>(), s);
    });
    return table;
}

void write_weights(const Tensor& bytes, const Tensor& segment, const Tensor& weights, const Tensor& begins,
                   int64_t stream) {
    check("weights", weights, 1, bytes);
    bytes_of("bytes", bytes, bytes);
    const int64_t size = 4 * weight_words(weights.element_size());
    const int64_t *at = longs("segment", segment, 1, bytes), *first = longs("begins", begins, 1, bytes);
    const auto* from = static_cast<const uint8_t*>(weights.const_data_ptr());
    on_device(bytes, stream, [&](auto s) {
        xmoe::write_weights(bytes.data_ptr<uint8_t>(), at, from, first, segment.size(0), size, s);
    });
}

Tensor read_weights(const Tensor& bytes, const Tensor& expert_ids, const Tensor& begins, int64_t experts_per_rank,
                    int64_t weight_bytes, int64_t stream) {
    const uint8_t* from = bytes_of("bytes", bytes, bytes);
    const int32_t* experts = ints("expert_ids", expert_ids, 1, bytes);
    const int64_t *first = longs("begins", begins, 1, bytes), size = 4 * weight_words(weight_bytes);
    const int64_t total = expert_ids.size(0);
    Tensor weights = new_weights(total, weight_bytes, bytes);
    auto* to = static_cast<uint8_t*>(weights.data_ptr());
    on_device(bytes, stream,
              [&](auto s) { xmoe::read_weights(from, experts, first, experts_per_rank, total, to, size, s); });
    return weights;
}

}  // namespace

void define_bypass(pybind11::module_& m) {
    const auto released = pybind11::call_guard<pybind11::gil_scoped_release>();
    m.def("number_copies", &number_copies, released);
    m.def("sources_of_rows", &sources_of_rows, released);
    m.def("write_meta", &write_meta, released);
    m.def("read_lists", &read_lists, released);
    m.def("read_routes", &read_routes, released);
    m.def("routes_of_rows", &routes_of_rows, released);
    m.def("parts_of_sums", &parts_of_sums, released);
    m.def("write_weights", &write_weights, released);
    m.def("read_weights", &read_weights, released);
}
