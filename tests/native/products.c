/* The kernels without Python: every path of this processor against sums in double, over formats, groups, tails, rows,
 * dtypes and threads. Run under AddressSanitizer and UndefinedBehaviorSanitizer by `make test-native`, and under an
 * emulator for other processors: every buffer has exactly the bytes that it needs.
 */
#include "catquant.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int64_t cq_layout_bytes(int format, int64_t rows, int64_t columns, int64_t group_width, int affine, int wide_scale);
int cq_layout_build(int format, int64_t rows, int64_t columns, int64_t group_width, int wide_scale,
                    const uint8_t *packed, int64_t row_bytes, const void *scale, const void *offset, int threads,
                    void *out);
int cq_linear(const cq_layout *w, const cq_activation *how, const void *x, int64_t rows, int64_t row_stride, int dtype,
              const void *bias, int bias_dtype, void *out, int path, int threads);
int cq_dequantize(int format, const uint8_t *packed, int64_t row_bytes, const void *scale, const void *offset,
                  int wide_scale, const int64_t *indices, int64_t rows, int64_t columns, int64_t group_width,
                  void *out, int dtype, int path, int threads);

int cq_conv(const cq_layout *w, const cq_activation *how, const cq_window *window, const void *x, int dtype,
            const void *bias, int bias_dtype, void *out, int path, int threads);
int cq_rotate(const void *x, int dtype, int64_t rows, int64_t columns, const float *signs, int inverse, void *out,
              int path, int threads);
int cq_cluster_affine(const void *y, int dtype, int64_t rows, int64_t width, const float *basis, int64_t rank,
                      const float *centroids, int64_t clusters, const float *gamma, const float *beta, void *out,
                      int path, int threads);

static const char *path_names[CQ_PATHS] = {"scalar", "avx2", "avx512", "amx", "neon"};
static uint64_t state = 1;
static int failures;

static uint32_t draw(uint32_t limit)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)((state >> 33) % limit);
}

static float draw_float(void)
{
    return (float)draw(2001) / 500.0f - 2.0f;
}

static void *exactly(size_t bytes)
{
    void *memory = malloc(bytes == 0 ? 1 : bytes);
    if (memory == NULL)
        exit(2);
    return memory;
}

typedef struct {
    int format, wide;
    int64_t rows, columns, width, groups, row_bytes;
    uint8_t *packed;
    void *scale, *offset;
    float *dense; /* (rows, columns) */
    cq_layout *layout;
    void *memory;
} weight;

/* Scales and offsets are multiples of 2^-6 below 2, which float16 holds: its bits are built here. */
static uint16_t half_of(int sixty_fourths)
{
    int size = abs(sixty_fourths), exponent = 0;
    if (size == 0)
        return 0;
    while (size >> (exponent + 1))
        ++exponent;
    return (uint16_t)((sixty_fourths < 0 ? 0x8000 : 0) | (exponent + 9) << 10 | ((size << (10 - exponent)) & 0x3ff));
}

static void put(void *to, int64_t at, int wide, int sixty_fourths)
{
    if (wide)
        ((float *)to)[at] = (float)sixty_fourths / 64.0f;
    else
        ((uint16_t *)to)[at] = half_of(sixty_fourths);
}

static weight make(int format, int wide, int64_t rows, int64_t columns, int64_t width)
{
    const cq_format *f = &cq_formats[format];
    weight w = {.format = format, .wide = wide, .rows = rows, .columns = columns, .width = width};
    w.groups = (columns + width - 1) / width;
    int64_t last = columns - (w.groups - 1) * width, words = (width + f->digits - 1) / f->digits;
    w.row_bytes = ((w.groups - 1) * words + (last + f->digits - 1) / f->digits) * f->nbytes;
    w.packed = exactly((size_t)(rows * w.row_bytes));
    uint32_t limit = f->radix == 3 ? 243 : 256;
    for (int64_t i = 0; i < rows * w.row_bytes; ++i)
        w.packed[i] = (uint8_t)draw(limit);
    size_t size = (size_t)(rows * w.groups) * (wide ? 4 : 2);
    w.scale = exactly(size);
    w.offset = format == CQ_INT8 ? NULL : exactly(size);
    w.dense = exactly((size_t)(rows * columns) * 4);
    uint8_t *codes = exactly((size_t)columns);
    for (int64_t n = 0; n < rows; ++n) {
        cq_decode_row(format, w.packed + n * w.row_bytes, columns, width, codes);
        for (int64_t g = 0; g < w.groups; ++g) {
            int s = 1 + (int)draw(127), o = (int)draw(127) - 63;
            put(w.scale, n * w.groups + g, wide, s);
            if (w.offset != NULL)
                put(w.offset, n * w.groups + g, wide, o);
            for (int64_t k = g * width; k < columns && k < (g + 1) * width; ++k)
                w.dense[n * columns + k] =
                    ((float)(f->step * codes[k] - f->zero) * (float)s + (w.offset == NULL ? 0 : (float)o)) / 64.0f;
        }
    }
    free(codes);
    size_t bytes = (size_t)cq_layout_bytes(format, rows, columns, width, w.offset != NULL, wide);
    w.memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
    w.layout = w.memory;
    if (cq_layout_build(format, rows, columns, width, wide, w.packed, w.row_bytes, w.scale, w.offset, 2, w.memory))
        exit(2);
    return w;
}

static void drop(weight *w)
{
    free(w->packed);
    free(w->scale);
    free(w->offset);
    free(w->dense);
    free(w->memory);
}

static void fail(const char *what, const weight *w, int path, int64_t count, double error)
{
    printf("%s: %s, format %d, (%lld, %lld) in groups of %lld, %lld rows of x, off by %g times the bound\n", what,
           path_names[path], w->format, (long long)w->rows, (long long)w->columns, (long long)w->width,
           (long long)count, error);
    ++failures;
}

static float value_at(const void *from, int64_t at, int dtype)
{
    if (dtype == CQ_FLOAT32)
        return ((const float *)from)[at];
    uint32_t bits = (uint32_t)((const uint16_t *)from)[at] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static void check_product(const weight *w, int path, int64_t count, int dtype, int quantized)
{
    size_t size = dtype == CQ_FLOAT32 ? 4 : 2;
    char *x = exactly((size_t)(count * w->columns) * size), *out = exactly((size_t)(count * w->rows) * size);
    char *again = exactly((size_t)(count * w->rows) * size);
    float *bias = exactly((size_t)w->rows * 4);
    cq_activation how = {.parts = quantized             ? 1
                                  : dtype == CQ_FLOAT32 ? 3
                                                        : 2,
                         .quantized = 2 * quantized,
                         .low = -128,
                         .high = 127,
                         .scale = 0.03125f};
    for (int64_t i = 0; i < count * w->columns; ++i) {
        float value = quantized ? (float)((int)draw(256) - 128) / 32.0f : draw_float();
        uint32_t bits;
        memcpy(&bits, &value, 4);
        if (dtype == CQ_FLOAT32)
            memcpy(x + 4 * i, &value, 4);
        else
            ((uint16_t *)x)[i] = (uint16_t)(bits >> 16);
    }
    for (int64_t n = 0; n < w->rows; ++n)
        bias[n] = draw_float();
    cq_linear(w->layout, &how, x, count, w->columns, dtype, bias, CQ_FLOAT32, out, path, 1);
    cq_linear(w->layout, &how, x, count, w->columns, dtype, bias, CQ_FLOAT32, again, path, 3);
    if (memcmp(out, again, (size_t)(count * w->rows) * size) != 0)
        fail("threads change the result", w, path, count, 0);
    double eps = dtype == CQ_FLOAT32 ? 0x1p-23 : 0x1p-7, worst = 0;
    for (int64_t m = 0; m < count; ++m)
        for (int64_t n = 0; n < w->rows; ++n) {
            double sum = bias[n], total = fabs(sum);
            for (int64_t k = 0; k < w->columns; ++k) {
                double product = (double)value_at(x, m * w->columns + k, dtype) * w->dense[n * w->columns + k];
                sum += product;
                total += fabs(product);
            }
            double error = fabs(value_at(out, m * w->rows + n, dtype) - sum) / (2 * eps * total + 1e-7);
            worst = error > worst ? error : worst;
        }
    if (!(worst <= 1))
        fail("product", w, path, count, worst);
    free(x);
    free(out);
    free(again);
    free(bias);
}

static void check_rows(const weight *w, int path)
{
    int64_t indices[3] = {w->rows - 1, 0, w->rows / 2};
    float *out = exactly((size_t)(3 * w->columns) * 4);
    cq_dequantize(w->format, w->packed, w->row_bytes, w->scale, w->offset, w->wide, indices, 3, w->columns, w->width,
                  out, CQ_FLOAT32, path, 2);
    for (int i = 0; i < 3; ++i)
        if (memcmp(out + i * w->columns, w->dense + indices[i] * w->columns, (size_t)w->columns * 4) != 0)
            fail("dequantize", w, path, 3, 0);
    free(out);
}

/* Kernels of 3 x 2: few positions, padded and dilated; many, two apart; many side by side, of which every thread packs its
 * own; with whole lines of padding. */
static const cq_window windows[] = {
    {2, 4, 5, 6, 5, 3, 3, 2, 1, 2, 1, 1, 1, 2},
    {3, 4, 17, 20, 9, 10, 3, 2, 2, 2, 1, 0, 1, 1},
    {3, 4, 17, 20, 17, 21, 3, 2, 1, 1, 1, 1, 1, 1},
    {1, 4, 3, 40, 9, 39, 3, 2, 1, 1, 4, 0, 1, 1},
};

/* A convolution against its definition. */
static void check_conv(int path, int format, int dtype, int quantized, cq_window g)
{
    weight w = make(format, 1, 21, g.channels * g.kernel_height * g.kernel_width, 8);
    int64_t positions = g.out_height * g.out_width, inputs = g.batch * g.channels * g.height * g.width;
    size_t size = dtype == CQ_FLOAT32 ? 4 : 2, count = (size_t)(g.batch * w.rows * positions);
    char *x = exactly((size_t)inputs * size), *out = exactly(count * size), *again = exactly(count * size);
    float *bias = exactly((size_t)w.rows * 4);
    cq_activation how = {.parts = quantized             ? 1
                                  : dtype == CQ_FLOAT32 ? 3
                                                        : 2,
                         .quantized = 2 * quantized,
                         .low = -128,
                         .high = 127,
                         .scale = 0.03125f};
    for (int64_t i = 0; i < inputs; ++i) {
        float value = (float)((int)draw(256) - 128) / 32.0f;
        uint32_t bits;
        memcpy(&bits, &value, 4);
        if (dtype == CQ_FLOAT32)
            memcpy(x + 4 * i, &value, 4);
        else
            ((uint16_t *)x)[i] = (uint16_t)(bits >> 16);
    }
    for (int64_t n = 0; n < w.rows; ++n)
        bias[n] = draw_float();
    cq_conv(w.layout, &how, &g, x, dtype, bias, CQ_FLOAT32, out, path, 1);
    cq_conv(w.layout, &how, &g, x, dtype, bias, CQ_FLOAT32, again, path, 7);
    if (memcmp(out, again, count * size) != 0)
        fail("threads change the convolution", &w, path, 2, 0);
    double eps = dtype == CQ_FLOAT32 ? 0x1p-23 : 0x1p-7, worst = 0;
    for (int64_t i = 0; i < (int64_t)count; ++i) {
        int64_t at = i % positions, n = i / positions % w.rows, image = i / positions / w.rows;
        double sum = bias[n], total = fabs(sum);
        for (int64_t k = 0; k < w.columns; ++k) {
            int64_t kx = k % g.kernel_width, ky = k / g.kernel_width % g.kernel_height, c = k / 6;
            int64_t row = at / g.out_width * g.stride_y - g.pad_y + ky * g.dilation_y;
            int64_t column = at % g.out_width * g.stride_x - g.pad_x + kx * g.dilation_x;
            if (row < 0 || row >= g.height || column < 0 || column >= g.width)
                continue;
            int64_t from = ((image * g.channels + c) * g.height + row) * g.width + column;
            double product = (double)value_at(x, from, dtype) * w.dense[n * w.columns + k];
            sum += product;
            total += 4 * fabs(w.dense[n * w.columns + k]); /* digits are those of the largest value, which is 4 */
        }
        double error = fabs(value_at(out, i, dtype) - sum) / (2 * eps * total + 1e-7);
        worst = error > worst ? error : worst;
    }
    if (!(worst <= 1))
        fail("convolution", &w, path, 2, worst);
    free(x);
    free(out);
    free(again);
    free(bias);
    drop(&w);
}

static void draw_floats(float *to, int64_t count)
{
    for (int64_t i = 0; i < count; ++i)
        to[i] = draw_float();
}

static void check_rotation(int path, int64_t rows, int64_t columns)
{
    weight none = {.rows = rows, .columns = columns};
    size_t bytes = (size_t)(rows * columns) * 4;
    float *x = exactly(bytes), *out = exactly(bytes), *back = exactly(bytes), *signs = exactly((size_t)columns * 4);
    int64_t size = columns & -columns;
    double worst = 0;
    draw_floats(x, rows * columns);
    for (int64_t k = 0; k < columns; ++k)
        signs[k] = draw(2) ? 1.0f : -1.0f;
    cq_rotate(x, CQ_FLOAT32, rows, columns, signs, 0, out, path, 1);
    cq_rotate(x, CQ_FLOAT32, rows, columns, signs, 0, back, path, 3);
    if (memcmp(out, back, bytes) != 0)
        fail("threads change the rotation", &none, path, rows, 0);
    cq_rotate(out, CQ_FLOAT32, rows, columns, signs, 1, back, path, 2);
    for (int64_t i = 0; i < rows * columns; ++i) {
        int64_t k = i % columns, block = i - k + k / size * size;
        double sum = 0;
        for (int64_t j = 0; j < size; ++j)
            sum += (__builtin_popcountll((uint64_t)(j & (k % size))) & 1 ? -1.0 : 1.0) * (double)x[block + j] *
                   (double)signs[block - (i - k) + j];
        double error = fabs(out[i] - sum / sqrt((double)size)) / 1e-5;
        error = fabs(back[i] - x[i]) / 1e-5 > error ? fabs(back[i] - x[i]) / 1e-5 : error;
        worst = error > worst ? error : worst;
    }
    if (!(worst <= 1))
        fail("rotation", &none, path, rows, worst);
    free(x);
    free(out);
    free(back);
    free(signs);
}

static void check_clusters(int path, int64_t rows, int64_t width, int64_t rank, int64_t clusters)
{
    weight none = {.rows = clusters, .columns = width, .width = rank};
    int64_t projected = rank == 0 ? width : rank;
    float *y = exactly((size_t)(rows * width) * 4), *out = exactly((size_t)(rows * width) * 4);
    float *basis = exactly((size_t)(width * rank) * 4), *centroids = exactly((size_t)(clusters * projected) * 4);
    float *gamma = exactly((size_t)(clusters * width) * 4), *beta = exactly((size_t)(clusters * width) * 4);
    draw_floats(y, rows * width);
    draw_floats(basis, width * rank);
    draw_floats(centroids, clusters * projected);
    draw_floats(gamma, clusters * width);
    draw_floats(beta, clusters * width);
    cq_cluster_affine(y, CQ_FLOAT32, rows, width, rank == 0 ? NULL : basis, projected, centroids, clusters, gamma,
                      beta, out, path, 2);
    for (int64_t m = 0; m < rows; ++m) {
        double least = INFINITY, found = INFINITY;
        for (int64_t c = 0; c < clusters; ++c) {
            double distance = 0;
            for (int64_t p = 0; p < projected; ++p) {
                double z = rank == 0 ? (double)y[m * width + p] : 0;
                for (int64_t k = 0; k < (rank == 0 ? 0 : width); ++k)
                    z += (double)y[m * width + k] * (double)basis[k * rank + p];
                distance += (z - centroids[c * projected + p]) * (z - centroids[c * projected + p]);
            }
            least = distance < least ? distance : least;
            int same = 1;
            for (int64_t k = 0; k < width; ++k) {
                float product = gamma[c * width + k] * y[m * width + k];
                same &= out[m * width + k] == product + beta[c * width + k];
            }
            found = same ? distance : found;
        }
        if (!(found <= least * (1 + 1e-4)))
            fail("correction", &none, path, rows, found / least);
    }
    free(y);
    free(out);
    free(basis);
    free(centroids);
    free(gamma);
    free(beta);
}

static void check_floats(int path)
{
    static const int64_t columns[] = {1, 3, 4, 8, 24, 48, 64, 160, 512, 1024};
    static const int64_t sizes[][4] = {{1, 40, 20, 3}, {5, 33, 7, 4}, {6, 100, 0, 5}, {9, 70, 70, 1}, {2, 9000, 3, 4}};
    for (size_t i = 0; i < sizeof columns / sizeof *columns; ++i)
        check_rotation(path, 5, columns[i]);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; ++i)
        check_clusters(path, sizes[i][0], sizes[i][1], sizes[i][2], sizes[i][3]);
}

int main(void)
{
    static const int64_t shapes[][3] = {{37, 300, 32}, {16, 256, 128}, {33, 1101, 1101}, {1, 7, 7}, {20, 130, 24}};
    static const int64_t counts[] = {1, 2, 3, 4, 5, 9, 13, 17, 64, 65};
    int paths = 0;
    for (int path = 0; path < CQ_PATHS; ++path) {
        if (!cq_has_path(path))
            continue;
        ++paths;
        printf("%s\n", path_names[path]);
        check_floats(path);
        for (int format = 0; format < CQ_FORMATS; ++format) {
            for (size_t i = 0; i < sizeof windows / sizeof *windows; ++i) {
                check_conv(path, format, CQ_FLOAT32, 0, windows[i]);
                check_conv(path, format, CQ_BFLOAT16, 0, windows[i]);
                check_conv(path, format, CQ_FLOAT32, 1, windows[i]);
            }
            for (size_t s = 0; s < sizeof shapes / sizeof *shapes; ++s) {
                weight w = make(format, (int)s % 2, shapes[s][0], shapes[s][1], shapes[s][2]);
                for (size_t c = 0; c < sizeof counts / sizeof *counts; ++c) {
                    check_product(&w, path, counts[c], CQ_FLOAT32, 0);
                    check_product(&w, path, counts[c], CQ_BFLOAT16, 0);
                    check_product(&w, path, counts[c], CQ_FLOAT32, 1);
                }
                check_rows(&w, path);
                drop(&w);
            }
        }
    }
    printf(failures ? "%d failures\n" : "all right on %d paths\n", failures ? failures : paths);
    return failures != 0;
}
