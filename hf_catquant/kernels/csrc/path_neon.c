/* NEON with the dot product instructions of Armv8.2: SDOT adds four products of signed bytes to each of four rows.
 *
 * Values of at most 4 bits are the same signed and unsigned; int8 is multiplied as signed levels, which have no zero
 * to take away.
 */
#include "window.h"

#include <arm_neon.h>

#define ALWAYS static inline __attribute__((always_inline))

/* Four of the 16 lanes of quad q. */
ALWAYS int8x16_t quad_values(int format, const uint8_t *unit, int q, int quarter)
{
    const uint8_t *line = unit + 16 * quarter;
    uint8x16_t low;
    switch (format) {
    case CQ_BINARY: /* twice the bit */
        low = vshlq_u8(vld1q_u8(line), vdupq_n_s8((int8_t)(1 - q)));
        return vreinterpretq_s8_u8(vandq_u8(low, vdupq_n_u8(2)));
    case CQ_INT3:
        low = vshlq_u8(vld1q_u8(line + 64 * (q / 4)), vdupq_n_s8((int8_t)(-2 * (q % 4))));
        return vreinterpretq_s8_u8(
            vorrq_u8(vandq_u8(low, vdupq_n_u8(3)),
                     vandq_u8(vshlq_u8(vld1q_u8(line + 128), vdupq_n_s8((int8_t)(2 - q))), vdupq_n_u8(4))));
    case CQ_INT4:
        low = vshlq_u8(vld1q_u8(line), vdupq_n_s8((int8_t)(-4 * q)));
        return vreinterpretq_s8_u8(vandq_u8(low, vdupq_n_u8(15)));
    case CQ_INT8: return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(line), vdupq_n_u8(128)));
    default:
        low = vshlq_u8(vld1q_u8(line), vdupq_n_s8((int8_t)(-2 * q)));
        return vreinterpretq_s8_u8(vandq_u8(low, vdupq_n_u8(3)));
    }
}

/* sums (rows * parts, 4) of one block in integers */
ALWAYS void block_sums(const cq_chunk *chunk, const cq_block *block, int b, const uint8_t *unit, int quarter,
                       const int format, const int all, int32x4_t *sum)
{
    const int quads = format == CQ_BINARY || format == CQ_INT3 ? 8 : format == CQ_INT4 ? 2 : format == CQ_INT8 ? 1 : 4;
    const int lines = format == CQ_INT3 ? 3 : 1;
    const int8_t *x = chunk->x + (int64_t)block->tile * all * CQ_TILE;
    for (int r = 0; r < all; ++r)
        sum[r] = vdupq_n_s32(format == CQ_INT8 ? 0 : chunk->zero_sum[(int64_t)b * all + r]);
    for (int k = 0; k < block->width; k += 4 * quads, unit += 64 * lines) {
        const int8_t *at = x + k / CQ_TILE * all * CQ_TILE + k % CQ_TILE;
        for (int q = 0; q < quads; ++q) {
            int8x16_t values = quad_values(format, unit, q, quarter);
            for (int r = 0; r < all; ++r) {
                int32_t four;
                memcpy(&four, at + r * CQ_TILE + 4 * q, 4);
                sum[r] = vdotq_s32(sum[r], values, vreinterpretq_s8_s32(vdupq_n_s32(four)));
            }
        }
    }
}

ALWAYS void run_body(const cq_layout *w, int64_t index, const cq_chunk *chunk, float *result, const int format,
                     const int parts, const int rows)
{
    const uint8_t *stream = (const uint8_t *)w + w->stream + index * w->run_bytes;
    const int dtype = w->wide_scale ? CQ_FLOAT32 : CQ_FLOAT16, size = w->wide_scale ? 4 : 2;
    float scale[CQ_LANES], offset[CQ_LANES] = {0};
    memset(result, 0, (size_t)rows * CQ_LANES * 4);
    for (int b = 0; b < w->blocks; ++b) {
        const cq_block *block = &w->block[b];
        widen(stream + block->byte, dtype, CQ_LANES, scale);
        if (w->affine)
            widen(stream + block->byte + CQ_LANES * size, dtype, CQ_LANES, offset);
        for (int quarter = 0; quarter < 4; ++quarter) {
            int32x4_t sum[4];
            block_sums(chunk, block, b, stream + block->byte + w->header, quarter, format, parts * rows, sum);
            for (int m = 0; m < rows; ++m) {
                float *out = result + m * CQ_LANES + 4 * quarter;
                float32x4_t value = vcvtq_f32_s32(sum[m]);
                for (int p = 1; p < parts; ++p)
                    value = vfmaq_n_f32(vcvtq_f32_s32(sum[p * rows + m]), value, 256.0f);
                value = vfmaq_f32(vld1q_f32(out), value, vld1q_f32(scale + 4 * quarter));
                value = vfmaq_n_f32(value, vld1q_f32(offset + 4 * quarter), chunk->sum[(int64_t)b * rows + m]);
                vst1q_f32(out, value);
            }
        }
    }
    for (int m = 0; m < rows; ++m)
        for (int lane = 0; lane < CQ_LANES; ++lane)
            result[m * CQ_LANES + lane] *= chunk->scale[m];
}

typedef void (*kernel)(const cq_layout *, int64_t, const cq_chunk *, float *);

#define BODY(name, format, parts, rows) \
    static void name##_##parts##_##rows(const cq_layout *w, int64_t i, const cq_chunk *c, float *out) \
    { \
        run_body(w, i, c, out, format, parts, rows); \
    }
#define BODIES(name, format) \
    BODY(name, format, 1, 1) \
    BODY(name, format, 1, 2) \
    BODY(name, format, 1, 4) BODY(name, format, 2, 1) BODY(name, format, 2, 2) BODY(name, format, 3, 1)
#define TABLE(name) \
    { \
        {[1] = name##_1_1, [2] = name##_1_2, [4] = name##_1_4}, \
        {[1] = name##_2_1, [2] = name##_2_2}, \
        {[1] = name##_3_1}, \
    }

BODIES(bits1, CQ_BINARY)
BODIES(bits2, CQ_INT2)
BODIES(bits3, CQ_INT3)
BODIES(bits4, CQ_INT4)
BODIES(bits8, CQ_INT8)

static const kernel kernels[CQ_FORMATS][CQ_MAX_PARTS][5] = {
    [CQ_BINARY] = TABLE(bits1), [CQ_TERNARY] = TABLE(bits2), [CQ_INT2] = TABLE(bits2),
    [CQ_INT3] = TABLE(bits3),   [CQ_INT4] = TABLE(bits4),    [CQ_INT8] = TABLE(bits8),
};

static void run(const cq_layout *w, int64_t index, const cq_chunk *chunk, float *result)
{
    kernels[w->format][chunk->parts - 1][chunk->rows](w, index, chunk, result);
}

static int chunk_rows(int parts, int64_t rows)
{
    static const int most[CQ_MAX_PARTS] = {4, 2, 1};
    int chunk = rows < most[parts - 1] ? (int)rows : most[parts - 1];
    return chunk == 3 ? 4 : chunk;
}

const cq_path cq_neon_path = {chunk_rows,     pack_chunk,        pack_window, pack_lines,     run,
                              given_integers, store_lanes_plain, store,       dequantize_row, widen,
                              rotate_row,     project,           dot,         affine,         NULL,
                              NULL,           NULL};
