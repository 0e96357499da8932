/* Where the rows of a convolution lie in x, and their values column by column, CQ_MAX_ROWS positions side by side: where a
 * position lies beside the one before it, so do their values in every channel.
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
