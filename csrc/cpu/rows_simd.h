// Loops over the elements of rows. rows.cpp includes this once per instruction set, each time in a namespace of its
// own (hence no include guard), with XMOE_STREAM_BYTES the width of the vectors that can be stored past the caches.

// Copies `bytes` bytes. `stream`: past the caches, for results too large to be found there later.
inline void copy_bytes(void* to, const void* from, int64_t bytes, bool stream) {
    char* out = static_cast<char*>(to);
    const char* in = static_cast<const char*>(from);
#if XMOE_STREAM_BYTES
    if (stream && bytes >= 256) {
        const int64_t head = -reinterpret_cast<intptr_t>(out) & 63;
        std::memcpy(out, in, head);
        int64_t i = head;
        for (; i + 64 <= bytes; i += 64) {
#if XMOE_STREAM_BYTES == 64
            _mm512_stream_si512(reinterpret_cast<__m512i*>(out + i), _mm512_loadu_si512(in + i));
#elif XMOE_STREAM_BYTES == 32
            for (int part = 0; part < 64; part += 32) {
                const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i + part));
                _mm256_stream_si256(reinterpret_cast<__m256i*>(out + i + part), v);
            }
#else
            for (int part = 0; part < 64; part += 16) {
                const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i + part));
                _mm_stream_si128(reinterpret_cast<__m128i*>(out + i + part), v);
            }
#endif
        }
        std::memcpy(out + i, in + i, bytes - i);
        return;
    }
#endif
    (void)stream;
    std::memcpy(out, in, bytes);
}

// Orders streaming stores before what other threads do next.
inline void finish_stores() {
#if XMOE_STREAM_BYTES
    _mm_sfence();
#endif
}

// to[j] = weight * from[j], rounded to T
template <typename T>
void scale_row(T* to, const T* from, Accumulator<T> weight, int64_t H, bool stream) {
    alignas(64) T buffer[BLOCK];
    for (int64_t start = 0; start < H; start += BLOCK) {
        const int64_t n = H - start < BLOCK ? H - start : BLOCK;
        const T* in = from + start;
        for (int64_t j = 0; j < n; ++j) store(&buffer[j], weight * load(in[j]));
        copy_bytes(to + start, buffer, n * sizeof(T), stream);
    }
}

// dots[i] = rows[i] . x for four rows: side by side, because one row alone does not keep the memory busy
template <typename T>
void dot_four(const T* const* rows, const T* x, int64_t H, Accumulator<T>* dots) {
    const T *a = rows[0], *b = rows[1], *c = rows[2], *d = rows[3];
    Accumulator<T> to_a = 0, to_b = 0, to_c = 0, to_d = 0;
#pragma omp simd reduction(+ : to_a, to_b, to_c, to_d)
    for (int64_t j = 0; j < H; ++j) {
        const Accumulator<T> factor = load(x[j]);
        to_a += load(a[j]) * factor;
        to_b += load(b[j]) * factor;
        to_c += load(c[j]) * factor;
        to_d += load(d[j]) * factor;
    }
    dots[0] = to_a, dots[1] = to_b, dots[2] = to_c, dots[3] = to_d;
}

// sum[j] += weights[0] * rows[0][j] + ... one after the other. Meanwhile it asks for as many elements of `ahead` (at
// most AHEAD places), into the second cache: the processor does not foresee where rows begin. Where the last columns
// of a row are fewer than `n`, it asks past them, which does nothing worse than to fetch in vain.
template <int N, typename T>
void add_rows(Accumulator<T>* __restrict__ sum, const T* const* rows, const Accumulator<T>* weights, int64_t start,
              int64_t n, const T* const* ahead, int64_t ahead_count) {
    constexpr int64_t LINE = 64 / sizeof(T);
    const T* row[N];
    Accumulator<T> weight[N];
    for (int i = 0; i < N; ++i) row[i] = rows[i] + start, weight[i] = weights[i];
    const auto add = [&](int64_t from, int64_t to) {
#pragma GCC ivdep
        for (int64_t j = from; j < to; ++j) {
            Accumulator<T> total = sum[j];
            for (int i = 0; i < N; ++i) total += weight[i] * load(row[i][j]);
            sum[j] = total;
        }
    };
    int64_t j = 0;
    for (; j + LINE <= n; j += LINE) {
        for (int64_t i = 0; i < ahead_count; ++i) __builtin_prefetch(ahead[i] + j, 0, 2);
        add(j, j + LINE);
    }
    add(j, n);
}

// to[j] = sum over i < count of weights[i] * rows[i][j], rounded to T; `next` are the rows of the sum after this one
template <typename T>
void sum_row(T* to, const T* const* rows, const Accumulator<T>* weights, int64_t count, const T* const* next,
             int64_t next_count, int64_t H, bool stream) {
    alignas(64) Accumulator<T> sum[BLOCK];
    alignas(64) T rounded[BLOCK];
    for (int64_t start = 0; start < H; start += BLOCK) {
        const int64_t n = H - start < BLOCK ? H - start : BLOCK;
        const T* ahead[AHEAD];
        int64_t places = 0;
        const auto look_from = [&](int64_t i) {  // after row i - 1 of these columns
            const bool here = i < count, in_row = start + n < H;
            const T* const* from = here ? rows + i : in_row ? rows : next;
            const int64_t left = here ? count - i : in_row ? count : next_count;
            const int64_t column = here ? start : in_row ? start + n : 0;
            places = left < AHEAD ? left : AHEAD;
            for (int64_t a = 0; a < places; ++a) ahead[a] = from[a] + column;
        };
        const auto add = [&](auto N, int64_t i) {
            look_from(i + N);
            add_rows<N, T>(sum, rows + i, weights + i, start, n, ahead, places);
        };
        for (int64_t j = 0; j < n; ++j) sum[j] = 0;
        int64_t i = 0;
        for (; i + 4 <= count; i += 4) add(std::integral_constant<int, 4>{}, i);
        for (; i + 2 <= count; i += 2) add(std::integral_constant<int, 2>{}, i);
        for (; i < count; ++i) add(std::integral_constant<int, 1>{}, i);
        for (int64_t j = 0; j < n; ++j) store(&rounded[j], sum[j]);
        copy_bytes(to + start, rounded, n * sizeof(T), stream);
    }
}

template <typename T>
struct Loops {
    static RowLoops<T> get() { return {copy_bytes, finish_stores, scale_row<T>, dot_four<T>, sum_row<T>}; }
};
