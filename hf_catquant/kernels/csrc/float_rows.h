/* Rows of floats: the rotation of hf_catquant/rotation.py, and what cluster_affine is made of. Every path includes this
 * file and compiles it with flags of its own; vectors are as wide as its registers.
 *
 * Sums are taken in an order that depends on the sizes alone. */
#include "rows.h"

#if defined(__AVX512F__)
#define VECTOR 16
#define LANES_XOR(h) \
    0 ^ h, 1 ^ h, 2 ^ h, 3 ^ h, 4 ^ h, 5 ^ h, 6 ^ h, 7 ^ h, 8 ^ h, 9 ^ h, 10 ^ h, 11 ^ h, 12 ^ h, 13 ^ h, 14 ^ h, 15 ^ h
#define SIGNS(h) \
    SIGN(0, h), SIGN(1, h), SIGN(2, h), SIGN(3, h), SIGN(4, h), SIGN(5, h), SIGN(6, h), SIGN(7, h), SIGN(8, h), \
        SIGN(9, h), SIGN(10, h), SIGN(11, h), SIGN(12, h), SIGN(13, h), SIGN(14, h), SIGN(15, h)
#elif defined(__AVX2__)
#define VECTOR 8
#define LANES_XOR(h) 0 ^ h, 1 ^ h, 2 ^ h, 3 ^ h, 4 ^ h, 5 ^ h, 6 ^ h, 7 ^ h
#define SIGNS(h) \
    SIGN(0, h), SIGN(1, h), SIGN(2, h), SIGN(3, h), SIGN(4, h), SIGN(5, h), SIGN(6, h), SIGN(7, h)
#else
#define VECTOR 4
#define LANES_XOR(h) 0 ^ h, 1 ^ h, 2 ^ h, 3 ^ h
#define SIGNS(h) SIGN(0, h), SIGN(1, h), SIGN(2, h), SIGN(3, h)
#endif
#define SIGN(lane, h) ((lane) & (h) ? -1.0f : 1.0f)

typedef float vector __attribute__((vector_size(4 * VECTOR)));
typedef int32_t integers __attribute__((vector_size(4 * VECTOR)));

#if defined(__clang__)
#define SWAPPED(x, h) __builtin_shufflevector(x, x, LANES_XOR(h))
#else
#define SWAPPED(x, h) __builtin_shuffle(x, (integers){LANES_XOR(h)})
#endif
/* Sums and differences of lanes h apart. */
#define MIXED(x, h) ((x) * (vector){SIGNS(h)} + SWAPPED(x, h))

static inline __attribute__((always_inline)) vector load_floats(const float *from)
{
    vector value;
    memcpy(&value, from, sizeof value);
    return value;
}

static inline __attribute__((always_inline)) void store_floats(float *to, vector value)
{
    memcpy(to, &value, sizeof value);
}

/* Sums and differences of `count` vectors that are `stride` floats apart, and of those again. */
static inline __attribute__((always_inline)) void mix_vectors(float *at, int64_t stride, const int count)
{
    vector value[8];
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i)
        value[i] = load_floats(at + i * stride);
#pragma GCC unroll 3
    for (int h = 1; h < count; h *= 2)
#pragma GCC unroll 8
        for (int i = 0; i < count; ++i)
            if ((i & h) == 0) {
                vector a = value[i], b = value[i + h];
                value[i] = a + b;
                value[i + h] = a - b;
            }
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i)
        store_floats(at + i * stride, value[i]);
}

/* x (size,) times the matrix of (-1)^popcount(i & j), in place; size is a power of two. */
static inline void walsh(float *x, int64_t size)
{
    if (size < VECTOR) {
        for (int64_t h = 1; h < size; h *= 2)
            for (int64_t i = 0; i < size; ++i)
                if ((i & h) == 0) {
                    float a = x[i], b = x[i + h];
                    x[i] = a + b;
                    x[i + h] = a - b;
                }
        return;
    }
    for (int64_t k = 0; k < size; k += VECTOR) {
        vector value = load_floats(x + k);
        value = MIXED(value, 1);
        value = MIXED(value, 2);
#if VECTOR >= 8
        value = MIXED(value, 4);
#endif
#if VECTOR >= 16
        value = MIXED(value, 8);
#endif
        store_floats(x + k, value);
    }
    for (int64_t stride = VECTOR, count; stride < size; stride *= count) {
        int64_t left = size / stride;
        count = left == 16 ? 4 : left < 8 ? left : 8;
        for (int64_t start = 0; start < size; start += stride * count)
            for (int64_t k = start; k < start + stride; k += VECTOR)
                if (count == 8)
                    mix_vectors(x + k, stride, 8);
                else if (count == 4)
                    mix_vectors(x + k, stride, 4);
                else
                    mix_vectors(x + k, stride, 2);
    }
}

/* R x of one row, or R^T x; `scratch` holds a row of floats. */
static inline void rotate_row(const void *x, int dtype, int64_t columns, const float *restrict signs, int inverse,
                              void *out, float *restrict scratch)
{
    int64_t size = columns & -columns;
    float scale = (float)(1.0 / sqrt((double)size));
    widen(x, dtype, columns, scratch);
    if (!inverse)
        for (int64_t k = 0; k < columns; ++k)
            scratch[k] *= signs[k];
    for (int64_t k = 0; k < columns; k += size)
        walsh(scratch + k, size);
    if (inverse)
        for (int64_t k = 0; k < columns; ++k)
            scratch[k] *= scale * signs[k];
    else
        for (int64_t k = 0; k < columns; ++k)
            scratch[k] *= scale;
    narrow(scratch, dtype, columns, out);
}

static inline __attribute__((always_inline)) void project_vectors(const float *const y[CQ_ROW_BLOCK],
                                                                  const float *basis, int64_t count, int64_t rank,
                                                                  int64_t first, float *out, const int vectors)
{
    vector sum[CQ_ROW_BLOCK][4];
    int64_t at[4];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) { /* the last one ends with the row, over lanes of the one before */
        at[v] = (first + v) * VECTOR < rank - VECTOR ? (first + v) * VECTOR : rank - VECTOR;
#pragma GCC unroll 4
        for (int m = 0; m < CQ_ROW_BLOCK; ++m)
            sum[m][v] = (vector){0};
    }
    for (int64_t k = 0; k < count; ++k, basis += rank)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
            vector line = load_floats(basis + at[v]);
#pragma GCC unroll 4
            for (int m = 0; m < CQ_ROW_BLOCK; ++m)
                sum[m][v] += line * y[m][k];
        }
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v)
#pragma GCC unroll 4
        for (int m = 0; m < CQ_ROW_BLOCK; ++m)
            store_floats(out + m * rank + at[v], sum[m][v]);
}

/* out (CQ_ROW_BLOCK, rank): rows y of `count` floats times basis (count, rank). */
static inline void project(const float *const y[CQ_ROW_BLOCK], const float *basis, int64_t count, int64_t rank,
                           float *out)
{
    int64_t vectors = (rank + VECTOR - 1) / VECTOR;
    if (rank < VECTOR) {
        memset(out, 0, (size_t)(CQ_ROW_BLOCK * rank) * 4);
        for (int64_t k = 0; k < count; ++k)
            for (int m = 0; m < CQ_ROW_BLOCK; ++m)
                for (int64_t p = 0; p < rank; ++p)
                    out[m * rank + p] += y[m][k] * basis[k * rank + p];
        return;
    }
    for (int64_t first = 0; first < vectors; first += 4)
        switch (vectors - first) {
        case 1: project_vectors(y, basis, count, rank, first, out, 1); break;
        case 2: project_vectors(y, basis, count, rank, first, out, 2); break;
        case 3: project_vectors(y, basis, count, rank, first, out, 3); break;
        default: project_vectors(y, basis, count, rank, first, out, 4);
        }
}

static inline float dot(const float *a, const float *b, int64_t count)
{
    vector sum[2] = {{0}, {0}};
    float total = 0, lanes[VECTOR];
    int64_t k = 0;
    for (; k + 2 * VECTOR <= count; k += 2 * VECTOR) {
        sum[0] += load_floats(a + k) * load_floats(b + k);
        sum[1] += load_floats(a + k + VECTOR) * load_floats(b + k + VECTOR);
    }
    store_floats(lanes, sum[0] + sum[1]);
    for (; k < count; ++k)
        total += a[k] * b[k];
    for (int i = 0; i < VECTOR; ++i)
        total += lanes[i];
    return total;
}

/* gamma * y + beta of a run of a row, in the dtype of y. */
static inline void affine(const float *restrict y, const float *restrict gamma, const float *restrict beta,
                          int64_t count, void *out, int dtype)
{
    float values[256];
    int64_t size = dtype == CQ_FLOAT32 ? 4 : 2;
    for (int64_t from = 0; from < count; from += 256) {
        int64_t run = count - from < 256 ? count - from : 256;
        for (int64_t k = 0; k < run; ++k)
            values[k] = gamma[from + k] * y[from + k] + beta[from + k];
        narrow(values, dtype, run, (char *)out + from * size);
    }
}
