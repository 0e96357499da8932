/* Many rows of floats times a run of rows of w_hat as floats: where integers have no instruction that adds four products,
 * sums of three digits are no faster than float32's own.
 *
 * Some columns of a run are dequantized at a time, column by column with its 16 lanes side by side, and multiplied by all
 * rows while they lie in the first-level cache. Sums are those of CHAIN columns, then theirs, in an order that depends on
 * the shapes alone.
 */
#include "catquant.h"

#include <immintrin.h>

#define CHAIN 64 /* columns whose products are added one after the other: with more of them more is rounded away */

static void lay_out(const float *rows, int64_t stride, int columns, float *out)
{
    int k = 0;
    for (; k + 4 <= columns; k += 4, out += 4 * CQ_FLOAT_ROWS) {
        __m128 row[CQ_FLOAT_ROWS];
#pragma GCC unroll 6
        for (int m = 0; m < CQ_FLOAT_ROWS; ++m)
            row[m] = _mm_loadu_ps(rows + m * stride + k);
        __m128 low = _mm_unpacklo_ps(row[4], row[5]), high = _mm_unpackhi_ps(row[4], row[5]);
        _MM_TRANSPOSE4_PS(row[0], row[1], row[2], row[3]);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            __m64 *last = (__m64 *)(out + i * CQ_FLOAT_ROWS + 4);
            _mm_storeu_ps(out + i * CQ_FLOAT_ROWS, row[i]);
            if (i % 2 == 0)
                _mm_storel_pi(last, i == 0 ? low : high);
            else
                _mm_storeh_pi(last, i == 1 ? low : high);
        }
    }
    for (; k < columns; ++k)
        for (int m = 0; m < CQ_FLOAT_ROWS; ++m)
            *out++ = rows[m * stride + k];
}

/* Eight lanes of column `j` of a quad as floats. */
ALWAYS __m256 column_lanes(__m256i values, int j, __m256 zero, __m256 scale, __m256 offset)
{
    __m256i one = _mm256_and_si256(_mm256_srli_epi32(values, 8 * j), _mm256_set1_epi32(255));
    /* w_hat's own rounding: a product, then a sum */
    return _mm256_add_ps(_mm256_mul_ps(_mm256_sub_ps(_mm256_cvtepi32_ps(one), zero), scale), offset);
}

/* The columns of a block, (width, 16), and some after them, as many as fill a unit. */
ALWAYS void block_floats(const cq_layout *w, const uint8_t *header, int width, float *out, const int format)
{
    const int quads = QUADS(format), lines = format == CQ_INT3 ? 3 : 1;
    const __m256 zero = _mm256_set1_ps((float)cq_formats[format].zero);
    for (int half = 0; half < 2; ++half, out += 8) {
        const uint8_t *unit = header + w->header;
        __m256 scale = lanes(header, w->wide_scale, 0, half);
        __m256 offset = w->affine ? lanes(header, w->wide_scale, 1, half) : _mm256_set1_ps(-0.0f);
        float *at = out;
        for (int k = 0; k < width; k += 4 * quads, unit += 64 * lines)
#pragma GCC unroll 8
            for (int q = 0; q < quads; ++q)
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j, at += CQ_LANES) {
                    __m256i values = format == CQ_INT8 ? _mm256_loadu_si256((const __m256i *)unit + half)
                                                       : quad_values(format, unit, q, half, 0);
                    _mm256_storeu_ps(at, column_lanes(values, j, zero, scale, offset));
                }
    }
}

static void panel(const cq_layout *w, int64_t run, int first, int last, float *out)
{
    const uint8_t *stream = (const uint8_t *)w + w->stream + run * w->run_bytes;
    for (int b = first; b < last; out += w->block[b++].width * CQ_LANES) {
        const uint8_t *header = stream + w->block[b].byte;
        int width = w->block[b].width;
        switch (w->format) {
        case CQ_BINARY: block_floats(w, header, width, out, CQ_BINARY); break;
        case CQ_INT3: block_floats(w, header, width, out, CQ_INT3); break;
        case CQ_INT4: block_floats(w, header, width, out, CQ_INT4); break;
        case CQ_INT8: block_floats(w, header, width, out, CQ_INT8); break;
        default:
            if (w->format == CQ_TERNARY)
                block_floats(w, header, width, out, CQ_TERNARY);
            else
                block_floats(w, header, width, out, CQ_INT2);
        }
    }
}

/* Sums (CQ_FLOAT_ROWS, 16) plus the products of CHAIN columns or fewer. */
ALWAYS void add_chain(const float *x, const float *panel, int columns, float *sums)
{
    __m256 sum[2 * CQ_FLOAT_ROWS];
#pragma GCC unroll 12
    for (int i = 0; i < 2 * CQ_FLOAT_ROWS; ++i)
        sum[i] = _mm256_setzero_ps();
    for (int k = 0; k < columns; ++k, panel += CQ_LANES, x += CQ_FLOAT_ROWS) {
        __m256 low = _mm256_loadu_ps(panel), high = _mm256_loadu_ps(panel + 8);
#pragma GCC unroll 6
        for (int m = 0; m < CQ_FLOAT_ROWS; ++m) {
            __m256 value = _mm256_broadcast_ss(x + m);
            sum[2 * m] = _mm256_fmadd_ps(value, low, sum[2 * m]);
            sum[2 * m + 1] = _mm256_fmadd_ps(value, high, sum[2 * m + 1]);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < 2 * CQ_FLOAT_ROWS; ++i)
        _mm256_storeu_ps(sums + 8 * i, _mm256_add_ps(_mm256_loadu_ps(sums + 8 * i), sum[i]));
}

static void multiply_floats(const float *x, int64_t chunks, const float *panel, int columns, float *sums)
{
    for (int64_t c = 0; c < chunks; ++c, sums += CQ_FLOAT_ROWS * CQ_LANES)
        for (int k = 0, count; k < columns; k += count, x += count * CQ_FLOAT_ROWS) {
            count = columns - k < CHAIN ? columns - k : CHAIN;
            add_chain(x, panel + k * CQ_LANES, count, sums);
        }
}
