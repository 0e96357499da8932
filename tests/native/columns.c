/* Choosing levels of a block of columns (csrc/columns.c) against the same steps, one row after the other. Run under the
 * sanitizers and under an emulator by `make test-native`, as products.c is.
 */
#include "catquant.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct {
    const float *scale, *offset, *square;
    int64_t columns, rows, first, last, down, across;
    float lowest, step, most;
} cq_columns;

void cq_descend(const cq_columns *c, int64_t runs, const float *slope, const float *old, float *levels, float *change,
                int path, int threads);
void cq_feed_back(const cq_columns *c, int64_t runs, const float *target, const float *carried, float *levels,
                  float *errors, int path, int threads);

enum { RUNS = 2 };

static uint64_t state = 1;

static float draw(void)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (float)(state >> 33) / (float)(1u << 30) - 1.0f;
}

/* Exactly so much memory, that the sanitizers see what lies behind it. */
static float *drawn(int64_t count)
{
    float *values = malloc((size_t)count * 4);
    if (values == NULL)
        exit(2);
    for (int64_t i = 0; i < count; ++i)
        values[i] = draw();
    return values;
}

static float nearest(const cq_columns *c, float value)
{
    float code = rintf((value - c->lowest) / c->step);
    return fminf(fmaxf(code, 0), c->most) * c->step + c->lowest;
}

/* The levels and changes, or errors, of one row: `held` is its slope, or what is carried, and is overwritten. */
static void row(const cq_columns *c, int64_t run, int64_t r, int backwards, const float *target, const float *old,
                float *held, float *levels, float *change)
{
    const float *square = c->square + run * c->columns * c->columns;
    for (int64_t i = c->first; i < c->last; ++i) {
        int64_t k = backwards ? c->last - 1 - (i - c->first) : i, at = (run * c->columns + k) * c->rows + r;
        float pivot = square[k * (c->down + c->across)], scale = c->scale[at], offset = c->offset[at];
        float value = backwards ? target[at] : scale * old[at] + offset;
        value += held[k] / pivot;
        levels[k] = nearest(c, (value - offset) / (scale > 0 ? scale : 1));
        change[k] = backwards ? target[at] - scale * levels[k] - offset : scale * (levels[k] - old[at]);
        for (int64_t j = c->first; j < c->last; ++j) {
            if (backwards && j < k)
                held[j] += square[k * c->down + j * c->across] * change[k];
            if (!backwards && j > k)
                held[j] -= square[j * c->down + k * c->across] * change[k];
        }
    }
}

static int check(int path, int64_t columns, int64_t rows, int64_t first, int64_t last, int backwards, int across)
{
    int64_t whole = columns * rows, block = (last - first) * rows;
    float *scale = drawn(RUNS * whole), *offset = drawn(RUNS * whole), *square = drawn(RUNS * columns * columns);
    float *aim = drawn(RUNS * whole), *old = drawn(RUNS * whole), *levels = drawn(RUNS * whole);
    float *carried = drawn(RUNS * block), *change = drawn(RUNS * (backwards ? whole : block));
    float *held = drawn(columns), *wanted = drawn(columns), *moved = drawn(columns);
    cq_columns c = {scale, offset, square, columns, rows, first, last, columns, 1, -2, 1, 3};
    int wrong = 0;
    if (across) {
        c.down = 1;
        c.across = columns;
    }
    for (int64_t i = 0; i < RUNS * whole; ++i) {
        scale[i] = i % 7 ? fabsf(scale[i]) : 0;
        old[i] = nearest(&c, 3 * old[i]);
    }
    if (backwards)
        cq_feed_back(&c, RUNS, aim, carried, levels, change, path, 2);
    else
        cq_descend(&c, RUNS, aim, old, levels, change, path, 2);
    for (int64_t run = 0; run < RUNS; ++run)
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t k = first; k < last; ++k)
                held[k] = backwards ? carried[run * block + (k - first) * rows + r]
                                    : aim[run * whole + k * rows + r];
            row(&c, run, r, backwards, aim, old, held, wanted, moved);
            for (int64_t k = first; k < last; ++k) {
                int64_t at = run * whole + k * rows + r;
                wrong += levels[at] != wanted[k];
                wrong += change[backwards ? at : run * block + (k - first) * rows + r] != moved[k];
            }
        }
    float *all[] = {scale, offset, square, aim, old, levels, carried, change, held, wanted, moved};
    for (size_t i = 0; i < sizeof all / sizeof *all; ++i)
        free(all[i]);
    if (wrong)
        printf("path %d, %d x %d, columns %d to %d: %d values are wrong\n", path, (int)columns, (int)rows, (int)first,
               (int)last, wrong);
    return wrong != 0;
}

static int has(int path)
{
#if defined(__x86_64__)
    if (path == CQ_AVX2)
        return __builtin_cpu_supports("avx2") != 0;
#endif
    return path == CQ_SCALAR;
}

int main(void)
{
    static const int64_t cases[][4] = {{128, 32, 0, 128}, {200, 70, 64, 192}, {5, 1, 0, 5}, {9, 33, 8, 9}};
    int failures = 0;
    for (int path = 0; path < CQ_PATHS; ++path)
        for (size_t i = 0; has(path) && i < sizeof cases / sizeof *cases; ++i)
            for (int kind = 0; kind < 4; ++kind)
                failures += check(path, cases[i][0], cases[i][1], cases[i][2], cases[i][3], kind & 1, kind & 2);
    printf(failures ? "%d failures\n" : "columns: all right\n", failures);
    return failures != 0;
}
