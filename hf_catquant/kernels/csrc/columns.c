/* The two passes of hf_catquant/solvers/_descent.py over a block of columns: levels are chosen column after column, each
 * one knowing the errors of those before it. Matrices are transposed, (runs, columns, rows): a column of the weight is
 * contiguous. Rows of the weight do not know each other, so LANES of them go through the block at a time, in the first
 * cache, and results are the same for any number of threads.
 *
 * Operations are those of the torch code, in its order, none joined: both give the same bits.
 *
 * The path for AVX2 is a function of this file, compiled for its instructions, as in bits.c.
 */
#include "catquant.h"

#include <string.h>

#define LANES 32
#define BLOCK 128              /* the most columns of a block: with LANES rows they fill 16 KiB */
#define ROUNDS 12582912.0f     /* 1.5 * 2^23: a sum with it is rounded half to even */
#define VALUES_A_THREAD 4096   /* about ten microseconds of one */

#define ALWAYS static inline __attribute__((always_inline))

/* A block of columns of every run, as native.py lays it out. `square` (runs, columns, columns) has its rows `down` and
 * its columns `across` elements apart. Levels are lowest + step * (0 to most). */
typedef struct {
    const float *scale, *offset, *square;
    int64_t columns, rows, first, last, down, across;
    float lowest, step, most;
} cq_columns;

typedef struct {
    const cq_columns *c;
    const float *aim;  /* descend: the slope, feed_back: the target */
    const float *from; /* descend: the levels so far, feed_back: what errors of other blocks carry to this one */
    float *levels;
    float *change; /* descend: of the block's values, feed_back: the errors of all columns */
    int64_t chunks;
    int path, backwards;
} job;

/* Where the rows of a chunk begin, at the first column of the block, of tensors of all columns and of the block. */
typedef struct {
    int64_t whole, block, square;
} place;

ALWAYS float nearest(const cq_columns *c, float value)
{
    float code = (value - c->lowest) / c->step;
    code = code < 0.0f ? 0.0f : code > c->most ? c->most : code; /* no number stays none */
    return (code + ROUNDS - ROUNDS) * c->step + c->lowest;
}

/* One sweep of coordinate descent over the block. */
ALWAYS void descend(const job *j, place at, const int lanes)
{
    const cq_columns *c = j->c;
    const int width = (int)(c->last - c->first);
    float slope[BLOCK][LANES], moved[LANES];
    for (int k = 0; k < width; ++k)
        memcpy(slope[k], j->aim + at.whole + k * c->rows, (size_t)lanes * 4);
    for (int k = 0; k < width; ++k) {
        const int64_t column = at.whole + k * c->rows;
        const float *scale = c->scale + column, *offset = c->offset + column, *old = j->from + column;
        const float *square = c->square + at.square + k * c->across;
        const float pivot = square[k * c->down];
        float *chosen = j->levels + column, *change = j->change + at.block + k * c->rows;
        for (int lane = 0; lane < lanes; ++lane) {
            float value = scale[lane] * old[lane] + offset[lane] + slope[k][lane] / pivot;
            float divisor = scale[lane] > 0.0f ? scale[lane] : 1.0f;
            float level = nearest(c, (value - offset[lane]) / divisor);
            moved[lane] = scale[lane] * (level - old[lane]);
            chosen[lane] = level;
            change[lane] = moved[lane];
        }
        for (int i = k + 1; i < width; ++i) {
            const float share = square[i * c->down];
            for (int lane = 0; lane < lanes; ++lane)
                slope[i][lane] -= share * moved[lane];
        }
    }
}

/* Error feedback, from the last column of the block to the first. */
ALWAYS void feed_back(const job *j, place at, const int lanes)
{
    const cq_columns *c = j->c;
    const int width = (int)(c->last - c->first);
    float carried[BLOCK][LANES], missed[LANES];
    for (int k = 0; k < width; ++k)
        memcpy(carried[k], j->from + at.block + k * c->rows, (size_t)lanes * 4);
    for (int k = width - 1; k >= 0; --k) {
        const int64_t column = at.whole + k * c->rows;
        const float *scale = c->scale + column, *offset = c->offset + column, *target = j->aim + column;
        const float *square = c->square + at.square + k * c->down;
        const float pivot = square[k * c->across];
        float *chosen = j->levels + column, *error = j->change + column;
        for (int lane = 0; lane < lanes; ++lane) {
            float value = target[lane] + carried[k][lane] / pivot;
            float divisor = scale[lane] > 0.0f ? scale[lane] : 1.0f;
            float level = nearest(c, (value - offset[lane]) / divisor);
            missed[lane] = target[lane] - scale[lane] * level - offset[lane];
            chosen[lane] = level;
            error[lane] = missed[lane];
        }
        for (int i = 0; i < k; ++i) {
            const float share = square[i * c->across];
            for (int lane = 0; lane < lanes; ++lane)
                carried[i][lane] += share * missed[lane];
        }
    }
}

#define PASSES(name, target) \
    target static void name##_pass(const job *j, place at, int lanes) \
    { \
        if (j->backwards && lanes == LANES) \
            feed_back(j, at, LANES); \
        else if (j->backwards) \
            feed_back(j, at, lanes); \
        else if (lanes == LANES) \
            descend(j, at, LANES); \
        else \
            descend(j, at, lanes); \
    }

PASSES(scalar, )
#if defined(__x86_64__)
PASSES(avx2, __attribute__((target("avx2"))))
#endif

static void pass(void *context, int64_t index)
{
    const job *j = context;
    const cq_columns *c = j->c;
    const int64_t run = index / j->chunks, lane = index % j->chunks * LANES;
    const int lanes = c->rows - lane < LANES ? (int)(c->rows - lane) : LANES;
    const place at = {
        (run * c->columns + c->first) * c->rows + lane,
        run * (c->last - c->first) * c->rows + lane,
        run * c->columns * c->columns + c->first * (c->down + c->across),
    };
#if defined(__x86_64__)
    if (j->path != CQ_SCALAR) { /* wider registers would gain nothing: products between blocks take longer */
        avx2_pass(j, at, lanes);
        return;
    }
#endif
    scalar_pass(j, at, lanes);
}

static void run(job *j, int64_t runs, int threads)
{
    const cq_columns *c = j->c;
    const int64_t useful = 1 + runs * c->rows * (c->last - c->first) / VALUES_A_THREAD;
    j->chunks = (c->rows + LANES - 1) / LANES;
    cq_parallel(useful < threads ? (int)useful : threads, runs * j->chunks, pass, j);
}

/* The levels (runs, columns, rows) of a block's columns, of at most BLOCK, after a sweep that begins with `old`, of the
 * same shape, and the slope at them; and how much the values of the block, (runs, last - first, rows), change. */
void cq_descend(const cq_columns *c, int64_t runs, const float *slope, const float *old, float *levels, float *change,
                int path, int threads)
{
    job j = {.c = c, .aim = slope, .from = old, .levels = levels, .change = change, .path = path};
    run(&j, runs, threads);
}

/* The levels and errors (runs, columns, rows) of a block's columns, of at most BLOCK, for a target of that shape, where
 * errors of other blocks carry `carried` (runs, last - first, rows) to this one. */
void cq_feed_back(const cq_columns *c, int64_t runs, const float *target, const float *carried, float *levels,
                  float *errors, int path, int threads)
{
    job j = {
        .c = c, .aim = target, .from = carried, .levels = levels, .change = errors, .path = path, .backwards = 1};
    run(&j, runs, threads);
}
