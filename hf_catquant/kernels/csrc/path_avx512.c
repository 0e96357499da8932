/* AVX-512 with VNNI: vpdpbusd adds four products of an unsigned value and a signed digit to each of 16 rows. */
#include "avx512.h"
#include "window.h"

ALWAYS __m512i quad_values(int format, const uint8_t *unit, int q)
{
    const __m512i *line = (const __m512i *)unit;
    __m512i low;
    switch (format) {
    case CQ_BINARY: /* twice the bit */
        low = q == 0 ? _mm512_add_epi8(line[0], line[0]) : q == 1 ? line[0] : _mm512_srli_epi16(line[0], q - 1);
        return _mm512_and_si512(low, _mm512_set1_epi8(2));
    case CQ_INT3:
        low = q % 4 == 0 ? line[q / 4] : _mm512_srli_epi16(line[q / 4], 2 * (q % 4));
        return _mm512_or_si512(
            _mm512_and_si512(low, _mm512_set1_epi8(3)),
            _mm512_and_si512(q < 2 ? _mm512_slli_epi16(line[2], 2 - q) : _mm512_srli_epi16(line[2], q - 2),
                             _mm512_set1_epi8(4)));
    case CQ_INT4: return _mm512_and_si512(q == 0 ? line[0] : _mm512_srli_epi16(line[0], 4), _mm512_set1_epi8(15));
    case CQ_INT8: return line[0];
    default: return _mm512_and_si512(q == 0 ? line[0] : _mm512_srli_epi16(line[0], 2 * q), _mm512_set1_epi8(3));
    }
}

/* Quad q of a unit of one line where its bits lie: 2^(bits * q) times the values, or for CQ_BINARY half of them. */
ALWAYS __m512i plane_values(int format, __m512i line, int q)
{
    int mask = format == CQ_BINARY ? 1 << q : format == CQ_INT4 ? 15 << 4 * q : 3 << 2 * q;
    return _mm512_and_si512(line, _mm512_set1_epi8((char)mask));
}

/* The sum of products of values from the sum of those of plane_values(), which is a multiple of what it is divided by. */
ALWAYS __m512i plane_sum(int format, __m512i sum, int q)
{
    if (format == CQ_BINARY)
        return q == 0 ? _mm512_add_epi32(sum, sum) : _mm512_srai_epi32(sum, (unsigned)(q - 1));
    return _mm512_srai_epi32(sum, (unsigned)(format == CQ_INT4 ? 4 * q : 2 * q));
}

/* sum plus the products of values, four a lane, with the four digits at `four`, which every lane takes from memory itself.
 * By the intrinsic GCC copies every sum and loads every digit on its own, which takes twice as long. */
ALWAYS __m512i add_products(__m512i sum, __m512i values, const int8_t *four)
{
    typedef int32_t word __attribute__((may_alias, aligned(1)));
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(values), "m"(*(const word *)four));
    return sum;
}

/* Bytes ahead that are fetched: about the latency of memory times the rate of one core. */
#define AHEAD 6144

ALWAYS void run_body(const cq_layout *w, int64_t index, const cq_chunk *chunk, float *result, const int format,
                     const int parts, const int rows)
{
    const int all = parts * rows;
    const int quads = format == CQ_BINARY || format == CQ_INT3 ? 8 : format == CQ_INT4 ? 2 : format == CQ_INT8 ? 1 : 4;
    const int lines = format == CQ_INT3 ? 3 : 1;
    /* With few rows there are registers for a sum of every quad, which is shifted once and not at every unit: at most
     * 255 * 128 * 512 / 2, and exact. Otherwise a few sums, as one alone waits four cycles for itself. */
    const int many = all <= 3 && all * quads > 16;
    const int planes = all <= 3 && !many && (format == CQ_BINARY || format == CQ_INT2 || format == CQ_INT4);
    const int chains = planes ? quads : all >= 4 ? 1 : quads >= 4 ? 4 : quads;
    const uint8_t *stream = (const uint8_t *)w + w->stream + index * w->run_bytes;
    __m512 total[CQ_MAX_ROWS];
#pragma GCC unroll 16
    for (int m = 0; m < rows; ++m)
        total[m] = _mm512_setzero_ps();
    for (int b = 0; b < w->blocks; ++b) {
        const cq_block *block = &w->block[b];
        const uint8_t *unit = stream + block->byte + w->header;
        const int8_t *x = chunk->x + (int64_t)block->tile * all * CQ_TILE;
        __m512i sum[CQ_MAX_ROWS * 4];
        _mm_prefetch((const char *)stream + block->byte + AHEAD, _MM_HINT_T0);
#pragma GCC unroll 16
        for (int r = 0; r < all; ++r) {
            sum[r] = planes ? _mm512_setzero_si512() : _mm512_set1_epi32(chunk->zero_sum[(int64_t)b * all + r]);
#pragma GCC unroll 16
            for (int c = 1; c < chains; ++c)
                sum[c * all + r] = _mm512_setzero_si512();
        }
        for (int tile = 0; tile < block->width; tile += CQ_TILE, x += all * CQ_TILE) {
            const int8_t *at = x, *end = x + (block->width - tile < CQ_TILE ? block->width - tile : CQ_TILE);
            for (; at < end; at += 4 * quads, unit += 64 * lines) {
#pragma GCC unroll 16
                for (int line = 0; line < lines; ++line)
                    _mm_prefetch((const char *)unit + AHEAD + 64 * line, _MM_HINT_T0);
#pragma GCC unroll 8
                for (int q = 0; q < quads; ++q) {
                    __m512i values =
                        planes ? plane_values(format, *(const __m512i *)unit, q) : quad_values(format, unit, q);
#pragma GCC unroll 16
                    for (int r = 0; r < all; ++r)
                        sum[q % chains * all + r] =
                            add_products(sum[q % chains * all + r], values, at + r * CQ_TILE + 4 * q);
                }
            }
        }
        __m512 scale = lanes(stream + block->byte, w->wide_scale, 0);
#pragma GCC unroll 16
        for (int m = 0; m < rows; ++m) {
            __m512 value = _mm512_setzero_ps();
#pragma GCC unroll 16
            for (int p = 0; p < parts; ++p) {
                __m512i part =
                    planes ? _mm512_set1_epi32(chunk->zero_sum[(int64_t)b * all + p * rows + m]) : sum[p * rows + m];
#pragma GCC unroll 16
                for (int c = planes ? 0 : 1; c < chains; ++c) {
                    __m512i more = sum[c * all + p * rows + m];
                    part = _mm512_add_epi32(part, planes ? plane_sum(format, more, c) : more);
                }
                value = p == 0 ? _mm512_cvtepi32_ps(part)
                               : _mm512_fmadd_ps(value, _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(part));
            }
            total[m] = _mm512_fmadd_ps(value, scale, total[m]);
        }
        if (w->affine) {
            __m512 offset = lanes(stream + block->byte, w->wide_scale, 1);
#pragma GCC unroll 16
            for (int m = 0; m < rows; ++m)
                total[m] = _mm512_fmadd_ps(offset, _mm512_set1_ps(chunk->sum[(int64_t)b * rows + m]), total[m]);
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < rows; ++m)
        _mm512_storeu_ps(result + m * CQ_LANES, _mm512_mul_ps(total[m], _mm512_set1_ps(chunk->scale[m])));
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
    BODY(name, format, 1, 4) \
    BODY(name, format, 1, 8) \
    BODY(name, format, 1, 12) BODY(name, format, 2, 1) BODY(name, format, 2, 2) BODY(name, format, 2, 4) \
        BODY(name, format, 2, 6) BODY(name, format, 3, 1) BODY(name, format, 3, 2) BODY(name, format, 3, 3) \
            BODY(name, format, 3, 4)
#define TABLE(name) \
    { \
        {[1] = name##_1_1, [2] = name##_1_2, [4] = name##_1_4, [8] = name##_1_8, [12] = name##_1_12}, \
        {[1] = name##_2_1, [2] = name##_2_2, [4] = name##_2_4, [6] = name##_2_6}, \
        {[1] = name##_3_1, [2] = name##_3_2, [3] = name##_3_3, [4] = name##_3_4}, \
    }

BODIES(bits1, CQ_BINARY)
BODIES(bits2, CQ_INT2)
BODIES(bits3, CQ_INT3)
BODIES(bits4, CQ_INT4)
BODIES(bits8, CQ_INT8)

static const kernel kernels[CQ_FORMATS][CQ_MAX_PARTS][CQ_MAX_ROWS + 1] = {
    [CQ_BINARY] = TABLE(bits1), [CQ_TERNARY] = TABLE(bits2), [CQ_INT2] = TABLE(bits2),
    [CQ_INT3] = TABLE(bits3),   [CQ_INT4] = TABLE(bits4),    [CQ_INT8] = TABLE(bits8),
};

static void run(const cq_layout *w, int64_t index, const cq_chunk *chunk, float *result)
{
    kernels[w->format][chunk->parts - 1][chunk->rows](w, index, chunk, result);
}

static int chunk_rows(int parts, int64_t rows)
{
    static const int most[CQ_MAX_PARTS] = {12, 6, 4};
    int chunk = rows < most[parts - 1] ? (int)rows : most[parts - 1];
    while (kernels[CQ_INT2][parts - 1][chunk] == NULL)
        ++chunk;
    return chunk;
}

/* Rows of 16 floats to columns; of the rows that are not there, zeros. */
ALWAYS void load_transposed(const float *rows, int count, __m512 column[16])
{
    __m512 a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
        a[i] = i < count ? _mm512_loadu_ps(rows + 16 * i) : _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 16;
         i += i % 4 == 1 ? 3 : 1) { /* a[4 * j + c]: column c of each four, of rows 4 * j to 4 * j + 3 */
        __m512d left = _mm512_castps_pd(b[i / 4 * 4 + i % 2]), right = _mm512_castps_pd(b[i / 4 * 4 + 2 + i % 2]);
        a[i / 4 * 4 + 2 * (i % 2)] = _mm512_castpd_ps(_mm512_unpacklo_pd(left, right));
        a[i / 4 * 4 + 2 * (i % 2) + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(left, right));
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        __m512 even = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88), odd = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xdd);
        __m512 even8 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88);
        __m512 odd8 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xdd);
        column[c] = _mm512_shuffle_f32x4(even, even8, 0x88);
        column[4 + c] = _mm512_shuffle_f32x4(odd, odd8, 0x88);
        column[8 + c] = _mm512_shuffle_f32x4(even, even8, 0xdd);
        column[12 + c] = _mm512_shuffle_f32x4(odd, odd8, 0xdd);
    }
}

static void store_lanes(const float *result, int rows, const float *shift, int count, void *out, int64_t stride,
                        int dtype)
{
    __m512 column[16];
    __mmask16 there = (__mmask16)((1u << rows) - 1);
    load_transposed(result, rows, column);
    if (dtype == CQ_FLOAT32) {
#pragma GCC unroll 16
        for (int lane = 0; lane < 16; ++lane)
            if (lane < count)
                _mm512_mask_storeu_ps((float *)out + lane * stride, there,
                                      _mm512_add_ps(column[lane], _mm512_set1_ps(shift[lane])));
        return;
    }
    for (int lane = 0; lane < count; ++lane) {
        float line[CQ_LANES];
        _mm512_storeu_ps(line, _mm512_add_ps(column[lane], _mm512_set1_ps(shift[lane])));
        narrow(line, dtype, rows, (uint16_t *)out + lane * stride);
    }
}

ALWAYS void look_up(const uint8_t *codes, int64_t count, __m512 values, float *out)
{
    for (int64_t k = 0; k < count; k += 16) {
        __mmask16 there = count - k < 16 ? (__mmask16)((1u << (count - k)) - 1) : 0xffff;
        __m512i index = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, codes + k));
        _mm512_mask_storeu_ps(out + k, there, _mm512_permutexvar_ps(index, values));
    }
}

ALWAYS void look_up_halves(const uint8_t *codes, int64_t count, __m512 values, int dtype, uint16_t *out)
{
    float wide[16];
    uint16_t half[16];
    _mm512_storeu_ps(wide, values);
    narrow(wide, dtype, 16, half);
    __m512i table = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)half));
    for (int64_t k = 0; k < count; k += 32) {
        __mmask32 there = count - k < 32 ? (__mmask32)((1u << (count - k)) - 1) : 0xffffffff;
        __m512i index = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(there, codes + k));
        _mm512_mask_storeu_epi16(out + k, there, _mm512_permutexvar_epi16(index, table));
    }
}

/* dequantize_row(), the same bits: a value is looked up among those of its group, where a register holds them all. */
static void dequantize(const uint8_t *codes, const float *scale, const float *offset, int64_t columns,
                       int64_t group_width, const cq_format *format, void *out, int dtype)
{
    if (format->radix > CQ_LANES) {
        dequantize_row(codes, scale, offset, columns, group_width, format, out, dtype);
        return;
    }
    const __m512i code = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 level = _mm512_cvtepi32_ps(
        _mm512_sub_epi32(_mm512_mullo_epi32(code, _mm512_set1_epi32(format->step)), _mm512_set1_epi32(format->zero)));
    for (int64_t k = 0, g = 0; k < columns; k += group_width, ++g) {
        int64_t end = columns - k < group_width ? columns : k + group_width;
        __m512 values = _mm512_mul_ps(level, _mm512_set1_ps(scale[g]));
        if (offset != NULL)
            values = _mm512_add_ps(values, _mm512_set1_ps(offset[g]));
        if (dtype == CQ_FLOAT32)
            look_up(codes + k, end - k, values, (float *)out + k);
        else
            look_up_halves(codes + k, end - k, values, dtype, (uint16_t *)out + k);
    }
}

const cq_path cq_avx512_path = {chunk_rows,     pack_chunk,  pack_window, pack_lines, run,
                                given_integers, store_lanes, store,       dequantize, widen,
                                rotate_row,     project,     dot,         affine,    NULL,
                                NULL,           NULL};

void cq_avx512_peak(int64_t rounds)
{
    __m512i sum[CQ_AVX512_PRODUCTS / 64];
#pragma GCC unroll 12
    for (int i = 0; i < CQ_AVX512_PRODUCTS / 64; ++i)
        sum[i] = _mm512_setzero_si512();
    for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
        for (int i = 0; i < CQ_AVX512_PRODUCTS / 64; ++i) {
            sum[i] = _mm512_dpbusd_epi32(sum[i], sum[i], sum[i]);
            __asm__ volatile("" : "+v"(sum[i]));
        }
    }
}
