/* AMX: 16 rows of x times 16 rows of the weight times 64 columns in one instruction, for many rows of x.
 *
 * A block of 32 rows of the weight (a pair of runs) is unpacked to signed levels, which stay in the first-level cache
 * while all chunks of x pass. A tile of levels is 64 columns of 16 rows in the order that tdpbssd wants, four columns
 * of a row side by side. Sums of a block, exact in int32, are multiplied by its scales and added to float32 sums. That
 * takes about as long as the products do, so it is done one step late, while the tiles are busy with the next one.
 */
#include "rows.h"

#include <immintrin.h>

/* Not the intrinsics: those of some compilers do not say which memory they read, and stores in front of them are then
 * lost. */
#define TILE_LOAD(tile, from) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile::"r"(from), "r"((int64_t)64) : "memory")
#define TILE_STORE(tile, to) \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"((int64_t)64) : "memory")
#define TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile::)
#define TILE_PRODUCT(sum, x, w) __asm__ volatile("tdpbssd %%tmm" #w ", %%tmm" #x ", %%tmm" #sum::)

#define PASS 16 /* chunks of x that share an unpacked block: with their float32 sums, 32 KiB */
#define TILE_BYTES 1024
#define TILE_SUMS 256
#define MOST_TILES (CQ_MAX_BLOCK / CQ_TILE)

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t colsb[16];
    uint8_t rows[16];
} tile_config;

void cq_amx_begin(void)
{
    tile_config config __attribute__((aligned(64))) = {.palette = 1};
    for (int t = 0; t < 8; ++t) {
        config.colsb[t] = 64;
        config.rows[t] = 16;
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory");
}

void cq_amx_end(void)
{
    __asm__ volatile("tilerelease" ::: "memory");
}

/* Bytes ahead that are fetched: about the latency of memory times the rate of one core. */
#define AHEAD 2048

#define ALWAYS static inline __attribute__((always_inline))

ALWAYS __m512i field(const uint8_t *line, int shift, int mask)
{
    __m512i bytes = _mm512_loadu_si512(line);
    return _mm512_and_si512(shift == 0 ? bytes : _mm512_srl_epi16(bytes, _mm_cvtsi32_si128(shift)),
                            _mm512_set1_epi8((char)mask));
}

/* The levels of one unit, a line for every quad. */
ALWAYS void unpack_unit(const int format, const uint8_t *unit, int8_t *out)
{
    const int quads = format == CQ_BINARY || format == CQ_INT3 ? 8 : format == CQ_INT4 ? 2 : format == CQ_INT8 ? 1 : 4;
    const int zero = format == CQ_BINARY || format == CQ_TERNARY ? 1
                     : format == CQ_INT2                         ? 2
                     : format == CQ_INT3                         ? 4
                     : format == CQ_INT4                         ? 8
                                                                 : -128;
#pragma GCC unroll 8
    for (int q = 0; q < quads; ++q) {
        __m512i value;
        if (format == CQ_BINARY) {
            value = field(unit, q, 1);
            value = _mm512_add_epi8(value, value);
        } else if (format == CQ_INT3) {
            __m512i top = field(unit + 128, q, 1);
            top = _mm512_add_epi8(top, top);
            value = _mm512_or_si512(field(unit + 64 * (q / 4), 2 * (q % 4), 3), _mm512_add_epi8(top, top));
        } else if (format == CQ_INT4) {
            value = field(unit, 4 * q, 15);
        } else if (format == CQ_INT8) {
            value = _mm512_loadu_si512(unit);
        } else {
            value = field(unit, 2 * q, 3);
        }
        _mm512_store_si512(out + 64 * q, _mm512_sub_epi8(value, _mm512_set1_epi8((char)zero)));
    }
}

ALWAYS void unpack_format(const cq_block *block, const uint8_t *unit, int8_t *out, const int format)
{
    const cq_format *f = &cq_formats[format];
    int k = 0;
    for (; k < block->width; k += f->unit_columns, unit += 64 * f->unit_lines) {
        for (int line = 0; line < f->unit_lines; ++line)
            _mm_prefetch((const char *)unit + 64 * line + AHEAD, _MM_HINT_T0);
        unpack_unit(format, unit, out + 16 * k);
    }
    /* The digits of x are zero there, but memory must be initialized. */
    for (; k % CQ_TILE; k += 4)
        _mm512_store_si512(out + 16 * k, _mm512_setzero_si512());
}

/* One block of a pair of runs, ready to multiply. */
typedef struct {
    int8_t levels[2][MOST_TILES * TILE_BYTES];
    float scale[32], offset[32];
} unpacked;

static void unpack_block(const cq_layout *w, int64_t pair, int b, unpacked *out)
{
    const cq_block *block = &w->block[b];
    int dtype = w->wide_scale ? CQ_FLOAT32 : CQ_FLOAT16, size = w->wide_scale ? 4 : 2;
    for (int half = 0; half < 2; ++half) {
        /* An odd last run is taken twice and stored once. */
        int64_t run = pair * 2 + half < w->runs ? pair * 2 + half : w->runs - 1;
        const uint8_t *at = (const uint8_t *)w + w->stream + run * w->run_bytes + block->byte;
        widen(at, dtype, CQ_LANES, out->scale + 16 * half);
        if (w->affine)
            widen(at + CQ_LANES * size, dtype, CQ_LANES, out->offset + 16 * half);
        at += w->header;
        switch (w->format) {
        case CQ_BINARY: unpack_format(block, at, out->levels[half], CQ_BINARY); break;
        case CQ_TERNARY: unpack_format(block, at, out->levels[half], CQ_TERNARY); break;
        case CQ_INT2: unpack_format(block, at, out->levels[half], CQ_INT2); break;
        case CQ_INT3: unpack_format(block, at, out->levels[half], CQ_INT3); break;
        case CQ_INT4: unpack_format(block, at, out->levels[half], CQ_INT4); break;
        case CQ_INT8: unpack_format(block, at, out->levels[half], CQ_INT8); break;
        }
    }
}

/* One digit of one block times one or two chunks: the products of tiles, and the sums they become. */
typedef struct {
    const cq_chunk *chunk;
    int chunks, part;
    int32_t *sums; /* (2 * chunks, 16, 16): the first chunk with both runs, then the second one */
    float *total;  /* (chunks, 16, 32) */
} step;

/* total += sums * scale * factor, 16 x 16 of them; `tile` counts as in step.sums. Offsets are added with the first
 * digit. */
static void add_tile(const cq_layout *w, const unpacked *u, int b, const step *s, int tile)
{
    static const float factors[CQ_MAX_PARTS][CQ_MAX_PARTS] = {{1.0f}, {256.0f, 1.0f}, {65536.0f, 256.0f, 1.0f}};
    const int32_t *sums = s->sums + TILE_SUMS * tile;
    float *total = s->total + 512 * (tile / 2) + 16 * (tile % 2);
    __m512 factor = _mm512_set1_ps(factors[s->chunk->parts - 1][s->part]);
    __m512 scale = _mm512_mul_ps(_mm512_load_ps(u->scale + 16 * (tile % 2)), factor);
    if (w->affine && s->part == 0) {
        const float *x = s->chunk[tile / 2].sum + 16 * b;
        __m512 offset = _mm512_load_ps(u->offset + 16 * (tile % 2));
#pragma GCC unroll 16
        for (int m = 0; m < 16; ++m) {
            __m512 value = _mm512_fmadd_ps(offset, _mm512_set1_ps(x[m]), _mm512_load_ps(total + 32 * m));
            value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums + 16 * m)), scale, value);
            _mm512_store_ps(total + 32 * m, value);
        }
    } else {
#pragma GCC unroll 16
        for (int m = 0; m < 16; ++m) {
            __m512 value = _mm512_cvtepi32_ps(_mm512_load_si512(sums + 16 * m));
            _mm512_store_ps(total + 32 * m, _mm512_fmadd_ps(value, scale, _mm512_load_ps(total + 32 * m)));
        }
    }
}

/* The products of step `now`; between them, the sums of the step before are added, so that both units of the processor
 * have work. */
static void multiply(const cq_layout *w, const unpacked *u, int b, const step *now, const step *before)
{
    const cq_block *block = &w->block[b];
    int parts = now->chunk->parts, tiles = (block->width + CQ_TILE - 1) / CQ_TILE, left_over = 2 * before->chunks,
        tile = 0;
    int64_t stride = (int64_t)parts * TILE_BYTES, at = block->tile * stride + now->part * TILE_BYTES;
    const int8_t *upper = now->chunk[0].x + at, *lower = now->chunk[now->chunks - 1].x + at;
    const int8_t *left = u->levels[0], *right = u->levels[1];
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    for (int t = 0; t < tiles; ++t, upper += stride, lower += stride, left += TILE_BYTES, right += TILE_BYTES) {
        TILE_LOAD(4, upper);
        TILE_LOAD(6, left);
        TILE_LOAD(7, right);
        TILE_PRODUCT(0, 4, 6);
        TILE_PRODUCT(1, 4, 7);
        if (tile < left_over)
            add_tile(w, u, b, before, tile++);
        if (now->chunks == 2) {
            TILE_LOAD(5, lower);
            TILE_PRODUCT(2, 5, 6);
            TILE_PRODUCT(3, 5, 7);
        }
        if (tile < left_over)
            add_tile(w, u, b, before, tile++);
    }
    while (tile < left_over)
        add_tile(w, u, b, before, tile++);
    TILE_STORE(0, now->sums);
    TILE_STORE(1, now->sums + TILE_SUMS);
    if (now->chunks == 2) {
        TILE_STORE(2, now->sums + 2 * TILE_SUMS);
        TILE_STORE(3, now->sums + 3 * TILE_SUMS);
    }
}

/* All chunks and digits times one block. */
static void add_block(const cq_layout *w, const unpacked *u, int b, const cq_chunk *chunk, int chunks,
                      int32_t (*sums)[4 * TILE_SUMS], float *total)
{
    step before = {0};
    int parts = chunk->parts, steps = (chunks + 1) / 2 * parts;
    for (int i = 0; i < steps; ++i) {
        int c = i / parts * 2;
        step now = {chunk + c, c + 1 < chunks ? 2 : 1, i % parts, sums[i % 2], total + 512 * c};
        multiply(w, u, b, &now, &before);
        before = now;
    }
    for (int tile = 0; tile < 2 * before.chunks; ++tile)
        add_tile(w, u, b, &before, tile);
}

/* out points at the first row of x and the first row of the weight; bias at the latter's. */
static void store_chunk(const cq_chunk *chunk, float *total, int count, const char *bias, int bias_dtype, char *out,
                        int dtype, int64_t out_stride)
{
    int size = dtype == CQ_FLOAT32 ? 4 : 2, bias_size = bias_dtype == CQ_FLOAT32 ? 4 : 2;
    for (int m = 0; m < chunk->filled; ++m, total += 32)
        for (int from = 0; from < count; from += 16) {
            _mm512_store_ps(total + from,
                            _mm512_mul_ps(_mm512_load_ps(total + from), _mm512_set1_ps(chunk->scale[m])));
            store(total + from, bias == NULL ? NULL : bias + from * bias_size, bias_dtype,
                  out + (m * out_stride + from) * size, dtype, count - from < 16 ? count - from : 16);
        }
}

void cq_amx_pair(const cq_layout *w, int64_t pair, const cq_chunk *chunk, int chunks, const void *bias, int bias_dtype,
                 void *out, int dtype, int64_t out_stride)
{
    unpacked u __attribute__((aligned(64)));
    float total[PASS * 16 * 32] __attribute__((aligned(64)));
    int32_t sums[2][4 * TILE_SUMS] __attribute__((aligned(64)));
    int64_t row = pair * 32;
    int count = (int)(w->rows - row < 32 ? w->rows - row : 32), size = dtype == CQ_FLOAT32 ? 4 : 2;
    const char *shift = bias == NULL ? NULL : (const char *)bias + row * (bias_dtype == CQ_FLOAT32 ? 4 : 2);
    for (int first = 0; first < chunks; first += PASS) {
        int many = chunks - first < PASS ? chunks - first : PASS;
        char *to = (char *)out + (first * 16 * out_stride + row) * size;
        memset(total, 0, (size_t)many * 512 * 4);
        for (int b = 0; b < w->blocks; ++b) {
            unpack_block(w, pair, b, &u);
            if (b == w->blocks - 1) /* the lines that results go to are fetched while the last block is multiplied */
                for (int64_t m = 0; m < many * 16 && first * 16 + m < chunks * 16 - 16 + chunk[chunks - 1].filled;
                     ++m) {
                    __builtin_prefetch(to + m * out_stride * size, 1);
                    __builtin_prefetch(to + m * out_stride * size + 64, 1);
                }
            add_block(w, &u, b, chunk + first, many, sums, total);
        }
        for (int c = 0; c < many; ++c)
            store_chunk(chunk + first + c, total + 512 * c, count, shift, bias_dtype, to + c * 16 * out_stride * size,
                        dtype, out_stride);
    }
}

void cq_amx_peak(int64_t rounds)
{
    cq_amx_begin();
    TILE_ZERO(4);
    TILE_ZERO(5);
    TILE_ZERO(6);
    TILE_ZERO(7);
    for (int64_t i = 0; i < rounds; ++i) {
        TILE_PRODUCT(0, 4, 6);
        TILE_PRODUCT(1, 4, 7);
        TILE_PRODUCT(2, 5, 6);
        TILE_PRODUCT(3, 5, 7);
    }
    cq_amx_end();
}
