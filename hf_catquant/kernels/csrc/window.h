/* Rows of a convolution as digits: columns that gather.h has side by side become digits that way, too.
 *
 * Integers are those of rows.h, bit for bit.
 */
#include "gather.h"

/* The greatest size in each row of columns (count, CQ_MAX_ROWS); returns 0 if any value is not finite. */
static int sizes_of(const float *columns, int64_t count, float size[CQ_MAX_ROWS])
{
    int32_t most[CQ_MAX_ROWS] = {0}, all = 0;
    for (int64_t k = 0; k < count; ++k)
        for (int m = 0; m < CQ_MAX_ROWS; ++m) { /* floats without a sign are in the order of their bits */
            int32_t bits = (int32_t)(float_to_bits(columns[k * CQ_MAX_ROWS + m]) & 0x7fffffff);
            most[m] = bits > most[m] ? bits : most[m];
        }
    for (int m = 0; m < CQ_MAX_ROWS; ++m) {
        all = most[m] > all ? most[m] : all;
        size[m] = bits_to_float((uint32_t)most[m]);
    }
    return all < 0x7f800000;
}

/* Integers of a column of CQ_MAX_ROWS rows: x about integer / factor, of `most` at most. */
ALWAYS_INLINE void column_integers(const float *restrict values, const float *factor, float most, column *out)
{
    int32_t integers[CQ_MAX_ROWS];
    for (int m = 0; m < CQ_MAX_ROWS; ++m) {
        float value = round_even(values[m] * factor[m]);
        value = value > most ? most : value;
        integers[m] = (int32_t)(value < -most ? -most : value);
    }
    memcpy(out, integers, sizeof *out);
}

/* Four columns of floats, or fewer with zeros after them, as words of four digits a row, most significant part first. */
ALWAYS_INLINE void float_words(const float *restrict columns, int count, const float *factor, float most,
                               const int parts, column word[CQ_MAX_PARTS], column sum[CQ_MAX_PARTS])
{
    for (int p = 0; p < parts; ++p)
        word[p] ^= word[p];
    for (int j = 0; j < count; ++j) {
        column rest;
        column_integers(columns + j * CQ_MAX_ROWS, factor, most, &rest);
        for (int p = parts - 1; p >= 0; --p) {
            column digit = p == 0 ? rest : (rest << 24) >> 24;
            word[p] |= (rest & 255) << (8 * j);
            sum[p] += digit;
            rest = (rest - digit) >> 8;
        }
    }
}

/* The digits of block b of `count` rows, the first of them row `first` of those that the chunks share. */
ALWAYS_INLINE void pack_block(const cq_layout *w, int b, const float *columns, const float *factor, float most,
                              cq_chunk *chunk, int first, int count, const int parts)
{
    const cq_block *block = &w->block[b];
    int rows = chunk->rows, all = rows * parts, zero = cq_formats[w->format].zero;
    column sum[CQ_MAX_PARTS] = {{0}}, word[CQ_MAX_PARTS] = {{0}};
    int8_t *to[CQ_MAX_ROWS];
    for (int m = 0; m < count; ++m)
        to[m] = chunk[(first + m) / rows].x + ((int64_t)block->tile * all + (first + m) % rows) * CQ_TILE;
    for (int k = 0; k < block->width || k % CQ_TILE != 0; k += 4) {
        int64_t from = (int64_t)(block->column + k) * CQ_MAX_ROWS;
        int left = block->width - k;
        if (left >= 4)
            float_words(columns + from, 4, factor, most, parts, word, sum);
        else
            float_words(columns + from, left, factor, most, parts, word, sum);
        for (int p = 0; p < parts; ++p) {
            int32_t words[CQ_MAX_ROWS];
            int64_t at = ((int64_t)(k / CQ_TILE) * all + p * rows) * CQ_TILE + k % CQ_TILE;
            memcpy(words, &word[p], sizeof words);
            __asm__ volatile("" : : "r"(words) : "memory"); /* else compilers take the vector apart */
            for (int m = 0; m < count; ++m)
                memcpy(to[m] + at, &words[m], 4);
        }
    }
    for (int m = 0; m < count; ++m) {
        cq_chunk *c = &chunk[(first + m) / rows];
        int64_t total = 0, row = (first + m) % rows;
        for (int p = 0; p < parts; ++p) {
            c->zero_sum[(int64_t)b * all + p * rows + row] = -zero * sum[p][m];
            total = total * 256 + sum[p][m];
        }
        c->sum[(int64_t)b * rows + row] = (float)total;
    }
}

/* a and b by turns, byte by byte or several at a time: their first halves, their second halves. */
#define LOW_1(a, b) PICKED(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH_1(a, b) PICKED(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#define LOW_2(a, b) PICKED(a, b, 0, 1, 16, 17, 2, 3, 18, 19, 4, 5, 20, 21, 6, 7, 22, 23)
#define HIGH_2(a, b) PICKED(a, b, 8, 9, 24, 25, 10, 11, 26, 27, 12, 13, 28, 29, 14, 15, 30, 31)
#define LOW_4(a, b) PICKED(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23)
#define HIGH_4(a, b) PICKED(a, b, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31)
#define LOW_8(a, b) PICKED(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
#define HIGH_8(a, b) PICKED(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31)

typedef int32_t four __attribute__((vector_size(16)));

/* sum plus the four integers of each word. */
ALWAYS_INLINE four add_words(four sum, bytes words)
{
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return (four)_mm_dpbusd_epi32((__m128i)sum, _mm_set1_epi8(1), (__m128i)words);
#else
    four word;
    memcpy(&word, &words, sizeof word); /* little-endian, as every path here */
    return sum + (word << 24 >> 24) + (word << 16 >> 24) + (word << 8 >> 24) + (word >> 24);
#endif
}

/* 16 columns of 16 rows to rows, in place, and what the integers of each row add to sum. */
ALWAYS_INLINE void to_rows(bytes at[CQ_MAX_ROWS], four sum[4])
{
    bytes words[4][4]; /* of four rows and four columns */
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
        const bytes *c = at + 4 * q;
        bytes a = LOW_1(c[0], c[1]), b = LOW_1(c[2], c[3]);
        words[0][q] = LOW_2(a, b);
        words[1][q] = HIGH_2(a, b);
        a = HIGH_1(c[0], c[1]);
        b = HIGH_1(c[2], c[3]);
        words[2][q] = LOW_2(a, b);
        words[3][q] = HIGH_2(a, b);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q)
            sum[i] = add_words(sum[i], words[i][q]);
        bytes a = LOW_4(words[i][0], words[i][1]), b = LOW_4(words[i][2], words[i][3]);
        at[4 * i] = LOW_8(a, b);
        at[4 * i + 1] = HIGH_8(a, b);
        a = HIGH_4(words[i][0], words[i][1]);
        b = HIGH_4(words[i][2], words[i][3]);
        at[4 * i + 2] = LOW_8(a, b);
        at[4 * i + 3] = HIGH_8(a, b);
    }
}

/* The same of integers. */
static void pack_integers(const cq_layout *w, int b, const int8_t *columns, cq_chunk *chunk, int first, int count)
{
    const cq_block *block = &w->block[b];
    int rows = chunk->rows, zero = cq_formats[w->format].zero;
    int8_t *to[CQ_MAX_ROWS];
    int32_t total[CQ_MAX_ROWS];
    four sum[4] = {{0}};
    for (int m = 0; m < count; ++m)
        to[m] = chunk[(first + m) / rows].x + ((int64_t)block->tile * rows + (first + m) % rows) * CQ_TILE;
    for (int k = 0; k < block->width || k % CQ_TILE != 0; k += CQ_MAX_ROWS) {
        int64_t at = (int64_t)(k / CQ_TILE) * rows * CQ_TILE + k % CQ_TILE;
        const int8_t *from = columns + (int64_t)(block->column + k) * GROUPS * CQ_MAX_ROWS;
        bytes values[CQ_MAX_ROWS] = {{0}};
        if (block->width - k >= CQ_MAX_ROWS)
            for (int i = 0; i < CQ_MAX_ROWS; ++i)
                memcpy(&values[i], from + i * GROUPS * CQ_MAX_ROWS, sizeof *values);
        else
            for (int i = 0; i < block->width - k; ++i)
                memcpy(&values[i], from + i * GROUPS * CQ_MAX_ROWS, sizeof *values);
        to_rows(values, sum);
        for (int m = 0; m < count; ++m)
            memcpy(to[m] + at, &values[m], sizeof *values);
    }
    memcpy(total, sum, sizeof total);
    for (int m = 0; m < count; ++m) {
        int64_t row = (int64_t)b * rows + (first + m) % rows;
        chunk[(first + m) / rows].zero_sum[row] = -zero * total[m];
        chunk[(first + m) / rows].sum[row] = (float)total[m];
    }
}

/* Factors that make floats integers of at most `most`, and the scales of rows; 0 if any value is not finite. */
static int fit_rows(const float *columns, int64_t width, float most, cq_chunk *chunk, int first, int count,
                    float factor[CQ_MAX_ROWS])
{
    float size[CQ_MAX_ROWS];
    if (!sizes_of(columns, width, size))
        return 0;
    for (int m = 0; m < CQ_MAX_ROWS; ++m) {
        float wide = size[m] < 1e-30f ? 1e-30f : size[m];
        factor[m] = most / wide;
        if (m < count)
            chunk[(first + m) / chunk->rows].scale[(first + m) % chunk->rows] = wide / most;
    }
    return 1;
}

/* Rows of floats: `count` of them, CQ_MAX_ROWS at most, from row `at` of those that the chunks share. */
static int pack_floats(const cq_layout *w, const float *columns, cq_chunk *chunk, int at, int count)
{
    const float most = chunk->parts == 1 ? 127.0f : chunk->parts == 2 ? 32639.0f : 8355711.0f;
    float factor[CQ_MAX_ROWS];
    if (!fit_rows(columns, w->columns, most, chunk, at, count, factor))
        return 0;
    for (int b = 0; b < w->blocks; ++b)
        if (chunk->parts == 1)
            pack_block(w, b, columns, factor, most, chunk, at, count, 1);
        else if (chunk->parts == 2)
            pack_block(w, b, columns, factor, most, chunk, at, count, 2);
        else
            pack_block(w, b, columns, factor, most, chunk, at, count, 3);
    return 1;
}

static int pack_window(const cq_layout *w, const void *x, int dtype, const cq_window *window, int64_t first,
                       cq_chunk *chunk, int chunks, void *columns)
{
    int rows = chunk->rows * chunks, filled = rows - chunk->rows + chunk[chunks - 1].filled;
    for (int at = 0; at < rows; at += CQ_MAX_ROWS) {
        gather_columns(window, x, dtype, first + at, filled - at, columns);
        if (!pack_floats(w, columns, chunk, at, rows - at < CQ_MAX_ROWS ? rows - at : CQ_MAX_ROWS))
            return CQ_NOT_FINITE;
    }
    return CQ_OK;
}

static void pack_lines(const cq_layout *w, float scale, const cq_lines *held, const cq_window *window, int64_t first,
                       cq_chunk *chunk, int chunks, void *columns)
{
    int rows = chunk->rows * chunks, filled = rows - chunk->rows + chunk[chunks - 1].filled;
    gather_groups(window, held, first, filled, columns);
    for (int m = 0; m < rows; ++m)
        chunk[m / chunk->rows].scale[m % chunk->rows] = scale;
    for (int at = 0; at < rows; at += CQ_MAX_ROWS)
        for (int b = 0; b < w->blocks; ++b)
            pack_integers(w, b, (const int8_t *)columns + at, chunk, at,
                          rows - at < CQ_MAX_ROWS ? rows - at : CQ_MAX_ROWS);
}

/* Integers of 8 bits under a range that is given; 0 if a value is not finite. */
static int given_integers(const void *x, int dtype, int64_t count, const cq_activation *how, int8_t *restrict out)
{
    enum { STEP = 512 };
    float values[STEP], low, high;
    int32_t integers[STEP];
    int64_t size = dtype == CQ_FLOAT32 ? 4 : 2;
    for (int64_t k = 0; k < count; k += STEP) {
        int64_t some = count - k < STEP ? count - k : STEP;
        const float *from = (const float *)x + k;
        if (dtype != CQ_FLOAT32) {
            widen((const char *)x + k * size, dtype, some, values);
            from = values;
        }
        if (!row_range(from, some, &low, &high))
            return 0;
        quantized_integers(from, some, low, high, how, integers);
        for (int64_t i = 0; i < some; ++i)
            out[k + i] = (int8_t)integers[i];
    }
    return 1;
}

#if !defined(__AVX512F__)
static void store_lanes_plain(const float *result, int rows, const float *shift, int lanes, void *out, int64_t stride,
                              int dtype)
{
    int64_t size = dtype == CQ_FLOAT32 ? 4 : 2;
    for (int lane = 0; lane < lanes; ++lane) {
        float line[CQ_MAX_ROWS];
        for (int m = 0; m < rows; ++m)
            line[m] = result[m * CQ_LANES + lane] + shift[lane];
        narrow(line, dtype, rows, (char *)out + lane * stride * size);
    }
}
#endif
