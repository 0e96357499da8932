/* Rows of floats times weights as floats, section by section: what cq_path.multiply_floats is given. Every result is computed
 * by one thread, in an order that depends on the shapes alone.
 */
#include "linear.h"

#include <string.h>

/* Columns that are floats at once, values of x whose section stays in a second-level cache, and runs that are multiplied
 * by it before the next section. */
#define SECTION 256
#define HELD_VALUES (1 << 16)
#define FLOAT_RUNS 16

/* The block behind the section that begins with block `first`, and how many columns that has. */
static int end_of_section(const cq_layout *w, int first, int *columns)
{
    int last = first;
    for (*columns = 0; last < w->blocks && (last == first || *columns + w->block[last].width <= SECTION); ++last)
        *columns += w->block[last].width;
    return last;
}

/* Lays out a chunk of rows as floats: section by section all chunks that are held, each column by column, so that a section
 * of all of them is one stream. */
static void lay_out(job *j, const held_rows *held, int64_t index)
{
    const cq_layout *w = j->w;
    int64_t first = (held->first + index) * CQ_FLOAT_ROWS, size = cq_size_of(j->dtype), columns = w->columns;
    float *rows = cq_scratch(1, (size_t)(CQ_FLOAT_ROWS * columns) * 4), *to = (float *)held->memory;
    if (rows == NULL) {
        atomic_store(&j->state, CQ_NO_MEMORY);
        return;
    }
    for (int64_t m = 0; m < CQ_FLOAT_ROWS; ++m)
        if (first + m < j->rows)
            j->path->widen(j->x + (first + m) * j->x_stride * size, j->dtype, columns, rows + m * columns);
        else
            memset(rows + m * columns, 0, (size_t)columns * 4);
    for (int block = 0, last, count; block < w->blocks; block = last, to += held->chunks * count * CQ_FLOAT_ROWS) {
        const float *from = rows + w->block[block].column;
        last = end_of_section(w, block, &count);
        j->path->lay_out(from, columns, count, to + index * count * CQ_FLOAT_ROWS);
    }
}

/* Sums (runs, chunks, CQ_FLOAT_ROWS, 16) of some chunks that are held and some runs; behind them is room for a section of
 * a run. */
static void sum_floats(const job *j, const held_rows *held, int64_t from, int64_t to, int64_t first, int64_t chunks,
                       float *sums)
{
    const cq_layout *w = j->w;
    const int64_t size = chunks * CQ_FLOAT_ROWS * CQ_LANES;
    const float *section = (const float *)held->memory;
    float *panel = sums + (to - from) * size;
    memset(sums, 0, (size_t)((to - from) * size) * 4);
    for (int block = 0, last, columns; block < w->blocks; block = last) {
        last = end_of_section(w, block, &columns);
        for (int64_t run = from; run < to; ++run) {
            j->path->panel(w, run, block, last, panel);
            j->path->multiply_floats(section + first * columns * CQ_FLOAT_ROWS, chunks, panel, columns,
                                     sums + (run - from) * size);
        }
        section += held->chunks * columns * CQ_FLOAT_ROWS;
    }
}

/* Multiplies some chunks that are held by the runs `from` to `end`. */
static void multiply_runs(job *j, const held_rows *held, int64_t first, int64_t chunks, int64_t from, int64_t end)
{
    const int64_t most = chunks * CQ_FLOAT_ROWS, at = (held->first + first) * CQ_FLOAT_ROWS;
    const int64_t rows = j->rows - at < most ? j->rows - at : most;
    float *sums = cq_scratch(1, (size_t)(most * FLOAT_RUNS + SECTION + CQ_MAX_BLOCK + 32) * CQ_LANES * 4);
    if (sums == NULL)
        atomic_store(&j->state, CQ_NO_MEMORY);
    for (int64_t to; sums != NULL && from < end; from = to) {
        to = end - from < FLOAT_RUNS ? end : from + FLOAT_RUNS;
        sum_floats(j, held, from, to, first, chunks, sums);
        for (int64_t run = from; run < to; ++run)
            cq_put(j, sums + (run - from) * most * CQ_LANES, at, (int)rows, run);
    }
}

/* The chunks from `first`, `chunks` at most, with memory of this thread for them; 0 if there is none. */
static int hold(job *j, held_rows *held, int64_t first, int64_t chunks)
{
    held->first = first;
    held->chunks = j->chunks - first < chunks ? j->chunks - first : chunks;
    held->memory = cq_scratch(0, (size_t)(held->chunks * CQ_FLOAT_ROWS * j->w->columns) * 4);
    if (held->memory == NULL)
        atomic_store(&j->state, CQ_NO_MEMORY);
    return held->memory != NULL;
}

static void lay_out_task(void *context, int64_t index)
{
    job *j = context;
    lay_out(j, &j->held, index);
}

static void runs_task(void *context, int64_t index)
{
    job *j = context;
    const int64_t span = index / j->chunk_spans, part = index % j->chunk_spans, runs = j->w->runs;
    const int64_t first = j->held.chunks * part / j->chunk_spans;
    multiply_runs(j, &j->held, first, j->held.chunks * (part + 1) / j->chunk_spans - first, runs * span / j->spans,
                  runs * (span + 1) / j->spans);
}

/* Lays out a block of chunks and multiplies it by all runs: no thread waits for another one. */
static void block_task(void *context, int64_t index)
{
    job *j = context;
    const int64_t first = j->chunks * index / j->blocks;
    held_rows own = {0};
    if (!hold(j, &own, first, j->chunks * (index + 1) / j->blocks - first))
        return;
    for (int64_t c = 0; c < own.chunks; ++c)
        lay_out(j, &own, c);
    multiply_runs(j, &own, 0, own.chunks, 0, j->w->runs);
}

int cq_multiply_as_floats(job *j, int threads)
{
    const int64_t tasks = threads == 1 ? 1 : 4 * threads, width = j->w->columns < SECTION ? j->w->columns : SECTION;
    const int64_t most = HELD_VALUES / (width * CQ_FLOAT_ROWS), parts = (tasks + j->w->runs - 1) / j->w->runs;
    j->chunks = (j->rows + CQ_FLOAT_ROWS - 1) / CQ_FLOAT_ROWS;
    j->blocks = (j->chunks + most - 1) / most;
    if (j->blocks >= threads) {
        j->blocks = (j->blocks + threads - 1) / threads * threads;
        cq_parallel(threads, j->blocks, block_task, j);
    } else if (hold(j, &j->held, 0, j->chunks)) {
        j->spans = j->w->runs < tasks ? j->w->runs : tasks;
        j->chunk_spans = j->chunks < j->blocks * parts ? j->chunks : j->blocks * parts;
        cq_parallel(threads, j->chunks, lay_out_task, j);
        if (atomic_load(&j->state) == CQ_OK)
            cq_parallel(threads, j->spans * j->chunk_spans, runs_task, j);
    }
    return atomic_load(&j->state);
}
