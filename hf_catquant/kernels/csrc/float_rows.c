/* rotate and cluster_affine: rows of floats, in parallel. Every value is computed by one thread in an order that the
 * sizes decide, so results are the same for any number of threads. */
#include "catquant.h"

#include <string.h>

#define VALUES_A_THREAD (1 << 15) /* about ten microseconds of one */
#define SPAN 4096                 /* values of a row that are taken at once */
#define HELD_FLOATS (1 << 18)     /* of sums that are kept until their rows are complete */

static int64_t size_of(int dtype)
{
    return dtype == CQ_FLOAT32 ? 4 : 2;
}

static int useful(int threads, int64_t work)
{
    int64_t most = 1 + work / VALUES_A_THREAD;
    return most < threads ? (int)most : threads;
}

typedef struct {
    const cq_path *path;
    const char *x;
    char *out;
    const float *signs;
    int64_t rows, columns, tasks;
    int dtype, inverse, failed;
} rotate_job;

static void rotate_task(void *context, int64_t index)
{
    rotate_job *j = context;
    float *scratch = cq_scratch(1, (size_t)j->columns * 4);
    if (scratch == NULL) {
        __atomic_store_n(&j->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    int64_t bytes = j->columns * size_of(j->dtype);
    for (int64_t m = j->rows * index / j->tasks; m < j->rows * (index + 1) / j->tasks; ++m)
        j->path->rotate(j->x + m * bytes, j->dtype, j->columns, j->signs, j->inverse, j->out + m * bytes, scratch);
}

/* R x of rows (rows, columns), or R^T x; signs (columns,) of hf_catquant/rotation.py. */
int cq_rotate(const void *x, int dtype, int64_t rows, int64_t columns, const float *signs, int inverse, void *out,
              int path, int threads)
{
    rotate_job j = {cq_path_of(path), x, out, signs, rows, columns, 1, dtype, inverse, 0};
    threads = useful(threads, rows * columns);
    j.tasks = threads == 1 ? 1 : rows < 4 * threads ? rows : 4 * threads;
    cq_parallel(threads, j.tasks, rotate_task, &j);
    return j.failed ? CQ_NO_MEMORY : CQ_OK;
}

typedef struct {
    const cq_path *path;
    const char *y;
    char *out;
    const float *basis, *centroids, *gamma, *beta;
    int64_t rows, width, rank, clusters;
    int64_t spans, sums;   /* of a row; sums that a span gives for each row: rank, or clusters without a basis */
    int64_t first, blocks; /* blocks of CQ_ROW_BLOCK rows that are held now */
    float *partial;        /* (blocks, spans, CQ_ROW_BLOCK, sums) */
    float *square;         /* (clusters,): of the centroids */
    int32_t *cluster;      /* (blocks, CQ_ROW_BLOCK) */
    int dtype, failed;
} cluster_job;

static int64_t row_of(const cluster_job *j, int64_t block, int m)
{
    int64_t row = (j->first + block) * CQ_ROW_BLOCK + m;
    return row < j->rows ? row : j->rows - 1; /* the last block repeats the last row */
}

/* The span of the rows of a block, as floats. */
static int widen_rows(cluster_job *j, int64_t block, int64_t span, const float *y[CQ_ROW_BLOCK])
{
    int64_t from = span * SPAN, count = j->width - from < SPAN ? j->width - from : SPAN;
    float *scratch = NULL;
    if (j->dtype != CQ_FLOAT32) {
        scratch = cq_scratch(1, CQ_ROW_BLOCK * SPAN * 4);
        if (scratch == NULL)
            __atomic_store_n(&j->failed, 1, __ATOMIC_RELAXED);
    }
    for (int m = 0; m < CQ_ROW_BLOCK; ++m) {
        const char *row = j->y + (row_of(j, block, m) * j->width + from) * size_of(j->dtype);
        y[m] = (const float *)row;
        if (scratch != NULL) {
            j->path->widen(row, j->dtype, count, scratch + m * SPAN);
            y[m] = scratch + m * SPAN;
        }
    }
    return scratch != NULL || j->dtype == CQ_FLOAT32;
}

static void add_up(cluster_job *j, int64_t block, int64_t span, const float *const y[CQ_ROW_BLOCK])
{
    int64_t from = span * SPAN, count = j->width - from < SPAN ? j->width - from : SPAN;
    float *out = j->partial + (block * j->spans + span) * CQ_ROW_BLOCK * j->sums;
    if (j->basis != NULL) {
        j->path->project(y, j->basis + from * j->rank, count, j->rank, out);
        return;
    }
    for (int m = 0; m < CQ_ROW_BLOCK; ++m)
        for (int64_t c = 0; c < j->clusters; ++c)
            out[m * j->clusters + c] = j->path->dot(y[m], j->centroids + c * j->width + from, count);
}

static void choose(cluster_job *j, int64_t block)
{
    float *sum = j->partial + block * j->spans * CQ_ROW_BLOCK * j->sums;
    for (int64_t span = 1; span < j->spans; ++span)
        for (int64_t i = 0; i < CQ_ROW_BLOCK * j->sums; ++i)
            sum[i] += sum[span * CQ_ROW_BLOCK * j->sums + i];
    for (int m = 0; m < CQ_ROW_BLOCK; ++m, sum += j->sums) {
        float best = 0;
        int32_t nearest = 0;
        for (int32_t c = 0; c < j->clusters; ++c) {
            float product = j->basis == NULL ? sum[c] : j->path->dot(sum, j->centroids + c * j->rank, j->rank);
            float distance = j->square[c] - 2.0f * product;
            /* The first of the least; what is no number is the least of all, as for torch.argmin. */
            if (c == 0 || distance < best || (distance != distance && best == best)) {
                best = distance;
                nearest = c;
            }
        }
        j->cluster[block * CQ_ROW_BLOCK + m] = nearest;
    }
}

static void write_rows(cluster_job *j, int64_t block, int64_t span, const float *const y[CQ_ROW_BLOCK])
{
    int64_t from = span * SPAN, count = j->width - from < SPAN ? j->width - from : SPAN;
    for (int m = 0; m < CQ_ROW_BLOCK && (j->first + block) * CQ_ROW_BLOCK + m < j->rows; ++m) {
        int64_t c = j->cluster[block * CQ_ROW_BLOCK + m] * j->width + from;
        j->path->affine(y[m], j->gamma + c, j->beta + c, count,
                        j->out + (row_of(j, block, m) * j->width + from) * size_of(j->dtype), j->dtype);
    }
}

static void sum_task(void *context, int64_t index)
{
    cluster_job *j = context;
    const float *y[CQ_ROW_BLOCK];
    if (widen_rows(j, index / j->spans, index % j->spans, y))
        add_up(j, index / j->spans, index % j->spans, y);
}

static void choose_task(void *context, int64_t block)
{
    choose(context, block);
}

static void write_task(void *context, int64_t index)
{
    cluster_job *j = context;
    const float *y[CQ_ROW_BLOCK];
    if (widen_rows(j, index / j->spans, index % j->spans, y))
        write_rows(j, index / j->spans, index % j->spans, y);
}

/* Rows that one span holds are read once. */
static void whole_task(void *context, int64_t block)
{
    cluster_job *j = context;
    const float *y[CQ_ROW_BLOCK];
    if (!widen_rows(j, block, 0, y))
        return;
    add_up(j, block, 0, y);
    choose(j, block);
    write_rows(j, block, 0, y);
}

/* gamma[c] * y + beta[c] of rows y (rows, width), c the nearest of the centroids (clusters, rank) to y times the basis
 * (width, rank), or to y itself where the basis is NULL and rank is width. All but y and out are float32. */
int cq_cluster_affine(const void *y, int dtype, int64_t rows, int64_t width, const float *basis, int64_t rank,
                      const float *centroids, int64_t clusters, const float *gamma, const float *beta, void *out,
                      int path, int threads)
{
    cluster_job j = {.path = cq_path_of(path),
                     .y = y,
                     .out = out,
                     .basis = basis,
                     .centroids = centroids,
                     .gamma = gamma,
                     .beta = beta,
                     .rows = rows,
                     .width = width,
                     .rank = rank,
                     .clusters = clusters,
                     .spans = (width + SPAN - 1) / SPAN,
                     .sums = basis == NULL ? clusters : rank,
                     .dtype = dtype};
    int64_t blocks = (rows + CQ_ROW_BLOCK - 1) / CQ_ROW_BLOCK, sums = j.spans * CQ_ROW_BLOCK * j.sums;
    int64_t held = 1 + HELD_FLOATS / sums;
    held = held < blocks ? held : blocks;
    j.partial = cq_scratch(0, (size_t)(held * (sums + CQ_ROW_BLOCK) + clusters) * 4);
    if (j.partial == NULL)
        return CQ_NO_MEMORY;
    j.square = j.partial + held * sums;
    j.cluster = (int32_t *)(j.square + clusters);
    for (int64_t c = 0; c < clusters; ++c)
        j.square[c] = j.path->dot(centroids + c * rank, centroids + c * rank, rank);
    threads = useful(threads, rows * width * (1 + j.sums / 16));
    for (j.first = 0; j.first < blocks; j.first += held) {
        j.blocks = blocks - j.first < held ? blocks - j.first : held;
        if (j.spans == 1) {
            cq_parallel(threads, j.blocks, whole_task, &j);
            continue;
        }
        cq_parallel(threads, j.blocks * j.spans, sum_task, &j);
        cq_parallel(threads, j.blocks, choose_task, &j);
        cq_parallel(threads, j.blocks * j.spans, write_task, &j);
    }
    return j.failed ? CQ_NO_MEMORY : CQ_OK;
}
