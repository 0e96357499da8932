/* AVX2: vpmaddubsw multiplies unsigned values and signed digits and adds pairs in 16 bits.
 *
 * Values of at most 4 bits leave room to add the products of a whole unit before they are widened: 8 quads of int3
 * reach 8 * 2 * 7 * 128 = 14336. int8 is taken as two values of 4 bits.
 */
#include "window.h"

#include <immintrin.h>

#define ALWAYS static inline __attribute__((always_inline))

/* `half` is 0 for the first eight lanes of a line, 1 for the others. */
ALWAYS __m256i quad_values(int format, const uint8_t *unit, int q, int half)
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

/* sum += the products of one unit with one row of digits; at: the digits of the unit's first column */
ALWAYS __m256i add_unit(__m256i sum, int format, int quads, const uint8_t *unit, int half, const int8_t *at)
{
    const __m256i one = _mm256_set1_epi16(1);
    if (format == CQ_INT8) {
        __m256i line = *((const __m256i *)unit + half), x = four_digits(at), fifteen = _mm256_set1_epi8(15);
        __m256i low = _mm256_maddubs_epi16(_mm256_and_si256(line, fifteen), x);
        __m256i high = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(line, 4), fifteen), x);
        return _mm256_add_epi32(
            sum, _mm256_add_epi32(_mm256_madd_epi16(low, one), _mm256_madd_epi16(high, _mm256_set1_epi16(16))));
    }
    __m256i products = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int q = 0; q < quads; ++q)
        products = _mm256_add_epi16(products,
                                    _mm256_maddubs_epi16(quad_values(format, unit, q, half), four_digits(at + 4 * q)));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(products, one));
}

ALWAYS __m256 lanes(const uint8_t *at, int wide, int second, int half)
{
    if (wide)
        return _mm256_loadu_ps((const float *)at + 16 * second + 8 * half);
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at + 2 * second + half));
}

ALWAYS void run_body(const cq_layout *w, int64_t index, const cq_chunk *chunk, float *result, const int format,
                     const int parts, const int rows)
{
    const int all = parts * rows;
    const int quads = format == CQ_BINARY || format == CQ_INT3 ? 8 : format == CQ_INT4 ? 2 : format == CQ_INT8 ? 1 : 4;
    const int lines = format == CQ_INT3 ? 3 : 1;
    const uint8_t *stream = (const uint8_t *)w + w->stream + index * w->run_bytes;
    memset(result, 0, (size_t)rows * CQ_LANES * 4);
    for (int b = 0; b < w->blocks; ++b) {
        const cq_block *block = &w->block[b];
        const int8_t *x = chunk->x + (int64_t)block->tile * all * CQ_TILE;
        for (int half = 0; half < 2; ++half) {
            const uint8_t *unit = stream + block->byte + w->header;
            __m256i sum[4];
#pragma GCC unroll 4
            for (int r = 0; r < all; ++r)
                sum[r] = _mm256_set1_epi32(chunk->zero_sum[(int64_t)b * all + r]);
            for (int k = 0; k < block->width; k += 4 * quads, unit += 64 * lines) {
                const int8_t *at = x + k / CQ_TILE * all * CQ_TILE + k % CQ_TILE;
#pragma GCC unroll 4
                for (int r = 0; r < all; ++r)
                    sum[r] = add_unit(sum[r], format, quads, unit, half, at + r * CQ_TILE);
            }
            __m256 scale = lanes(stream + block->byte, w->wide_scale, 0, half);
            __m256 offset = w->affine ? lanes(stream + block->byte, w->wide_scale, 1, half) : _mm256_setzero_ps();
#pragma GCC unroll 4
            for (int m = 0; m < rows; ++m) {
                float *out = result + m * CQ_LANES + 8 * half;
                __m256 value = _mm256_cvtepi32_ps(sum[m]);
                for (int p = 1; p < parts; ++p)
                    value = _mm256_fmadd_ps(value, _mm256_set1_ps(256.0f), _mm256_cvtepi32_ps(sum[p * rows + m]));
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

typedef void (*kernel)(const cq_layout *, int64_t, const cq_chunk *, float *);

#define BODY(name, format, parts, rows) \
    static void name##_##parts##_##rows(const cq_layout *w, int64_t i, const cq_chunk *c, float *out) \
    { \
        run_body(w, i, c, out, format, parts, rows); \
    }
#define BODIES(name, format) \
    BODY(name, format, 1, 1) \
    BODY(name, format, 1, 2) \
    BODY(name, format, 1, 4) BODY(name, format, 2, 1) BODY(name, format, 2, 2) BODY(name, format, 3, 1)
#define TABLE(name) \
    { \
        {[1] = name##_1_1, [2] = name##_1_2, [4] = name##_1_4}, \
        {[1] = name##_2_1, [2] = name##_2_2}, \
        {[1] = name##_3_1}, \
    }

BODIES(bits1, CQ_BINARY)
BODIES(bits2, CQ_INT2)
BODIES(bits3, CQ_INT3)
BODIES(bits4, CQ_INT4)
BODIES(bits8, CQ_INT8)

static const kernel kernels[CQ_FORMATS][CQ_MAX_PARTS][5] = {
    [CQ_BINARY] = TABLE(bits1), [CQ_TERNARY] = TABLE(bits2), [CQ_INT2] = TABLE(bits2),
    [CQ_INT3] = TABLE(bits3),   [CQ_INT4] = TABLE(bits4),    [CQ_INT8] = TABLE(bits8),
};

static void run(const cq_layout *w, int64_t index, const cq_chunk *chunk, float *result)
{
    kernels[w->format][chunk->parts - 1][chunk->rows](w, index, chunk, result);
}

static int chunk_rows(int parts, int64_t rows)
{
    static const int most[CQ_MAX_PARTS] = {4, 2, 1};
    int chunk = rows < most[parts - 1] ? (int)rows : most[parts - 1];
    return chunk == 3 ? 4 : chunk;
}

const cq_path cq_avx2_path = {chunk_rows,     pack_chunk,        pack_window, pack_lines,     run,
                              given_integers, store_lanes_plain, store,       dequantize_row, widen,
                              rotate_row,     project,           dot,         affine};
