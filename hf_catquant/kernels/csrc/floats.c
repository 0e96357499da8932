/* Rows of floats times weights as floats, section by section: what cq_path.multiply_floats is given. Every result is computed
 * by one thread, in an order that depends on the shapes alone.
 */
#include "linear.h"

#include <string.h>

/* Columns that are floats at once, chunks of float rows whose section stays in a second-level cache, and runs that are
 * multiplied by it before the next section. */
#define SECTION 256
#define FLOAT_CHUNKS 42
#define FLOAT_RUNS 16

/* The block behind the section that begins with block `first`, and how many columns that has. */
static int end_of_section(const cq_layout *w, int first, int *columns)
{
    int last = first;
    for (*columns = 0; last < w->blocks && (last == first || *columns + w->block[last].width <= SECTION); ++last)
        *columns += w->block[last].width;
    return last;
}

/* Lays out a chunk of rows as floats: section by section all chunks, each column by column, so that a section of all of them
 * is one stream. */
static void lay_out_task(void *context, int64_t index)
{
    job *j = context;
    const cq_layout *w = j->w;
    int64_t first = j->held.first + index * CQ_FLOAT_ROWS, size = cq_size_of(j->dtype), columns = w->columns;
    float *rows = cq_scratch(1, (size_t)(CQ_FLOAT_ROWS * columns) * 4), *to = (float *)j->held.memory;
    if (rows == NULL) {
        atomic_store(&j->state, CQ_NO_MEMORY);
        return;
    }
    for (int64_t m = 0; m < CQ_FLOAT_ROWS; ++m)
        if (first + m < j->rows)
            j->path->widen(j->x + (first + m) * j->x_stride * size, j->dtype, columns, rows + m * columns);
        else
            memset(rows + m * columns, 0, (size_t)columns * 4);
    for (int block = 0, last, count; block < w->blocks; block = last, to += j->held.chunks * count * CQ_FLOAT_ROWS) {
        const float *from = rows + w->block[block].column;
        last = end_of_section(w, block, &count);
        float *out = to + index * count * CQ_FLOAT_ROWS;
        for (int k = 0; k < count; ++k)
            for (int m = 0; m < CQ_FLOAT_ROWS; ++m)
                out[k * CQ_FLOAT_ROWS + m] = from[m * columns + k];
    }
}

/* Sums (runs, chunks, CQ_FLOAT_ROWS, 16) of the rows that are held and some runs; behind them is room for a section of one. */
static void sum_floats(const job *j, int64_t from, int64_t to, float *sums)
{
    const cq_layout *w = j->w;
    int64_t chunks = j->held.chunks, size = chunks * CQ_FLOAT_ROWS * CQ_LANES;
    const float *x = (const float *)j->held.memory;
    float *panel = sums + (to - from) * size;
    memset(sums, 0, (size_t)((to - from) * size) * 4);
    for (int block = 0, last, columns; block < w->blocks; block = last, x += chunks * columns * CQ_FLOAT_ROWS) {
        last = end_of_section(w, block, &columns);
        for (int64_t run = from; run < to; ++run) {
            j->path->panel(w, run, block, last, panel);
            j->path->multiply_floats(x, chunks, panel, columns, sums + (run - from) * size);
        }
    }
}

static void floats_task(void *context, int64_t index)
{
    job *j = context;
    const int64_t first = j->held.first, most = j->held.chunks * CQ_FLOAT_ROWS;
    const int64_t rows = j->rows - first < most ? j->rows - first : most;
    const int64_t end = j->w->runs * (index + 1) / j->spans;
    float *sums = cq_scratch(1, (size_t)(most * FLOAT_RUNS + SECTION + CQ_MAX_BLOCK + 32) * CQ_LANES * 4);
    if (sums == NULL) {
        atomic_store(&j->state, CQ_NO_MEMORY);
        return;
    }
    for (int64_t from = j->w->runs * index / j->spans, to; from < end; from = to) {
        to = end - from < FLOAT_RUNS ? end : from + FLOAT_RUNS;
        sum_floats(j, from, to, sums);
        for (int64_t run = from, row = from * CQ_LANES; run < to; ++run, row += CQ_LANES)
            cq_put(j, sums + (run - from) * most * CQ_LANES, first, (int)rows, row,
                (int)(j->w->rows - row < CQ_LANES ? j->w->rows - row : CQ_LANES));
    }
}

int cq_multiply_as_floats(job *j, int threads)
{
    int64_t chunks = (j->rows + CQ_FLOAT_ROWS - 1) / CQ_FLOAT_ROWS;
    j->spans = threads == 1 ? 1 : j->w->runs < 4 * threads ? j->w->runs : 4 * threads;
    for (int64_t first = 0; first < chunks && atomic_load(&j->state) == CQ_OK; first += FLOAT_CHUNKS) {
        j->held.first = first * CQ_FLOAT_ROWS;
        j->held.chunks = chunks - first < FLOAT_CHUNKS ? chunks - first : FLOAT_CHUNKS;
        j->held.memory = cq_scratch(0, (size_t)(j->held.chunks * CQ_FLOAT_ROWS * j->w->columns) * 4);
        if (j->held.memory == NULL)
            return CQ_NO_MEMORY;
        cq_parallel(threads, j->held.chunks, lay_out_task, j);
        if (atomic_load(&j->state) == CQ_OK)
            cq_parallel(threads, j->spans, floats_task, j);
    }
    return atomic_load(&j->state);
}
