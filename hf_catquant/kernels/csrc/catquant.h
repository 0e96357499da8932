/* The CPU kernels: what their files share. C ABI, no Python, no torch.
 *
 *     y[m, n] = sum_k x[m, k] * w_hat[n, k] + bias[n]      w_hat[n, k] = scale[n, g] * level[n, k] + offset[n, g]
 *
 * Every product is one of small integers. A row of x becomes `parts` digits of 8 bits, x = xscale * sum_p digit_p *
 * 256^(parts-1-p) (3 digits hold a float32, 2 hold a 16-bit float, 1 holds activations of 8 bits or fewer), and a
 * level is value - zero with an unsigned value of at most 8 bits. So for one block b of columns with one scale and
 * offset
 *
 *     y[m, n] += xscale[m] * (scale[n, b] * sum_p 256^(parts-1-p) * (sum_k digit_p * value - zero * sum_k digit_p)
 *                             + offset[n, b] * sum_k x_int[m, k])
 *
 * where the sums over k are exact in int32.
 *
 * The layout of a weight, built once from its packed bytes: 16 rows ("lanes") at a time, block after block, each block
 * its 16 scales, its 16 offsets, then units. A unit is one line of 64 bytes (three for int3). Byte 4 * lane + j of a
 * line holds, in bit fields one above the other, the values at columns 4 * q + j of its quads q. So one load serves
 * several dot products of 4 columns for 16 rows, and the same bytes, once unpacked, are the rows of an AMX tile.
 */
#ifndef CATQUANT_H
#define CATQUANT_H

#include <stddef.h>
#include <stdint.h>

enum { CQ_BINARY, CQ_TERNARY, CQ_INT2, CQ_INT3, CQ_INT4, CQ_INT8, CQ_FORMATS };
enum { CQ_FLOAT32, CQ_FLOAT16, CQ_BFLOAT16 };
enum { CQ_SCALAR, CQ_AVX2, CQ_AVX512, CQ_AMX, CQ_NEON, CQ_PATHS };
enum { CQ_OK = 0, CQ_NOT_FINITE = 1, CQ_NO_MEMORY = 2 };

#define CQ_LANES 16
#define CQ_TILE 64        /* columns that an AMX tile holds; blocks of x are padded with zeros to a multiple of it */
#define CQ_MAX_BLOCK 512  /* columns of a block: 512 * 255 * 128 stays below 2^24, so sums are exact in float32 too */
#define CQ_MAX_ROWS 16    /* rows of x in a chunk */
#define CQ_WINDOW_ROWS 48 /* rows of a convolution that are packed together: whole chunks of 12, 6 and 4 */
#define CQ_MARGIN 32      /* twice CQ_MAX_ROWS: integers two apart may be read together */
#define CQ_MAX_PARTS 3
#define CQ_LARGE_PAGE (2 << 20)
#define CQ_ROW_BLOCK 4 /* rows of floats that are multiplied together */
#define CQ_FLOAT_ROWS 6 /* the same by weights as floats: sums of 16 lanes for each are 12 of AVX2's 16 registers */

/* How a format lies in memory: its packed words (digits codes of base radix in nbytes bytes) and its units in a
 * layout. */
typedef struct {
    int radix, digits, nbytes;
    int unit_columns, unit_lines;
    int step, zero; /* level = step * code - zero */
} cq_format;

extern const cq_format cq_formats[CQ_FORMATS];

typedef struct {
    int64_t byte;   /* where the block starts in the run of its 16 rows */
    int32_t column; /* first column, and how many */
    int32_t width;
    int32_t tile; /* first tile of CQ_TILE columns in x */
    int32_t group;
} cq_block;

/* A layout: this header, its blocks, then at `stream` the rows. One piece of memory without pointers, so that it can
 * be moved. */
typedef struct {
    int64_t rows, columns, groups, group_width;
    int64_t runs, run_bytes, stream, bytes; /* runs of 16 rows */
    int32_t format, affine, wide_scale;     /* wide_scale: scales and offsets are float32, not float16 */
    int32_t blocks, tiles, header;          /* header: bytes of scales and offsets in front of a block's units */
    cq_block block[];
} cq_layout;

/* How x becomes digits. */
typedef struct {
    int parts;     /* digits of a float activation, or 1 */
    int quantized; /* 0: digits of floats, 1: one range a row, 2: the range given here */
    int affine;
    float low, high; /* levels of the activation format */
    float scale, offset;
} cq_activation;

/* Where the rows of a convolution lie in x (batch, channels, height, width): row r is position r of the outputs of all
 * inputs, its columns are (channel, y, x) under the kernel; what is outside is zero. */
typedef struct {
    int64_t batch, channels, height, width, out_height, out_width;
    int64_t kernel_height, kernel_width, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x;
} cq_window;

/* Integers of x under a range that is given: (images, channels, lines, width), of the images from `image` and the lines
 * from `top`, with CQ_MARGIN bytes before and after them. */
typedef struct {
    int8_t *integers;
    int64_t image, images, top, lines;
} cq_lines;

/* Rows of x as the products read them. Digit p of row m, tile t: x + (t * parts * rows + p * rows + m) * CQ_TILE. */
typedef struct {
    int rows, parts, filled; /* rows: as padded with zeros; filled: those that are there */
    int8_t *x;
    int32_t *zero_sum; /* (blocks, parts * rows): -zero * sum of the digits of a block */
    float *sum;        /* (blocks, rows): sum of the integers x / xscale of a block */
    float *scale;      /* (rows,): xscale */
} cq_chunk;

typedef struct {
    /* Rows of the chunk in which `rows` rows of x, or the first of them, are best multiplied; at most CQ_MAX_ROWS. */
    int (*chunk_rows)(int parts, int64_t rows);
    /* Turns rows of x, `first` and on (row_stride elements apart), into digits; returns CQ_NOT_FINITE where a value is
     * not. `scratch` holds two rows of floats. */
    int (*pack)(const cq_layout *w, const cq_activation *how, const void *x, int dtype, int64_t row_stride,
                int64_t first, cq_chunk *out, float *scratch);
    /* The same of the rows of a convolution, for `chunks` chunks of CQ_WINDOW_ROWS rows together at most. `scratch`
     * holds CQ_MAX_ROWS rows of floats. */
    int (*pack_window)(const cq_layout *w, const void *x, int dtype, const cq_window *window, int64_t first,
                       cq_chunk *chunk, int chunks, void *scratch);
    /* The same of integers that are multiples of `scale`. */
    void (*pack_lines)(const cq_layout *w, float scale, const cq_lines *held, const cq_window *window, int64_t first,
                       cq_chunk *chunk, int chunks, void *scratch);
    /* result[m * 16 + lane] of one run of rows, without bias. */
    void (*run)(const cq_layout *w, int64_t run, const cq_chunk *chunk, float *result);
    /* The integers of values under a range that is given; 0 if a value is not finite. */
    int (*integers)(const void *x, int dtype, int64_t count, const cq_activation *how, int8_t *out);
    /* result (rows, 16) plus shift (16,), lane by lane: row m of `lane` goes to out[lane * stride + m]. */
    void (*store_lanes)(const float *result, int rows, const float *shift, int lanes, void *out, int64_t stride,
                        int dtype);
    void (*store)(const float *result, const void *bias, int bias_dtype, void *out, int dtype, int count);
    /* One row of w_hat from its codes; scale and offset (groups,) float32, offset may be NULL. */
    void (*dequantize)(const uint8_t *codes, const float *scale, const float *offset, int64_t columns,
                       int64_t group_width, const cq_format *format, void *out, int dtype);
    void (*widen)(const void *values, int dtype, int64_t count, float *out);
    /* What float_rows.h says of them. */
    void (*rotate)(const void *x, int dtype, int64_t columns, const float *signs, int inverse, void *out,
                   float *scratch);
    void (*project)(const float *const y[CQ_ROW_BLOCK], const float *basis, int64_t count, int64_t rank, float *out);
    float (*dot)(const float *a, const float *b, int64_t count);
    void (*affine)(const float *y, const float *gamma, const float *beta, int64_t count, void *out, int dtype);
    /* Many rows of floats, where they are faster than digits; else all three are NULL. Rows (CQ_FLOAT_ROWS, columns),
     * `stride` apart, to (columns, CQ_FLOAT_ROWS); the blocks `first` to `last` of a run as floats (columns, 16), behind
     * which there is room for a unit; and what they add to sums (chunks, CQ_FLOAT_ROWS, 16) with x (chunks, columns,
     * CQ_FLOAT_ROWS). */
    void (*lay_out)(const float *rows, int64_t stride, int columns, float *out);
    void (*panel)(const cq_layout *w, int64_t run, int first, int last, float *out);
    void (*multiply_floats)(const float *x, int64_t chunks, const float *panel, int columns, float *sums);
} cq_path;

/* Codes of one packed row; */
void cq_decode_row(int format, const uint8_t *packed, int64_t columns, int64_t group_width, uint8_t *codes);

size_t cq_chunk_bytes(const cq_layout *w, int rows, int parts);
void cq_chunk_place(const cq_layout *w, int rows, int parts, void *memory, cq_chunk *out);

extern const cq_path cq_scalar_path, cq_avx2_path, cq_avx512_path, cq_neon_path;

int cq_has_path(int path);
const cq_path *cq_path_of(int path); /* CQ_AMX gives the path of its small products, CQ_AVX512 */

/* chunk[0] to chunk[chunks - 1], 16 rows each, times the rows [32 * pair, 32 * pair + 32) of w, plus bias, into out:
 * its first row is that of chunk[0], its first column that of w. Between cq_amx_begin() and cq_amx_end(), which set up
 * the tiles of a thread. */
void cq_amx_pair(const cq_layout *w, int64_t pair, const cq_chunk *chunk, int chunks, const void *bias, int bias_dtype,
                 void *out, int dtype, int64_t out_stride);
void cq_amx_begin(void);
void cq_amx_end(void);

/* One row of 2 or 3 digits times binary rows by tables of sums, of cq_lookup_bytes(), on a 64-byte boundary, where
 * cq_has_lookup(): cq_lookup_runs() writes the results of the runs `first` and on, as cq_path.run does, and returns of
 * how many: at least 1, at most 4 and `runs`. */
int cq_has_lookup(void);
size_t cq_lookup_bytes(const cq_layout *w, int parts);
void cq_lookup_build(const cq_layout *w, const cq_chunk *chunk, uint8_t *tables);
int cq_lookup_runs(const cq_layout *w, int64_t first, int64_t runs, const cq_chunk *chunk, const uint8_t *tables,
                   float *result);

/* Products of integers from registers, as many as the processor can do; a round is so many pairs. */
#define CQ_AMX_PRODUCTS (4 * 16 * 16 * 64)
#define CQ_AVX512_PRODUCTS (12 * 64)
void cq_amx_peak(int64_t rounds);
void cq_avx512_peak(int64_t rounds);

/* Memory of the calling thread, on a 64-byte boundary, valid until the same slot (0 or 1) is asked for again; NULL if
 * there is none. */
void *cq_scratch(int slot, size_t bytes);

/* Runs task(context, i) for i in [0, tasks) on at most `threads` threads, this one among them; every task once. */
void cq_parallel(int threads, int64_t tasks, void (*task)(void *context, int64_t index), void *context);

#endif
