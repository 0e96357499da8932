/* Builds the layout of a weight from its packed bytes, 16 rows at a time, and places chunks of x in memory. */
#include "catquant.h"

#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

static int64_t round_up(int64_t value, int64_t step)
{
    return (value + step - 1) / step * step;
}

/* Fills the header and, if `out` has room for them, the blocks; returns the number of blocks. */
static int32_t plan(cq_layout *out, int with_blocks)
{
    const cq_format *f = &cq_formats[out->format];
    int64_t byte = 0;
    int32_t blocks = 0, tiles = 0;
    for (int64_t g = 0; g < out->groups; ++g) {
        int64_t end = (g + 1) * out->group_width < out->columns ? (g + 1) * out->group_width : out->columns;
        for (int64_t k = g * out->group_width; k < end; k += CQ_MAX_BLOCK, ++blocks) {
            int32_t width = (int32_t)(end - k < CQ_MAX_BLOCK ? end - k : CQ_MAX_BLOCK);
            if (with_blocks)
                out->block[blocks] = (cq_block){byte, (int32_t)k, width, tiles, (int32_t)g};
            byte += out->header + round_up(width, f->unit_columns) / f->unit_columns * f->unit_lines * 64;
            tiles += (width + CQ_TILE - 1) / CQ_TILE;
        }
    }
    out->blocks = blocks;
    out->tiles = tiles;
    out->run_bytes = byte;
    out->stream = round_up((int64_t)(sizeof(cq_layout) + (size_t)blocks * sizeof(cq_block)), 64);
    out->bytes = out->stream + out->runs * out->run_bytes;
    return blocks;
}

static cq_layout describe(int format, int64_t rows, int64_t columns, int64_t group_width, int affine, int wide_scale)
{
    cq_layout w = {.rows = rows, .columns = columns, .group_width = group_width, .format = format};
    w.groups = (columns + group_width - 1) / group_width;
    w.runs = (rows + CQ_LANES - 1) / CQ_LANES;
    w.affine = affine;
    w.wide_scale = wide_scale;
    w.header = (int32_t)round_up((wide_scale ? 64 : 32) * (affine ? 2 : 1), 64);
    plan(&w, 0);
    return w;
}

/* Bytes of the layout that cq_layout_build() writes. */
int64_t cq_layout_bytes(int format, int64_t rows, int64_t columns, int64_t group_width, int affine, int wide_scale)
{
    return describe(format, rows, columns, group_width, affine, wide_scale).bytes;
}

static inline uint32_t word(const uint8_t *codes)
{
    uint32_t value;
    memcpy(&value, codes, 4);
    return value;
}

/* One unit of one lane: its word in each line. `codes` are those of the unit's columns. */
static void pack_lane(int format, const uint8_t *codes, uint32_t out[3])
{
    const uint32_t low = 0x03030303, top = 0x04040404;
    out[0] = out[1] = out[2] = 0;
    switch (format) {
    case CQ_BINARY:
        for (int q = 0; q < 8; ++q)
            out[0] |= word(codes + 4 * q) << q;
        break;
    case CQ_INT3:
        for (int q = 0; q < 8; ++q) {
            uint32_t value = word(codes + 4 * q);
            out[q / 4] |= (value & low) << (2 * (q % 4));
            out[2] |= (value & top) >> 2 << q;
        }
        break;
    case CQ_INT4: out[0] = word(codes) | word(codes + 4) << 4; break;
    case CQ_INT8: out[0] = word(codes); break;
    default: /* two bits */
        for (int q = 0; q < 4; ++q)
            out[0] |= word(codes + 4 * q) << (2 * q);
    }
}

static void put_scales(const cq_layout *w, int64_t run, int32_t group, const void *scale, const void *offset,
                       uint8_t *out)
{
    size_t size = w->wide_scale ? 4 : 2;
    for (int64_t lane = 0; lane < CQ_LANES; ++lane) {
        int64_t row = run * CQ_LANES + lane;
        if (row >= w->rows)
            break; /* the memory is zero */
        size_t from = (size_t)(row * w->groups + group) * size;
        memcpy(out + (size_t)lane * size, (const char *)scale + from, size);
        if (w->affine)
            memcpy(out + (CQ_LANES + (size_t)lane) * size, (const char *)offset + from, size);
    }
}

static void build_run(const cq_layout *w, int64_t run, const uint8_t *codes, int64_t stride, const void *scale,
                      const void *offset)
{
    const cq_format *f = &cq_formats[w->format];
    uint8_t *stream = (uint8_t *)w + w->stream + run * w->run_bytes;
    for (int32_t b = 0; b < w->blocks; ++b) {
        const cq_block *block = &w->block[b];
        uint8_t *unit = stream + block->byte + w->header;
        memset(stream + block->byte, 0, (size_t)w->header);
        put_scales(w, run, block->group, scale, offset, stream + block->byte);
        for (int32_t k = 0; k < block->width; k += f->unit_columns, unit += 64 * f->unit_lines)
            for (int lane = 0; lane < CQ_LANES; ++lane) {
                uint32_t words[3];
                pack_lane(w->format, codes + lane * stride + block->column + k, words);
                for (int line = 0; line < f->unit_lines; ++line)
                    memcpy(unit + 64 * line + 4 * lane, &words[line], 4);
            }
    }
}

typedef struct {
    cq_layout *w;
    const uint8_t *packed;
    const void *scale, *offset;
    int64_t row_bytes;
    int failed;
} build_job;

static void build_task(void *context, int64_t run)
{
    build_job *job = context;
    const cq_layout *w = job->w;
    int64_t stride = w->columns + 32; /* the last unit of a row reads on */
    uint8_t *codes = calloc(CQ_LANES, (size_t)stride);
    if (codes == NULL) {
        __atomic_store_n(&job->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    for (int64_t lane = 0; lane < CQ_LANES && run * CQ_LANES + lane < w->rows; ++lane)
        cq_decode_row(w->format, job->packed + (run * CQ_LANES + lane) * job->row_bytes, w->columns, w->group_width,
                      codes + lane * stride);
    build_run(w, run, codes, stride, job->scale, job->offset);
    free(codes);
}

/* A weight is read from end to end: pages of 2 MiB save most of the looking up of addresses. */
static void ask_for_large_pages(void *memory, int64_t bytes)
{
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = CQ_LARGE_PAGE;
    uintptr_t from = ((uintptr_t)memory + page - 1) / page * page;
    uintptr_t to = ((uintptr_t)memory + (uintptr_t)bytes) / page * page;
    if (from < to)
        madvise((void *)from, to - from, MADV_HUGEPAGE); /* a wish: without them it is slower */
#else
    (void)memory, (void)bytes;
#endif
}

/* Writes the layout of packed rows (rows, row_bytes) with scale and offset (rows, groups), offset NULL where there is
 * none, into `out`, cq_layout_bytes() of memory on a 64-byte boundary. */
int cq_layout_build(int format, int64_t rows, int64_t columns, int64_t group_width, int wide_scale,
                    const uint8_t *packed, int64_t row_bytes, const void *scale, const void *offset, int threads,
                    void *out)
{
    build_job job = {out, packed, scale, offset, row_bytes, 0};
    cq_layout w = describe(format, rows, columns, group_width, offset != NULL, wide_scale);
    ask_for_large_pages(out, w.bytes);
    *job.w = w;
    plan(job.w, 1);
    cq_parallel(threads, job.w->runs, build_task, &job);
    return job.failed ? CQ_NO_MEMORY : CQ_OK;
}

size_t cq_chunk_bytes(const cq_layout *w, int rows, int parts)
{
    size_t digits = (size_t)w->tiles * (size_t)(rows * parts) * CQ_TILE;
    size_t numbers = (size_t)w->blocks * (size_t)(rows * parts + rows) + (size_t)rows;
    return (size_t)round_up((int64_t)(digits + numbers * 4), 64);
}

void cq_chunk_place(const cq_layout *w, int rows, int parts, void *memory, cq_chunk *out)
{
    out->rows = rows;
    out->parts = parts;
    out->x = memory;
    out->zero_sum = (int32_t *)(out->x + (size_t)w->tiles * (size_t)(rows * parts) * CQ_TILE);
    out->sum = (float *)(out->zero_sum + (size_t)w->blocks * (size_t)(rows * parts));
    out->scale = out->sum + (size_t)w->blocks * (size_t)rows;
}
