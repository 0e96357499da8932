/* AVX2: vpmaddubsw multiplies unsigned values and signed digits and adds pairs in 16 bits.
 *
 * Values of at most 4 bits leave room to add the products of many quads before they are widened. int8 is taken as two
 * values of 4 bits, one after the other.
 */
#include "window.h"

#include <immintrin.h>

#define ALWAYS static inline __attribute__((always_inline))

/* What a compiler may not see through. */
#define OPAQUE(kind, value) __asm__("" : kind(value))

/* Bytes ahead that are fetched: about the latency of memory times the rate of one core. */
#define AHEAD 4096

#define MOST_DIGITS 6 /* of all rows of a chunk: sums of 16 lanes for each of them are 12 of 16 registers */
#define QUADS(format) \
    ((format) == CQ_BINARY || (format) == CQ_INT3 ? 8 : (format) == CQ_INT4 ? 2 : (format) == CQ_INT8 ? 1 : 4)
/* Quads, of one tile, whose products stay below 2^15: each adds 2 * 128 times the greatest value, 7 or 15. */
#define ADDED_QUADS(format) ((format) >= CQ_INT4 ? 8 : 16)

/* `half` is 0 for the first eight lanes of a line, 1 for the others; `nibble` is 1 for the upper four bits of int8. */
ALWAYS __m256i quad_values(int format, const uint8_t *unit, int q, int half, int nibble)
{
    const __m256i *line = (const __m256i *)unit + half;
    __m256i low;
    switch (format) {
    case CQ_BINARY: /* twice the bit */
        low = q == 0 ? _mm256_add_epi8(line[0], line[0]) : q == 1 ? line[0] : _mm256_srli_epi16(line[0], q - 1);
        return _mm256_and_si256(low, _mm256_set1_epi8(2));
    case CQ_INT3:
        low = q % 4 == 0 ? line[2 * (q / 4)] : _mm256_srli_epi16(line[2 * (q / 4)], 2 * (q % 4));
        return _mm256_or_si256(
            _mm256_and_si256(low, _mm256_set1_epi8(3)),
            _mm256_and_si256(q < 2 ? _mm256_slli_epi16(line[4], 2 - q) : _mm256_srli_epi16(line[4], q - 2),
                             _mm256_set1_epi8(4)));
    case CQ_INT8: q = nibble; /* fall through */
    case CQ_INT4: return _mm256_and_si256(q == 0 ? line[0] : _mm256_srli_epi16(line[0], 4), _mm256_set1_epi8(15));
    default: return _mm256_and_si256(q == 0 ? line[0] : _mm256_srli_epi16(line[0], 2 * q), _mm256_set1_epi8(3));
    }
}

ALWAYS __m256i four_digits(const int8_t *x)
{
    int32_t four;
    memcpy(&four, x, 4);
    return _mm256_set1_epi32(four);
}

ALWAYS __m256 lanes(const uint8_t *at, int wide, int second, int half)
{
    if (wide)
        return _mm256_loadu_ps((const float *)at + 16 * second + 8 * half);
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at + 2 * second + half));
}

/* Sums (2, all) of eight lanes each, plus the products of some units, as many as 16 bits hold, with rows of digits, at
 * those of the first unit's columns in the first row. */
ALWAYS void add_units(__m256i *sum, const int format, const int nibble, const uint8_t *unit, int units, const int8_t *at,
                      const int all)
{
    const int quads = QUADS(format), lines = format == CQ_INT3 ? 3 : 1;
    __m256i products[2 * MOST_DIGITS];
#pragma GCC unroll 12
    for (int i = 0; i < 2 * all; ++i)
        products[i] = _mm256_setzero_si256();
    for (const int8_t *end = at + units * 4 * quads; at < end; at += 4 * quads, unit += 64 * lines) {
        OPAQUE("+r", at); /* else they keep an address for every digit */
#pragma GCC unroll 3
        for (int line = 0; line < lines && all < MOST_DIGITS; ++line) /* of few rows: the weight comes from memory */
            _mm_prefetch((const char *)unit + AHEAD + 64 * line, _MM_HINT_T0);
#pragma GCC unroll 8
        for (int q = 0; q < quads; ++q) {
            __m256i low = quad_values(format, unit, q, 0, nibble), high = quad_values(format, unit, q, 1, nibble);
#pragma GCC unroll 6
            for (int r = 0; r < all; ++r) {
                __m256i four = four_digits(at + r * CQ_TILE + 4 * q);
                products[r] = _mm256_add_epi16(products[r], _mm256_maddubs_epi16(low, four));
                products[all + r] = _mm256_add_epi16(products[all + r], _mm256_maddubs_epi16(high, four));
                OPAQUE("+x", products[r]); /* else compilers add the products of a unit first, which are too many */
                OPAQUE("+x", products[all + r]);
            }
        }
    }
    const __m256i weight = _mm256_set1_epi16(nibble ? 16 : 1);
#pragma GCC unroll 12
    for (int i = 0; i < 2 * all; ++i)
        sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(products[i], weight));
}

ALWAYS void run_body(const cq_layout *w, int64_t index, const cq_chunk *chunk, float *result, const int format,
                     const int parts, const int rows)
{
    const int all = parts * rows, quads = QUADS(format), lines = format == CQ_INT3 ? 3 : 1;
    const int most = ADDED_QUADS(format) / quads; /* units */
    const uint8_t *stream = (const uint8_t *)w + w->stream + index * w->run_bytes;
    memset(result, 0, (size_t)rows * CQ_LANES * 4);
    for (int b = 0; b < w->blocks; ++b) {
        const cq_block *block = &w->block[b];
        const int8_t *x = chunk->x + (int64_t)block->tile * all * CQ_TILE;
        const uint8_t *unit = stream + block->byte + w->header;
        __m256i sum[2 * MOST_DIGITS];
#pragma GCC unroll 6
        for (int r = 0; r < all; ++r)
            sum[r] = sum[all + r] = _mm256_set1_epi32(chunk->zero_sum[(int64_t)b * all + r]);
        int units = (block->width + 4 * quads - 1) / (4 * quads);
        for (int u = 0; u < units; u += most) {
            int some = units - u < most ? units - u : most;
            for (int nibble = 0; nibble < (format == CQ_INT8 ? 2 : 1); ++nibble)
                add_units(sum, format, nibble, unit + (int64_t)u * 64 * lines, some,
                          x + u * 4 * quads / CQ_TILE * all * CQ_TILE + u * 4 * quads % CQ_TILE, all);
        }
        for (int half = 0; half < 2; ++half) {
            __m256 scale = lanes(stream + block->byte, w->wide_scale, 0, half);
            __m256 offset = w->affine ? lanes(stream + block->byte, w->wide_scale, 1, half) : _mm256_setzero_ps();
#pragma GCC unroll 6
            for (int m = 0; m < rows; ++m) {
                float *out = result + m * CQ_LANES + 8 * half;
                __m256 value = _mm256_cvtepi32_ps(sum[half * all + m]);
#pragma GCC unroll 3
                for (int p = 1; p < parts; ++p)
                    value = _mm256_fmadd_ps(value, _mm256_set1_ps(256.0f),
                                            _mm256_cvtepi32_ps(sum[half * all + p * rows + m]));
                value = _mm256_fmadd_ps(value, scale, _mm256_loadu_ps(out));
                value = _mm256_fmadd_ps(offset, _mm256_set1_ps(chunk->sum[(int64_t)b * rows + m]), value);
                _mm256_storeu_ps(out, value);
            }
        }
    }
    for (int m = 0; m < rows; ++m)
        for (int lane = 0; lane < CQ_LANES; ++lane)
            result[m * CQ_LANES + lane] *= chunk->scale[m];
}

#include "floats_avx2.h"

typedef void (*kernel)(const cq_layout *, int64_t, const cq_chunk *, float *);

#define BODY(name, format, parts, rows) \
    static void name##_##parts##_##rows(const cq_layout *w, int64_t i, const cq_chunk *c, float *out) \
    { \
        run_body(w, i, c, out, format, parts, rows); \
    }
#define BODIES(name, format) \
    BODY(name, format, 1, 1) \
    BODY(name, format, 1, 2) \
    BODY(name, format, 1, 4) \
    BODY(name, format, 1, 6) BODY(name, format, 2, 1) BODY(name, format, 2, 2) BODY(name, format, 2, 3) \
        BODY(name, format, 3, 1) BODY(name, format, 3, 2)
#define TABLE(name) \
    { \
        {[1] = name##_1_1, [2] = name##_1_2, [4] = name##_1_4, [6] = name##_1_6}, \
        {[1] = name##_2_1, [2] = name##_2_2, [3] = name##_2_3}, \
        {[1] = name##_3_1, [2] = name##_3_2}, \
    }

BODIES(bits1, CQ_BINARY)
BODIES(bits2, CQ_INT2)
BODIES(bits3, CQ_INT3)
BODIES(bits4, CQ_INT4)
BODIES(bits8, CQ_INT8)

static const kernel kernels[CQ_FORMATS][CQ_MAX_PARTS][MOST_DIGITS + 1] = {
    [CQ_BINARY] = TABLE(bits1), [CQ_TERNARY] = TABLE(bits2), [CQ_INT2] = TABLE(bits2),
    [CQ_INT3] = TABLE(bits3),   [CQ_INT4] = TABLE(bits4),    [CQ_INT8] = TABLE(bits8),
};

static void run(const cq_layout *w, int64_t index, const cq_chunk *chunk, float *result)
{
    kernels[w->format][chunk->parts - 1][chunk->rows](w, index, chunk, result);
}

static int chunk_rows(int parts, int64_t rows)
{
    int most = MOST_DIGITS / parts, chunk = rows < most ? (int)rows : most;
    while (kernels[CQ_INT2][parts - 1][chunk] == NULL)
        ++chunk;
    return chunk;
}

const cq_path cq_avx2_path = {chunk_rows,     pack_chunk,        pack_window, pack_lines,     run,
                              given_integers, store_lanes_plain, store,       dequantize_row, widen,
                              rotate_row,     project,           dot,         affine,         lay_out,
                              panel,          multiply_floats};
