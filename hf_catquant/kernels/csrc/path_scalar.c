/* Portable C: the path of processors that no other one serves, and the one to read first. */
#include "window.h"

/* value (16 lanes x 4) of quad q of a unit */
static void quad_values(int format, const uint8_t *unit, int q, uint8_t out[64])
{
    for (int i = 0; i < 64; ++i)
        switch (format) {
        case CQ_BINARY: out[i] = (uint8_t)((unit[i] >> q & 1) << 1); break;
        case CQ_INT3:
            out[i] = (uint8_t)((unit[64 * (q / 4) + i] >> (2 * (q % 4)) & 3) | (unit[128 + i] >> q & 1) << 2);
            break;
        case CQ_INT4: out[i] = unit[i] >> (4 * q) & 15; break;
        case CQ_INT8: out[i] = unit[i]; break;
        default: out[i] = unit[i] >> (2 * q) & 3;
        }
}

static void read_scales(const cq_layout *w, const uint8_t *at, float scale[CQ_LANES], float offset[CQ_LANES])
{
    int dtype = w->wide_scale ? CQ_FLOAT32 : CQ_FLOAT16;
    widen(at, dtype, CQ_LANES, scale);
    if (w->affine)
        widen(at + CQ_LANES * (w->wide_scale ? 4 : 2), dtype, CQ_LANES, offset);
}

/* sums (rows * parts, 16) of a block in integers */
static void block_sums(const cq_layout *w, const uint8_t *unit, const cq_chunk *chunk, int b, int32_t sums[][CQ_LANES])
{
    const cq_format *f = &cq_formats[w->format];
    const cq_block *block = &w->block[b];
    int rows = chunk->rows * chunk->parts;
    for (int r = 0; r < rows; ++r)
        for (int lane = 0; lane < CQ_LANES; ++lane)
            sums[r][lane] = chunk->zero_sum[(int64_t)b * rows + r];
    for (int k = 0; k < block->width; k += 4) {
        uint8_t values[64];
        quad_values(w->format, unit + k / f->unit_columns * f->unit_lines * 64, k % f->unit_columns / 4, values);
        const int8_t *x = chunk->x + (int64_t)(block->tile + k / CQ_TILE) * rows * CQ_TILE + k % CQ_TILE;
        for (int r = 0; r < rows; ++r, x += CQ_TILE)
            for (int lane = 0; lane < CQ_LANES; ++lane)
                sums[r][lane] += values[4 * lane] * x[0] + values[4 * lane + 1] * x[1] + values[4 * lane + 2] * x[2] +
                                 values[4 * lane + 3] * x[3];
    }
}

static void run(const cq_layout *w, int64_t index, const cq_chunk *chunk, float *result)
{
    const uint8_t *stream = (const uint8_t *)w + w->stream + index * w->run_bytes;
    int32_t sums[CQ_MAX_ROWS * CQ_MAX_PARTS][CQ_LANES];
    float scale[CQ_LANES], offset[CQ_LANES] = {0};
    memset(result, 0, (size_t)chunk->rows * CQ_LANES * 4);
    for (int b = 0; b < w->blocks; ++b) {
        read_scales(w, stream + w->block[b].byte, scale, offset);
        block_sums(w, stream + w->block[b].byte + w->header, chunk, b, sums);
        for (int m = 0; m < chunk->rows; ++m)
            for (int lane = 0; lane < CQ_LANES; ++lane) {
                float total = (float)sums[m][lane];
                for (int p = 1; p < chunk->parts; ++p)
                    total = total * 256.0f + (float)sums[p * chunk->rows + m][lane];
                result[m * CQ_LANES + lane] +=
                    total * scale[lane] + offset[lane] * chunk->sum[(int64_t)b * chunk->rows + m];
            }
    }
    for (int m = 0; m < chunk->rows; ++m)
        for (int lane = 0; lane < CQ_LANES; ++lane)
            result[m * CQ_LANES + lane] *= chunk->scale[m];
}

static int chunk_rows(int parts, int64_t rows)
{
    (void)parts;
    return rows < 4 ? (int)rows : 4;
}

const cq_path cq_scalar_path = {chunk_rows,     pack_chunk,        pack_window, pack_lines,     run,
                                given_integers, store_lanes_plain, store,       dequantize_row, widen,
                                rotate_row,     project,           dot,         affine,         NULL,
                                NULL,           NULL};
