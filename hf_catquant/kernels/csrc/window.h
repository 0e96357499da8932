/* Rows of a convolution as digits. Where a position lies beside the one before it, so do their values in every channel:
 * values are gathered column by column, CQ_MAX_ROWS positions side by side, and become digits that way, too.
 *
 * Integers are those of rows.h, bit for bit.
 */
#include "float_rows.h"

#define GROUPS (CQ_WINDOW_ROWS / CQ_MAX_ROWS)
#define ALWAYS_INLINE static inline __attribute__((always_inline))
typedef int32_t column __attribute__((vector_size(4 * CQ_MAX_ROWS)));

/* CQ_MAX_ROWS values that lie beside each other, from the one at `from`. */
ALWAYS_INLINE void values_beside(const void *x, int64_t from, const int dtype, column *out)
{
    float values[CQ_MAX_ROWS];
    widen((const char *)x + from * (dtype == CQ_FLOAT32 ? 4 : 2), dtype, CQ_MAX_ROWS, values);
    memcpy(out, values, sizeof *out);
}

ALWAYS_INLINE void values_at(const void *x, const int64_t from[CQ_MAX_ROWS], int64_t move, const int dtype,
                             column *out)
{
    uint32_t word[CQ_MAX_ROWS];
    uint16_t half[CQ_MAX_ROWS];
    for (int m = 0; m < CQ_MAX_ROWS; ++m)
        if (dtype == CQ_FLOAT32)
            word[m] = ((const uint32_t *)x)[from[m] + move];
        else
            half[m] = ((const uint16_t *)x)[from[m] + move];
    values_beside(dtype == CQ_FLOAT32 ? (const void *)word : half, 0, dtype, out);
}

typedef int8_t bytes __attribute__((vector_size(CQ_MAX_ROWS)));

#if defined(__clang__)
#define PICKED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICKED(a, b, ...) __builtin_shuffle(a, b, (__typeof__(a)){__VA_ARGS__})
#endif
#define EVERY_SECOND(a, b) PICKED(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)

/* Where rows have one place of the kernel in the first channel: row m of a piece at start + step * m. A line or an image
 * that ends begins another piece. */
typedef struct {
    int64_t from[CQ_MAX_ROWS]; /* 0 where that is outside */
    int64_t start[2];
    int pieces, step; /* pieces: 1 or 2, or 0 if there are more, or other steps than 1 and 2 */
    column mask[2];
} cq_place;

static inline void find_place(const int64_t at[CQ_MAX_ROWS], int step, cq_place *out)
{
    int piece = -1;
    memset(out, 0, sizeof *out);
    out->step = step;
    for (int m = 0; m < CQ_MAX_ROWS; ++m) {
        if (at[m] < 0)
            continue;
        out->from[m] = at[m];
        if (piece < 0 || (piece < 2 && at[m] != out->start[piece] + step * m)) {
            if (++piece < 2)
                out->start[piece] = at[m] - step * m;
        }
        if (piece < 2)
            out->mask[piece][m] = -1;
    }
    out->pieces = piece > 1 || step > 2 ? 0 : piece == 1 ? 2 : 1;
    if (out->pieces == 0)
        for (int m = 0; m < CQ_MAX_ROWS; ++m)
            out->mask[0][m] = at[m] >= 0 ? -1 : 0;
}

/* The channels of one place: out[c * places * CQ_MAX_ROWS + m] is x[at[m] + c * plane], zero where at[m] is -1. All x has
 * `total` values; what is masked is read, too, so that there are no branches. */
ALWAYS_INLINE void gather_place(const void *x, int64_t total, const cq_place *place, int64_t channels, int64_t plane,
                                int64_t places, float *restrict out, const int dtype)
{
    int64_t end = place->step * CQ_MAX_ROWS;
    for (int64_t c = 0; c < channels; ++c, out += places * CQ_MAX_ROWS) {
        column sum = {0};
        int pieces = place->pieces;
        for (int i = 0; i < pieces; ++i) {
            int64_t first = place->start[i] + c * plane;
            if (first < 0 || first + end > total)
                pieces = 0;
        }
        for (int i = 0; i < pieces; ++i) {
            int64_t first = place->start[i] + c * plane;
            column values, more;
            values_beside(x, first, dtype, &values);
            if (place->step == 2) {
                values_beside(x, first + CQ_MAX_ROWS, dtype, &more);
                values = EVERY_SECOND(values, more);
            }
            sum |= values & place->mask[i];
        }
        if (pieces == 0) {
            values_at(x, place->from, c * plane, dtype, &sum);
            sum &= place->mask[0] | place->mask[1];
        }
        memcpy(out, &sum, sizeof sum);
    }
}

/* The integers of a channel in CQ_MAX_ROWS rows, before what is outside is masked. */
ALWAYS_INLINE bytes integers_at(const int8_t *x, const cq_place *place, const bytes mask[2], const int pieces,
                                const int step)
{
    bytes sum = {0};
    for (int i = 0; i < pieces; ++i) {
        bytes values, more;
        memcpy(&values, x + place->start[i], sizeof values);
        if (step == 2) {
            memcpy(&more, x + place->start[i] + CQ_MAX_ROWS, sizeof more);
            values = EVERY_SECOND(values, more);
        }
        sum |= values & mask[i];
    }
    if (pieces == 0) {
        int8_t some[CQ_MAX_ROWS];
        for (int m = 0; m < CQ_MAX_ROWS; ++m)
            some[m] = x[place->from[m]];
        memcpy(&sum, some, sizeof sum);
        sum &= mask[0];
    }
    return sum;
}

/* The same of integers, for the rows of all groups: out[(c * places * GROUPS + g) * CQ_MAX_ROWS + m]. A channel is read for
 * all of them at once, as it is a page of its own. CQ_MARGIN bytes before x and after it are there. */
static void gather_integers(const int8_t *x, const cq_place place[GROUPS], int groups, int64_t channels, int64_t plane,
                            int64_t places, int8_t *restrict out)
{
    bytes mask[GROUPS][2], values;
    for (int g = 0; g < groups; ++g)
        for (int i = 0; i < 2; ++i)
            for (int m = 0; m < CQ_MAX_ROWS; ++m)
                mask[g][i][m] = (int8_t)place[g].mask[i][m];
    for (int64_t c = 0; c < channels; ++c, x += plane, out += places * GROUPS * CQ_MAX_ROWS)
        for (int g = 0; g < groups; ++g) {
            switch (place[g].pieces == 0 ? 0 : 2 * place[g].step + place[g].pieces) {
            case 3: values = integers_at(x, &place[g], mask[g], 1, 1); break;
            case 4: values = integers_at(x, &place[g], mask[g], 2, 1); break;
            case 5: values = integers_at(x, &place[g], mask[g], 1, 2); break;
            case 6: values = integers_at(x, &place[g], mask[g], 2, 2); break;
            default: values = integers_at(x, &place[g], mask[g], 0, 0);
            }
            memcpy(out + g * CQ_MAX_ROWS, &values, sizeof values);
        }
}

/* Where rows have the first place of the kernel, before padding, and their images; those that are not there are above. */
typedef struct {
    int64_t image[CQ_MAX_ROWS], down[CQ_MAX_ROWS], right[CQ_MAX_ROWS];
} cq_corners;

static void find_corners(const cq_window *g, int64_t first, int rows, cq_corners *out)
{
    for (int m = 0; m < CQ_MAX_ROWS; ++m) {
        int64_t line = (first + m) / g->out_width;
        out->right[m] = (first + m) % g->out_width * g->stride_x - g->pad_x;
        out->down[m] = m < rows ? line % g->out_height * g->stride_y - g->pad_y : INT32_MIN;
        out->image[m] = line / g->out_height;
    }
}

/* Where one place of the kernel is in the lines that are held. */
static void rows_at(const cq_window *g, const cq_lines *held, const cq_corners *corner, int64_t place, cq_place *out)
{
    int64_t at[CQ_MAX_ROWS], y = place / g->kernel_width * g->dilation_y, x = place % g->kernel_width * g->dilation_x;
    for (int m = 0; m < CQ_MAX_ROWS; ++m) {
        int64_t down = corner->down[m] + y, right = corner->right[m] + x;
        int64_t line = (corner->image[m] - held->image) * g->channels * held->lines + down - held->top;
        int inside = down >= 0 && down < g->height && right >= 0 && right < g->width;
        at[m] = inside ? line * g->width + right : -1;
    }
    find_place(at, (int)g->stride_x, out);
}

/* Columns (columns, CQ_MAX_ROWS) of rows `first` and on; those that are not there are zero. */
static void gather_columns(const cq_window *g, const void *x, int dtype, int64_t first, int rows, float *columns)
{
    const cq_lines all = {.lines = g->height};
    int64_t plane = g->height * g->width, total = g->batch * g->channels * plane;
    int64_t places = g->kernel_height * g->kernel_width;
    cq_corners corner;
    find_corners(g, first, rows, &corner);
    for (int64_t place = 0; place < places; ++place) {
        float *out = columns + place * CQ_MAX_ROWS;
        cq_place where;
        rows_at(g, &all, &corner, place, &where);
        switch (dtype) {
        case CQ_FLOAT32: gather_place(x, total, &where, g->channels, plane, places, out, CQ_FLOAT32); break;
        case CQ_BFLOAT16: gather_place(x, total, &where, g->channels, plane, places, out, CQ_BFLOAT16); break;
        default: gather_place(x, total, &where, g->channels, plane, places, out, CQ_FLOAT16);
        }
    }
}

/* Columns (columns, GROUPS, CQ_MAX_ROWS) of integers, likewise. */
static void gather_groups(const cq_window *g, const cq_lines *held, int64_t first, int rows, int8_t *columns)
{
    int64_t places = g->kernel_height * g->kernel_width;
    int groups = (rows + CQ_MAX_ROWS - 1) / CQ_MAX_ROWS;
    cq_corners corner[GROUPS];
    for (int i = 0; i < groups; ++i)
        find_corners(g, first + i * CQ_MAX_ROWS, rows - i * CQ_MAX_ROWS, &corner[i]);
    for (int64_t place = 0; place < places; ++place) {
        cq_place where[GROUPS];
        for (int i = 0; i < groups; ++i)
            rows_at(g, held, &corner[i], place, &where[i]);
        gather_integers(held->integers, where, groups, g->channels, held->lines * g->width, places,
                        columns + place * GROUPS * CQ_MAX_ROWS);
    }
}

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
