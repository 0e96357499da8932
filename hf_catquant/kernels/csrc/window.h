/* Rows of a convolution as digits. Where a position lies beside the one before it, so do their values in every channel:
 * values are gathered column by column, CQ_MAX_ROWS positions side by side, and become digits that way, too.
 *
 * Integers are those of rows.h, bit for bit.
 */
#include "float_rows.h"

/* Where rows have the first channel and the first place of the kernel, before padding. */
typedef struct {
    int64_t image[CQ_MAX_ROWS], down[CQ_MAX_ROWS], right[CQ_MAX_ROWS];
} cq_corners;

static void find_corners(const cq_window *g, int64_t first, int rows, cq_corners *out)
{
    memset(out, 0, sizeof *out);
    for (int m = 0; m < rows; ++m) {
        int64_t line = (first + m) / g->out_width;
        out->right[m] = (first + m) % g->out_width * g->stride_x - g->pad_x;
        out->down[m] = line % g->out_height * g->stride_y - g->pad_y;
        out->image[m] = line / g->out_height * g->channels * g->height * g->width;
    }
}

#define ALWAYS_INLINE static inline __attribute__((always_inline))
typedef int32_t column __attribute__((vector_size(4 * CQ_MAX_ROWS)));

/* CQ_MAX_ROWS values that lie beside each other, from the one at `from`. */
ALWAYS_INLINE void values_beside(const void *x, int64_t from, const int dtype, column *out)
{
    float values[CQ_MAX_ROWS];
    widen((const char *)x + from * (dtype == CQ_FLOAT32 ? 4 : 2), dtype, CQ_MAX_ROWS, values);
    memcpy(out, values, sizeof *out);
}

ALWAYS_INLINE void values_at(const void *x, const int64_t from[CQ_MAX_ROWS], int64_t move, const int dtype, column *out)
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

/* The channels of one place: out[c * places * CQ_MAX_ROWS + m] is x[at[m] + c * plane], zero where at[m] is -1. All x has
 * `total` values; what is masked is read, too, so that there are no branches. */
ALWAYS_INLINE void gather_place(const void *x, int64_t total,
                                                               const int64_t at[CQ_MAX_ROWS], int64_t channels,
                                                               int64_t plane, int64_t places, float *restrict out,
                                                               const int dtype)
{
    column mask = {0};
    int64_t from[CQ_MAX_ROWS], start = 0;
    int beside = 1;
    for (int m = CQ_MAX_ROWS - 1; m >= 0; --m)
        start = at[m] >= 0 ? at[m] - m : start;
    for (int m = 0; m < CQ_MAX_ROWS; ++m) {
        mask[m] = at[m] >= 0 ? -1 : 0;
        from[m] = at[m] >= 0 ? at[m] : 0;
        beside &= at[m] < 0 || at[m] == start + m;
    }
    for (int64_t c = 0; c < channels; ++c, out += places * CQ_MAX_ROWS) {
        int64_t first = start + c * plane;
        column values;
        if (beside && first >= 0 && first + CQ_MAX_ROWS <= total)
            values_beside(x, first, dtype, &values);
        else
            values_at(x, from, c * plane, dtype, &values);
        values &= mask;
        memcpy(out, &values, sizeof values);
    }
}

/* Columns (columns, CQ_MAX_ROWS) of rows `first` and on; those that are not there are zero. */
static void gather_columns(const cq_window *g, const void *x, int dtype, int64_t first, int rows, float *out)
{
    int64_t plane = g->height * g->width, total = g->batch * g->channels * plane;
    int64_t places = g->kernel_height * g->kernel_width;
    cq_corners corner;
    find_corners(g, first, rows, &corner);
    for (int64_t place = 0; place < places; ++place, out += CQ_MAX_ROWS) {
        int64_t at[CQ_MAX_ROWS];
        for (int m = 0; m < CQ_MAX_ROWS; ++m) {
            int64_t down = corner.down[m] + place / g->kernel_width * g->dilation_y;
            int64_t right = corner.right[m] + place % g->kernel_width * g->dilation_x;
            int inside = m < rows && down >= 0 && down < g->height && right >= 0 && right < g->width;
            at[m] = inside ? corner.image[m] + down * g->width + right : -1;
        }
        switch (dtype) {
        case CQ_FLOAT32: gather_place(x, total, at, g->channels, plane, places, out, CQ_FLOAT32); break;
        case CQ_BFLOAT16: gather_place(x, total, at, g->channels, plane, places, out, CQ_BFLOAT16); break;
        default: gather_place(x, total, at, g->channels, plane, places, out, CQ_FLOAT16);
        }
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

/* How values of CQ_MAX_ROWS rows become integers: x about scale * integer. */
typedef struct {
    float factor[CQ_MAX_ROWS]; /* of floats: the reciprocal of the scale */
    float offset, scale, low, high;
    int32_t zero;
    int given; /* one range for all rows, else one of each row's size */
} cq_rounding;

ALWAYS_INLINE void column_integers(const float *restrict values, const cq_rounding *how, const int given, column *out)
{
    int32_t integers[CQ_MAX_ROWS];
    for (int m = 0; m < CQ_MAX_ROWS; ++m) {
        float value = given ? (values[m] - how->offset) / how->scale : round_even(values[m] * how->factor[m]);
        value = value < how->low ? how->low : value;
        value = value > how->high ? how->high : value;
        integers[m] = given ? (int32_t)round_even(value) - how->zero : (int32_t)value;
    }
    memcpy(out, integers, sizeof *out);
}

/* Four columns, or fewer with zeros after them, as words of four digits a row, most significant part first. */
ALWAYS_INLINE void quad_words(const float *restrict values, int count,
                                                             const cq_rounding *how, const int given, const int parts,
                                                             column word[CQ_MAX_PARTS], column sum[CQ_MAX_PARTS])
{
    for (int p = 0; p < parts; ++p)
        word[p] ^= word[p];
    for (int j = 0; j < count; ++j) {
        column rest;
        column_integers(values + j * CQ_MAX_ROWS, how, given, &rest);
        for (int p = parts - 1; p >= 0; --p) {
            column digit = p == 0 ? rest : (rest << 24) >> 24;
            word[p] |= (rest & 255) << (8 * j);
            sum[p] += digit;
            rest = (rest - digit) >> 8;
        }
    }
}

/* The digits of block b of rows that `chunks` chunks share. */
ALWAYS_INLINE void pack_block(const cq_layout *w, int b, const float *columns,
                                                             const cq_rounding *how, cq_chunk *chunk, int chunks,
                                                             const int given, const int parts)
{
    const cq_block *block = &w->block[b];
    int rows = chunk->rows, all = rows * parts, zero = cq_formats[w->format].zero;
    column sum[CQ_MAX_PARTS] = {{0}}, word[CQ_MAX_PARTS] = {{0}};
    int8_t *to[CQ_MAX_ROWS];
    for (int m = 0; m < rows * chunks; ++m)
        to[m] = chunk[m / rows].x + ((int64_t)block->tile * all + m % rows) * CQ_TILE;
    for (int k = 0; k < block->width || k % CQ_TILE != 0; k += 4) {
        const float *values = columns + (int64_t)(block->column + k) * CQ_MAX_ROWS;
        if (block->width - k >= 4)
            quad_words(values, 4, how, given, parts, word, sum);
        else
            quad_words(values, block->width - k, how, given, parts, word, sum);
        for (int p = 0; p < parts; ++p) {
            int32_t words[CQ_MAX_ROWS];
            int64_t at = ((int64_t)(k / CQ_TILE) * all + p * rows) * CQ_TILE + k % CQ_TILE;
            memcpy(words, &word[p], sizeof words);
            __asm__ volatile("" : : "r"(words) : "memory"); /* else compilers take the vector apart */
            for (int m = 0; m < rows * chunks; ++m)
                memcpy(to[m] + at, &words[m], 4);
        }
    }
    for (int m = 0; m < rows * chunks; ++m) {
        cq_chunk *c = &chunk[m / rows];
        int64_t total = 0, at = (int64_t)b * all + m % rows;
        for (int p = 0; p < parts; ++p) {
            c->zero_sum[at + p * rows] = -zero * sum[p][m];
            total = total * 256 + sum[p][m];
        }
        c->sum[(int64_t)b * rows + m % rows] = (float)total;
    }
}

static int pack_window(const cq_layout *w, const cq_activation *how, const void *x, int dtype, const cq_window *window,
                       int64_t first, cq_chunk *chunk, int chunks, float *columns)
{
    const float most = chunk->parts == 1 ? 127.0f : chunk->parts == 2 ? 32639.0f : 8355711.0f;
    int rows = chunk->rows;
    float size[CQ_MAX_ROWS];
    cq_rounding rounding = {.low = -most, .high = most, .given = how->quantized};
    gather_columns(window, x, dtype, first, rows * (chunks - 1) + chunk[chunks - 1].filled, columns);
    if (!sizes_of(columns, w->columns, size))
        return CQ_NOT_FINITE;
    if (how->quantized)
        rounding = (cq_rounding){.offset = how->affine ? how->offset : 0,
                                 .scale = how->scale,
                                 .low = how->low,
                                 .high = how->high,
                                 .given = 1};
    rounding.zero = how->quantized ? (int32_t)rintf(-rounding.offset / rounding.scale) : 0;
    for (int m = 0; m < rows * chunks; ++m) {
        float wide = size[m] < 1e-30f ? 1e-30f : size[m];
        rounding.factor[m] = most / wide;
        chunk[m / rows].scale[m % rows] = how->quantized ? how->scale : wide / most;
    }
    for (int b = 0; b < w->blocks; ++b)
        if (rounding.given)
            pack_block(w, b, columns, &rounding, chunk, chunks, 1, 1);
        else if (chunk->parts == 1)
            pack_block(w, b, columns, &rounding, chunk, chunks, 0, 1);
        else if (chunk->parts == 2)
            pack_block(w, b, columns, &rounding, chunk, chunks, 0, 2);
        else
            pack_block(w, b, columns, &rounding, chunk, chunks, 0, 3);
    return CQ_OK;
}

#if !defined(__AVX512F__)
static void transpose_plain(float *tile)
{
    for (int m = 1; m < CQ_LANES; ++m)
        for (int lane = 0; lane < m; ++lane) {
            float value = tile[m * CQ_LANES + lane];
            tile[m * CQ_LANES + lane] = tile[lane * CQ_LANES + m];
            tile[lane * CQ_LANES + m] = value;
        }
}
#endif
