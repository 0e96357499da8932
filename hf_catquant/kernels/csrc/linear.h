/* A product of rows of x with a layout, as its files share it. */
#ifndef CATQUANT_LINEAR_H
#define CATQUANT_LINEAR_H

#include "catquant.h"

#include <stdatomic.h>

/* Chunks that are packed, the `first` of all and on, and the lines of x that they are made from if their range is given. */
typedef struct {
    char *memory;
    int64_t first, chunks;
    cq_lines lines;
} held_rows;

typedef struct {
    const cq_layout *w;
    const cq_activation *how;
    const cq_path *path;
    const char *x;
    const char *bias;
    char *out;
    const cq_window *window; /* of a convolution, whose results go to (batch, rows of w, positions); NULL: none */
    int64_t rows, x_stride, out_stride;
    int dtype, bias_dtype, chunk_rows, amx;
    held_rows held;  /* what all threads multiply now */
    uint8_t *tables; /* of the one row of x whose sums are looked up, where table_bytes is not 0 */
    size_t chunk_bytes, table_bytes;
    int64_t chunks, blocks;     /* all chunks, and the parts that they are cut in */
    int64_t spans, chunk_spans; /* parts that the runs and the chunks are cut in */
    atomic_int state;
} job;

static inline int cq_size_of(int dtype)
{
    return dtype == CQ_FLOAT32 ? 4 : 2;
}

/* Stores results (filled, 16) of a run and the rows of x from `first`, plus bias. */
void cq_put(const job *j, float *result, int64_t first, int filled, int64_t run);

/* Multiplies rows by runs, both as floats; where the path has such products. */
int cq_multiply_as_floats(job *j, int threads);

#endif
