/* One row of floats times binary rows, by AVX-512 with VBMI: sums of x are looked up, four columns at a time.
 *
 * A byte of a unit holds the bits of eight columns (layout.c): each half of it names one of the 16 sums of its four
 * columns. The bytes of these sums are in tables of 64, 16 sums for each of the four bytes of a lane; vpermb looks up
 * 64 of them, and vpdpbusd adds those of a lane. So the 32 columns of 16 rows take 2 * (tables + 1) instructions and a
 * half, where products of digits take 8 * (digits + 2). Rows of one digit are multiplied: memory holds them up, and
 * gives one stream faster than the four that are read here.
 *
 * Sums of integers are exact, and become floats as those of path_avx512.c do: results are the same, bit for bit.
 */
#include "avx512.h"

#define GROUP 16               /* columns of a set of tables */
#define SETS (CQ_TILE / GROUP) /* sets of a tile */
#define HIGH 3                 /* tables of the sums of the first two digits as one number, */
#define LOW(parts) ((parts) == 3 ? 2 : 0) /* and of the third digit */

size_t cq_lookup_bytes(const cq_layout *w, int parts)
{
    return (size_t)w->tiles * SETS * (size_t)(HIGH + LOW(parts)) * 64;
}

/* The `count` low bytes of the 16 sums of each of four times four numbers: number 4 * q + j is bit q of byte j. */
static void put_tables(const int32_t number[GROUP], int count, uint8_t *tables)
{
    static const __mmask16 has_bit[4] = {0xaaaa, 0xcccc, 0xf0f0, 0xff00};
    for (int j = 0; j < 4; ++j) {
        __m512i sums = _mm512_setzero_si512();
        for (int q = 0; q < 4; ++q)
            sums = _mm512_mask_add_epi32(sums, has_bit[q], sums, _mm512_set1_epi32(number[4 * q + j]));
        for (int t = 0; t < count; ++t, sums = _mm512_srai_epi32(sums, 8))
            _mm_storeu_si128((__m128i *)(tables + 64 * t + 16 * j), _mm512_cvtepi32_epi8(sums));
    }
}

void cq_lookup_build(const cq_layout *w, const cq_chunk *chunk, uint8_t *tables)
{
    int parts = chunk->parts;
    for (int64_t set = 0; set < (int64_t)w->tiles * SETS; ++set, tables += 64 * (HIGH + LOW(parts))) {
        const int8_t *digit = chunk->x + set / SETS * parts * CQ_TILE + set % SETS * GROUP;
        int32_t high[GROUP], low[GROUP];
        for (int k = 0; k < GROUP; ++k) {
            high[k] = 256 * digit[k] + digit[CQ_TILE + k];
            low[k] = parts == 3 ? digit[2 * CQ_TILE + k] : 0;
        }
        put_tables(high, HIGH, tables);
        put_tables(low, LOW(parts), tables + 64 * HIGH);
    }
}

/* Twice the number whose bytes' sums are given, the highest first, plus `zero`. */
ALWAYS __m512i number(__m512i top, __m512i middle, __m512i last, int32_t zero)
{
    __m512i value = _mm512_add_epi32(_mm512_slli_epi32(_mm512_add_epi32(_mm512_slli_epi32(top, 8), middle), 8), last);
    return _mm512_add_epi32(_mm512_slli_epi32(value, 1), _mm512_set1_epi32(zero));
}

/* Fetches what the next `runs` hold, from end to end while byte `at` and on of each of these are read: memory is faster
 * with one stream than with several. */
ALWAYS void fetch_next(const cq_layout *w, const uint8_t *stream, int64_t at, const int runs)
{
    const char *next = (const char *)stream + runs * (w->run_bytes + at);
#pragma GCC unroll 4
    for (int r = 0; r < runs; ++r)
        _mm_prefetch(next + 64 * r, _MM_HINT_T1);
}

ALWAYS void runs_body(const cq_layout *w, int64_t first, const cq_chunk *chunk, const uint8_t *tables, float *result,
                      const int parts, const int runs)
{
    const int count = HIGH + LOW(parts);
    const __m512i nibble = _mm512_set1_epi8(15), place = _mm512_set1_epi32(0x30201000), one = _mm512_set1_epi8(1);
    const uint8_t *stream[4];
    __m512 total[4];
#pragma GCC unroll 4
    for (int r = 0; r < runs; ++r) {
        stream[r] = (const uint8_t *)w + w->stream + (first + r) * w->run_bytes;
        total[r] = _mm512_setzero_ps();
    }
    for (int b = 0; b < w->blocks; ++b) {
        const cq_block *block = &w->block[b];
        const uint8_t *table = tables + (int64_t)block->tile * SETS * count * 64;
        const int32_t *zero = chunk->zero_sum + (int64_t)b * parts;
        int64_t at = block->byte + w->header;
        __m512i sum[5 * 4];
        fetch_next(w, stream[0], block->byte, runs); /* the scales */
#pragma GCC unroll 4
        for (int r = 0; r < runs; ++r) {
#pragma GCC unroll 5
            for (int t = 0; t < count; ++t)
                sum[4 * t + r] = _mm512_setzero_si512();
        }
        for (int k = 0; k < block->width; k += 2 * GROUP, at += 64) {
            fetch_next(w, stream[0], at, runs);
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half, table += count * 64) {
                __m512i index[4];
#pragma GCC unroll 4
                for (int r = 0; r < runs; ++r) {
                    __m512i line = *(const __m512i *)(stream[r] + at);
                    if (half)
                        line = _mm512_srli_epi16(line, 4);
                    index[r] = _mm512_ternarylogic_epi32(line, nibble, place, 0xea); /* line & nibble | place */
                }
#pragma GCC unroll 5
                for (int t = 0; t < count; ++t) {
                    __m512i values = *(const __m512i *)(table + 64 * t);
                    int is_signed = t == HIGH - 1 || t == count - 1;
#pragma GCC unroll 4
                    for (int r = 0; r < runs; ++r) {
                        __m512i found = _mm512_permutexvar_epi8(index[r], values);
                        sum[4 * t + r] = is_signed ? _mm512_dpbusd_epi32(sum[4 * t + r], one, found)
                                                   : _mm512_dpbusd_epi32(sum[4 * t + r], found, one);
                    }
                }
            }
        }
        /* Compilers that see these sums read below keep a copy of each in memory, written in every round of the loop. */
#pragma GCC unroll 5
        for (int t = 0; t < count; ++t)
#pragma GCC unroll 4
            for (int r = 0; r < runs; ++r)
                __asm__("" : "+v"(sum[4 * t + r]));
#pragma GCC unroll 4
        for (int r = 0; r < runs; ++r) {
            const uint8_t *header = stream[r] + block->byte;
            __m512 value = _mm512_cvtepi32_ps(number(sum[8 + r], sum[4 + r], sum[r], 256 * zero[0] + zero[1]));
            if (parts == 3)
                value = _mm512_fmadd_ps(
                    value, _mm512_set1_ps(256.0f),
                    _mm512_cvtepi32_ps(number(_mm512_setzero_si512(), sum[16 + r], sum[12 + r], zero[2])));
            total[r] = _mm512_fmadd_ps(value, lanes(header, w->wide_scale, 0), total[r]);
            if (w->affine)
                total[r] = _mm512_fmadd_ps(lanes(header, w->wide_scale, 1), _mm512_set1_ps(chunk->sum[b]), total[r]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < runs; ++r)
        _mm512_storeu_ps(result + r * CQ_LANES, _mm512_mul_ps(total[r], _mm512_set1_ps(chunk->scale[0])));
}

#define BODY(parts, runs) \
    static void runs_##parts##_##runs(const cq_layout *w, int64_t first, const cq_chunk *c, const uint8_t *t, \
                                      float *out) \
    { \
        runs_body(w, first, c, t, out, parts, runs); \
    }
#define BODIES(parts) BODY(parts, 1) BODY(parts, 2) BODY(parts, 4)
BODIES(2)
BODIES(3)

int cq_lookup_runs(const cq_layout *w, int64_t first, int64_t runs, const cq_chunk *chunk, const uint8_t *tables,
                   float *result)
{
    static void (*const bodies[2][3])(const cq_layout *, int64_t, const cq_chunk *, const uint8_t *, float *) = {
        {runs_2_1, runs_2_2, runs_2_4}, {runs_3_1, runs_3_2, runs_3_4}};
    int size = runs >= 4 ? 2 : runs >= 2;
    bodies[chunk->parts - 2][size](w, first, chunk, tables, result);
    return 1 << size;
}
