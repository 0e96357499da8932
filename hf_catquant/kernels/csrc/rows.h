/* Rows of x and of w_hat, in C that compilers vectorize. Every path includes this file and compiles it with flags of
 * its own.
 *
 * Rounding is that of hf_catquant/weight.py: division, round half to even, clamp, all in float32; -ffp-contract=off
 * keeps products and sums apart.
 */
#include "catquant.h"

#include <math.h>
#include <string.h>
#ifdef __F16C__
#include <immintrin.h>
#endif

static inline float bits_to_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t float_to_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float half_to_float(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    /* The exponent moves from bias 15 to 127 by a product, which also makes subnormals normal. */
    float value = bits_to_float(rest << 13) * 0x1p112f;
    uint32_t bits = rest >= 0x7c00 ? 0x7f800000u | rest << 13 : float_to_bits(value);
    return bits_to_float(bits | sign);
}

static inline uint16_t float_to_half(float value)
{
    uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000)
        return (uint16_t)(sign | 0x7e00);
    if (rest >= 0x477ff000) /* rounds to more than 65504 */
        return (uint16_t)(sign | 0x7c00);
    if (rest < 0x38800000) /* subnormal half: adding 0.5 leaves its bits at the end of the fraction, rounded */
        return (uint16_t)(sign | (float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000));
    return (uint16_t)(sign | ((rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13));
}

static inline uint16_t float_to_bfloat(float value)
{
    uint32_t bits = float_to_bits(value);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
}

static void widen(const void *values, int dtype, int64_t count, float *out)
{
    const uint16_t *half = values;
    int64_t k = 0;
    if (dtype == CQ_FLOAT32) {
        memcpy(out, values, (size_t)count * 4);
    } else if (dtype == CQ_BFLOAT16) {
        for (; k < count; ++k)
            out[k] = bits_to_float((uint32_t)half[k] << 16);
    } else {
#ifdef __F16C__
        for (; k + 8 <= count; k += 8)
            _mm256_storeu_ps(out + k, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(half + k))));
#endif
        for (; k < count; ++k)
            out[k] = half_to_float(half[k]);
    }
}

static void narrow(const float *values, int dtype, int64_t count, void *out)
{
    uint16_t *half = out;
    int64_t k = 0;
    if (dtype == CQ_FLOAT32) {
        memcpy(out, values, (size_t)count * 4);
    } else if (dtype == CQ_BFLOAT16) {
        for (; k < count; ++k)
            half[k] = float_to_bfloat(values[k]);
    } else {
#ifdef __F16C__
        for (; k + 8 <= count; k += 8)
            _mm_storeu_si128((__m128i *)(half + k),
                             _mm256_cvtps_ph(_mm256_loadu_ps(values + k), _MM_FROUND_TO_NEAREST_INT));
#endif
        for (; k < count; ++k)
            half[k] = float_to_half(values[k]);
    }
}

/* `count` results (16 at most) plus their biases, which begin at `bias` (or NULL). */
static void store(const float *result, const void *bias, int bias_dtype, void *out, int dtype, int count)
{
    float sum[CQ_LANES], shift[CQ_LANES];
    if (bias == NULL && count == CQ_LANES && dtype == CQ_FLOAT32) {
        memcpy(out, result, CQ_LANES * 4);
        return;
    }
    for (int k = 0; k < CQ_LANES; ++k)
        sum[k] = result[k];
    if (bias != NULL) {
        widen(bias, bias_dtype, count, shift);
        for (int k = 0; k < count; ++k)
            sum[k] += shift[k];
    }
    narrow(sum, dtype, count, out);
}

static inline void dequantize_row(const uint8_t *codes, const float *scale, const float *offset, int64_t columns,
                                  int64_t group_width, const cq_format *format, void *out, int dtype)
{
    float values[CQ_MAX_BLOCK];
    int64_t size = dtype == CQ_FLOAT32 ? 4 : 2;
    for (int64_t k = 0, g = 0; k < columns; k += group_width, ++g) {
        int64_t end = columns - k < group_width ? columns : k + group_width;
        float s = scale[g], o = offset == NULL ? 0 : offset[g];
        for (int64_t from = k; from < end; from += CQ_MAX_BLOCK) {
            int count = (int)(end - from < CQ_MAX_BLOCK ? end - from : CQ_MAX_BLOCK);
            for (int i = 0; i < count; ++i)
                values[i] = (float)(format->step * codes[from + i] - format->zero) * s;
            if (offset != NULL)
                for (int i = 0; i < count; ++i)
                    values[i] += o;
            narrow(values, dtype, count, (char *)out + from * size);
        }
    }
}

/* The least and the greatest value of a row, together with 0; returns 0 if any value is not finite. */
static int row_range(const float *row, int64_t count, float *low, float *high)
{
    float least = 0, most = 0;
    int32_t size = 0;
#pragma omp simd reduction(min : least) reduction(max : most, size)
    for (int64_t k = 0; k < count; ++k) {
        int32_t bits;
        memcpy(&bits, row + k, 4);
        bits &= 0x7fffffff;
        least = row[k] < least ? row[k] : least;
        most = row[k] > most ? row[k] : most;
        size = bits > size ? bits : size;
    }
    *low = least;
    *high = most;
    return size < 0x7f800000;
}

/* Half to even, of values up to 2^23. */
static inline float round_even(float value)
{
#if defined(__SSE4_1__) || defined(__aarch64__)
    return rintf(value); /* one instruction */
#else
    return copysignf((fabsf(value) + 0x1p23f) - 0x1p23f, value);
#endif
}

/* Integers of a row with x about xscale * integer; float32 values become integers of 8 * parts bits. */
static float float_integers(const float *restrict row, int64_t count, float low, float high, int parts,
                            int32_t *restrict out)
{
    /* 127 * 256^(parts - 1) + ... + 127: the greatest number of `parts` digits between -128 and 127. */
    const float most = parts == 1 ? 127.0f : parts == 2 ? 32639.0f : 8355711.0f;
    float size = -low > high ? -low : high;
    if (size < 1e-30f) /* zero, or so small that its reciprocal overflows */
        size = 1e-30f;
    float inverse = most / size;
#pragma omp simd
    for (int64_t k = 0; k < count; ++k) {
        float value = round_even(row[k] * inverse);
        value = value > most ? most : value;
        out[k] = (int32_t)(value < -most ? -most : value);
    }
    return size / most;
}

/* quantize_activation() of hf_catquant/weight.py, in integers: x_hat = xscale * integer. */
static float quantized_integers(const float *restrict row, int64_t count, float low, float high,
                                const cq_activation *how, int32_t *restrict out)
{
    const float least = how->low, most = how->high;
    float scale = how->scale, offset = how->offset;
    if (how->quantized == 1 && how->affine) {
        scale = (high - low) / (most - least);
        scale = scale > 0 ? scale : 1.0f;
        offset = -rintf(least - low / scale) * scale;
    } else if (how->quantized == 1) {
        scale = (-low > high ? -low : high) / most;
        scale = scale > 0 ? scale : 1.0f;
    }
    if (!how->affine)
        offset = 0; /* x - 0 is x */
    const int32_t zero = (int32_t)rintf(-offset / scale);
#pragma omp simd
    for (int64_t k = 0; k < count; ++k) {
        float value = (row[k] - offset) / scale;
        /* Clamped before it is rounded, which is the same between integers. */
        value = value < least ? least : value;
        value = value > most ? most : value;
        out[k] = (int32_t)round_even(value) - zero;
    }
    return scale;
}

/* The digits of one block of one row, most significant first, and their sums. */
static void block_digits(const int32_t *integers, int width, int parts, int8_t *const digit[CQ_MAX_PARTS],
                         int32_t sums[CQ_MAX_PARTS])
{
    int32_t a = 0, b = 0, c = 0;
    if (parts == 1) {
        for (int k = 0; k < width; ++k) {
            digit[0][k] = (int8_t)integers[k];
            a += integers[k];
        }
    } else if (parts == 2) {
        for (int k = 0; k < width; ++k) {
            int32_t last = (int8_t)integers[k], first = (integers[k] - last) >> 8;
            digit[0][k] = (int8_t)first;
            digit[1][k] = (int8_t)last;
            a += first;
            b += last;
        }
    } else {
        for (int k = 0; k < width; ++k) {
            int32_t last = (int8_t)integers[k], rest = (integers[k] - last) >> 8;
            int32_t middle = (int8_t)rest, first = (rest - middle) >> 8;
            digit[0][k] = (int8_t)first;
            digit[1][k] = (int8_t)middle;
            digit[2][k] = (int8_t)last;
            a += first;
            b += middle;
            c += last;
        }
    }
    sums[0] = a;
    sums[1] = b;
    sums[2] = c;
}

static void pack_row(const cq_layout *w, const int32_t *integers, int m, cq_chunk *out)
{
    int rows = out->parts * out->rows, zero = cq_formats[w->format].zero;
    for (int b = 0; b < w->blocks; ++b) {
        const cq_block *block = &w->block[b];
        int64_t total = 0;
        int32_t block_sum[CQ_MAX_PARTS] = {0};
        for (int from = 0; from < block->width; from += CQ_TILE) {
            int width = block->width - from < CQ_TILE ? block->width - from : CQ_TILE;
            int8_t *digit[CQ_MAX_PARTS] = {0};
            int32_t sums[CQ_MAX_PARTS];
            for (int p = 0; p < out->parts; ++p) {
                digit[p] = out->x + ((int64_t)(block->tile + from / CQ_TILE) * rows + p * out->rows + m) * CQ_TILE;
                if (width < CQ_TILE)
                    memset(digit[p], 0, CQ_TILE);
            }
            block_digits(integers + block->column + from, width, out->parts, digit, sums);
            for (int p = 0; p < out->parts; ++p)
                block_sum[p] += sums[p];
        }
        for (int p = 0; p < out->parts; ++p) {
            out->zero_sum[(int64_t)b * rows + p * out->rows + m] = -zero * block_sum[p];
            total = total * 256 + block_sum[p];
        }
        out->sum[(int64_t)b * out->rows + m] = (float)total;
    }
}

static inline int pack_chunk(const cq_layout *w, const cq_activation *how, const void *x, int dtype,
                             int64_t row_stride, int64_t first, cq_chunk *out, float *scratch)
{
    int32_t *integers = (int32_t *)(scratch + w->columns);
    int64_t size = dtype == CQ_FLOAT32 ? 4 : 2, row_bytes = row_stride * size;
    const char *rows = (const char *)x + first * row_bytes;
    for (int m = 0; m < out->rows; ++m) {
        float low, high;
        if (m >= out->filled) {
            memset(integers, 0, (size_t)w->columns * 4);
            out->scale[m] = 0;
        } else {
            const float *row = (const float *)(rows + m * row_bytes);
            if (dtype != CQ_FLOAT32) {
                widen(row, dtype, w->columns, scratch);
                row = scratch;
            }
            if (!row_range(row, w->columns, &low, &high))
                return CQ_NOT_FINITE;
            out->scale[m] = how->quantized ? quantized_integers(row, w->columns, low, high, how, integers)
                                           : float_integers(row, w->columns, low, high, out->parts, integers);
        }
        pack_row(w, integers, m, out);
    }
    return CQ_OK;
}
