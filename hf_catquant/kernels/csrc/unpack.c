/* Packed rows to codes or to w_hat, some rows or all of them. */
#include "catquant.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

/* Codes that are worth another thread. */
#define CODES_A_THREAD (1 << 16)

typedef struct {
    const uint8_t *packed;
    const char *scale, *offset;
    const int64_t *indices; /* rows to take, or NULL for all in order */
    const cq_path *path;
    char *out;
    int64_t rows, columns, groups, group_width, row_bytes, spans;
    int format, wide_scale, dtype;
    atomic_int failed;
} job;

static void run_rows(job *j, int64_t from, int64_t to, uint8_t *codes, float *scale, float *offset)
{
    int scale_dtype = j->wide_scale ? CQ_FLOAT32 : CQ_FLOAT16;
    int64_t size = j->wide_scale ? 4 : 2, out_size = j->dtype == CQ_FLOAT32 ? 4 : 2;
    for (int64_t i = from; i < to; ++i) {
        int64_t row = j->indices == NULL ? i : j->indices[i];
        cq_decode_row(j->format, j->packed + row * j->row_bytes, j->columns, j->group_width, codes);
        j->path->widen(j->scale + row * j->groups * size, scale_dtype, j->groups, scale);
        if (j->offset != NULL)
            j->path->widen(j->offset + row * j->groups * size, scale_dtype, j->groups, offset);
        j->path->dequantize(codes, scale, j->offset == NULL ? NULL : offset, j->columns, j->group_width,
                            &cq_formats[j->format], j->out + i * j->columns * out_size, j->dtype);
    }
}

static void dequantize_task(void *context, int64_t index)
{
    job *j = context;
    char *memory = cq_scratch(1, (size_t)(j->groups * 8 + j->columns));
    if (memory == NULL) {
        atomic_store(&j->failed, 1);
        return;
    }
    float *scale = (float *)memory;
    run_rows(j, j->rows * index / j->spans, j->rows * (index + 1) / j->spans, (uint8_t *)(scale + 2 * j->groups),
             scale, scale + j->groups);
}

/* w_hat of `rows` packed rows, those at `indices` if it is not NULL, into out (rows, columns): the same bits as the
 * reference. */
int cq_dequantize(int format, const uint8_t *packed, int64_t row_bytes, const void *scale, const void *offset,
                  int wide_scale, const int64_t *indices, int64_t rows, int64_t columns, int64_t group_width,
                  void *out, int dtype, int path, int threads)
{
    int64_t useful = 1 + rows * columns / CODES_A_THREAD;
    job j = {.packed = packed,
             .scale = scale,
             .offset = offset,
             .indices = indices,
             .path = cq_path_of(path),
             .out = out,
             .rows = rows,
             .columns = columns,
             .groups = (columns + group_width - 1) / group_width,
             .group_width = group_width,
             .row_bytes = row_bytes,
             .format = format,
             .wide_scale = wide_scale,
             .dtype = dtype};
    threads = useful < threads ? (int)useful : threads;
    j.spans = threads == 1 ? 1 : rows < 4 * threads ? rows : 4 * threads;
    atomic_init(&j.failed, 0);
    cq_parallel(threads, j.spans, dequantize_task, &j);
    return atomic_load(&j.failed) ? CQ_NO_MEMORY : CQ_OK;
}

static void unpack_task(void *context, int64_t index)
{
    job *j = context;
    for (int64_t row = j->rows * index / j->spans; row < j->rows * (index + 1) / j->spans; ++row)
        cq_decode_row(j->format, j->packed + row * j->row_bytes, j->columns, j->group_width,
                      (uint8_t *)j->out + row * j->columns);
}

/* Codes (rows, columns). */
void cq_unpack(int format, const uint8_t *packed, int64_t row_bytes, int64_t rows, int64_t columns,
               int64_t group_width, uint8_t *out, int threads)
{
    int64_t useful = 1 + rows * columns / CODES_A_THREAD;
    job j = {.packed = packed,
             .out = (char *)out,
             .rows = rows,
             .columns = columns,
             .group_width = group_width,
             .row_bytes = row_bytes,
             .format = format};
    threads = useful < threads ? (int)useful : threads;
    j.spans = threads == 1 ? 1 : rows < 4 * threads ? rows : 4 * threads;
    cq_parallel(threads, j.spans, unpack_task, &j);
}
