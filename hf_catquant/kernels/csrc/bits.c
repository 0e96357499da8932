/* Dot products of packed codes by counting bits: of many queries with many rows, and the best rows of each query.
 *
 * Of binary codes, read as -1 and +1, and of ternary codes with bits u (not 0) and v (negative), d features in all,
 *
 *     binary    x . y = d - 2 |x xor y|                              |.| counts bits
 *     ternary   x . y = |t| - 2 |t & (v xor v')|       t = u & u'
 *
 * Rows lie in tiles of CQ_BITS_TILE: word w of plane p of all rows of a tile side by side, at (p * words + w) *
 * CQ_BITS_TILE, the last tile filled up with zeros. A vector holds a word of several rows and is counted word by word,
 * so that a row's count stays in its lane. A tile stays in the cache while every query meets it.
 *
 * The paths are functions of this file, compiled for their instructions, and not files of their own: they are short,
 * and ask for others than the products of linear.c (AVX512_VPOPCNTDQ).
 */
#include "catquant.h"

#include <string.h>

#define CQ_BITS_TILE 256 /* rows; of 384 ternary features they fill 24 KiB, of a cache of 32 */
#define TILES_A_TASK 16
#define TOGETHER 2 /* queries that a kernel may be given at once: the rows are loaded once for them */
#define WORDS_A_BYTE 31 /* 8 bits each fit into a byte that counts */

#define ALWAYS static inline __attribute__((always_inline))

/* Dot products of `many` queries, 1 or TOGETHER of them, with the rows of a tile: out[q], CQ_BITS_TILE each. */
typedef void (*kernel)(const uint64_t *tile, const uint64_t *const *query, int many, int64_t words, int features,
                       int16_t *const *out);

#define KERNEL(name, kind, target, ternary) \
    target static void name##_##kind(const uint64_t *tile, const uint64_t *const *query, int many, int64_t words, \
                                     int features, int16_t *const *out) \
    { \
        for (int q = 0; q < many; ++q) \
            name##_tile(tile, query[q], words, features, ternary, out[q]); \
    }
#define KERNELS(name, target) KERNEL(name, binary, target, 0) KERNEL(name, ternary, target, 1)

ALWAYS uint64_t count_of(uint64_t x)
{
    x -= x >> 1 & 0x5555555555555555u;
    x = (x & 0x3333333333333333u) + (x >> 2 & 0x3333333333333333u);
    x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fu;
    return x * 0x0101010101010101u >> 56;
}

ALWAYS void scalar_tile(const uint64_t *tile, const uint64_t *query, int64_t words, int features, int ternary,
                        int16_t *out)
{
    for (int r = 0; r < CQ_BITS_TILE; ++r) {
        const uint64_t *at = tile + r;
        uint64_t both = ternary ? 0 : (uint64_t)features, unlike = 0;
        for (int64_t w = 0; w < words; ++w, at += CQ_BITS_TILE) {
            uint64_t bits = at[0] ^ query[w];
            if (ternary) {
                uint64_t used = at[0] & query[w];
                bits = used & (at[words * CQ_BITS_TILE] ^ query[words + w]);
                both += count_of(used);
            }
            unlike += count_of(bits);
        }
        out[r] = (int16_t)((int64_t)both - 2 * (int64_t)unlike);
    }
}
KERNELS(scalar, )

#if defined(__x86_64__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vpopcntdq")))

/* Bits of every byte: its two halves looked up. */
AVX2 ALWAYS __m256i bytes_of(__m256i x)
{
    const __m256i table =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const __m256i fifteen = _mm256_set1_epi8(15);
    __m256i low = _mm256_and_si256(x, fifteen), high = _mm256_and_si256(_mm256_srli_epi16(x, 4), fifteen);
    return _mm256_add_epi8(_mm256_shuffle_epi8(table, low), _mm256_shuffle_epi8(table, high));
}

AVX2 ALWAYS void avx2_tile(const uint64_t *tile, const uint64_t *query, int64_t words, int features, int ternary,
                           int16_t *out)
{
    const __m256i zero = _mm256_setzero_si256();
    for (int r = 0; r < CQ_BITS_TILE; r += 8) {
        __m256i both[2], unlike[2];
        both[0] = both[1] = _mm256_set1_epi64x(ternary ? 0 : features);
        unlike[0] = unlike[1] = zero;
        for (int64_t first = 0; first < words; first += WORDS_A_BYTE) {
            int64_t end = first + WORDS_A_BYTE < words ? first + WORDS_A_BYTE : words;
            __m256i used_bytes[2] = {zero, zero}, unlike_bytes[2] = {zero, zero};
            for (int64_t w = first; w < end; ++w) {
                const uint64_t *at = tile + w * CQ_BITS_TILE + r;
                __m256i asked = _mm256_set1_epi64x((int64_t)query[w]);
                for (int i = 0; i < 2; ++i) {
                    __m256i row = _mm256_loadu_si256((const __m256i *)(at + 4 * i));
                    __m256i bits = _mm256_xor_si256(row, asked);
                    if (ternary) {
                        __m256i signs = _mm256_loadu_si256((const __m256i *)(at + words * CQ_BITS_TILE + 4 * i));
                        __m256i used = _mm256_and_si256(row, asked);
                        signs = _mm256_xor_si256(signs, _mm256_set1_epi64x((int64_t)query[words + w]));
                        bits = _mm256_and_si256(used, signs);
                        used_bytes[i] = _mm256_add_epi8(used_bytes[i], bytes_of(used));
                    }
                    unlike_bytes[i] = _mm256_add_epi8(unlike_bytes[i], bytes_of(bits));
                }
            }
            for (int i = 0; i < 2; ++i) {
                both[i] = _mm256_add_epi64(both[i], _mm256_sad_epu8(used_bytes[i], zero));
                unlike[i] = _mm256_add_epi64(unlike[i], _mm256_sad_epu8(unlike_bytes[i], zero));
            }
        }
        for (int i = 0; i < 2; ++i) {
            int64_t value[4];
            _mm256_storeu_si256((__m256i *)value, _mm256_sub_epi64(both[i], _mm256_slli_epi64(unlike[i], 1)));
            for (int j = 0; j < 4; ++j)
                out[r + 4 * i + j] = (int16_t)value[j];
        }
    }
}
KERNELS(avx2, AVX2)

AVX512 ALWAYS void avx512_tile(const uint64_t *tile, const uint64_t *const *query, const int many, int64_t words,
                               int features, const int ternary, int16_t *const *out)
{
    for (int r = 0; r < CQ_BITS_TILE; r += 32) {
        const uint64_t *at = tile + r;
        __m512i both[TOGETHER][4], unlike[TOGETHER][4];
        for (int q = 0; q < many; ++q)
            for (int i = 0; i < 4; ++i) {
                both[q][i] = _mm512_set1_epi64(ternary ? 0 : features);
                unlike[q][i] = _mm512_setzero_si512();
            }
        for (int64_t w = 0; w < words; ++w, at += CQ_BITS_TILE) {
            __m512i asked[TOGETHER], asked_signs[TOGETHER];
            for (int q = 0; q < many; ++q) {
                asked[q] = _mm512_set1_epi64((int64_t)query[q][w]);
                asked_signs[q] = _mm512_set1_epi64(ternary ? (int64_t)query[q][words + w] : 0);
            }
            for (int i = 0; i < 4; ++i) {
                __m512i row = _mm512_loadu_si512(at + 8 * i), signs = row;
                if (ternary)
                    signs = _mm512_loadu_si512(at + words * CQ_BITS_TILE + 8 * i);
                for (int q = 0; q < many; ++q) {
                    __m512i bits = _mm512_xor_si512(row, asked[q]);
                    if (ternary) {
                        __m512i used = _mm512_and_si512(row, asked[q]);
                        both[q][i] = _mm512_add_epi64(both[q][i], _mm512_popcnt_epi64(used));
                        /* used & (signs ^ asked) */
                        bits = _mm512_ternarylogic_epi64(used, signs, asked_signs[q], 0x60);
                    }
                    unlike[q][i] = _mm512_add_epi64(unlike[q][i], _mm512_popcnt_epi64(bits));
                }
            }
        }
        for (int q = 0; q < many; ++q)
            for (int i = 0; i < 4; ++i) {
                __m512i value = _mm512_sub_epi64(both[q][i], _mm512_slli_epi64(unlike[q][i], 1));
                _mm_storeu_si128((__m128i *)(out[q] + r + 8 * i), _mm512_cvtepi64_epi16(value));
            }
    }
}

#define AVX512_KERNEL(kind, ternary) \
    AVX512 static void avx512_##kind(const uint64_t *tile, const uint64_t *const *query, int many, int64_t words, \
                                     int features, int16_t *const *out) \
    { \
        if (many == TOGETHER) \
            avx512_tile(tile, query, TOGETHER, words, features, ternary, out); \
        else \
            avx512_tile(tile, query, 1, words, features, ternary, out); \
    }
AVX512_KERNEL(binary, 0)
AVX512_KERNEL(ternary, 1)
#endif

#if defined(__aarch64__)
#include <arm_neon.h>

ALWAYS uint8x16_t neon_count(uint64x2_t x)
{
    return vcntq_u8(vreinterpretq_u8_u64(x));
}

ALWAYS uint64x2_t neon_sum(uint64x2_t sum, uint8x16_t bytes)
{
    return vpadalq_u32(sum, vpaddlq_u16(vpaddlq_u8(bytes)));
}

ALWAYS void neon_tile(const uint64_t *tile, const uint64_t *query, int64_t words, int features, int ternary,
                      int16_t *out)
{
    for (int r = 0; r < CQ_BITS_TILE; r += 4) {
        uint64x2_t both[2], unlike[2];
        both[0] = both[1] = vdupq_n_u64(ternary ? 0 : (uint64_t)features);
        unlike[0] = unlike[1] = vdupq_n_u64(0);
        for (int64_t first = 0; first < words; first += WORDS_A_BYTE) {
            int64_t end = first + WORDS_A_BYTE < words ? first + WORDS_A_BYTE : words;
            uint8x16_t used_bytes[2], unlike_bytes[2];
            used_bytes[0] = used_bytes[1] = unlike_bytes[0] = unlike_bytes[1] = vdupq_n_u8(0);
            for (int64_t w = first; w < end; ++w) {
                const uint64_t *at = tile + w * CQ_BITS_TILE + r;
                uint64x2_t asked = vdupq_n_u64(query[w]);
                for (int i = 0; i < 2; ++i) {
                    uint64x2_t row = vld1q_u64(at + 2 * i), bits = veorq_u64(row, asked);
                    if (ternary) {
                        uint64x2_t signs = vld1q_u64(at + words * CQ_BITS_TILE + 2 * i), used = vandq_u64(row, asked);
                        bits = vandq_u64(used, veorq_u64(signs, vdupq_n_u64(query[words + w])));
                        used_bytes[i] = vaddq_u8(used_bytes[i], neon_count(used));
                    }
                    unlike_bytes[i] = vaddq_u8(unlike_bytes[i], neon_count(bits));
                }
            }
            for (int i = 0; i < 2; ++i) {
                both[i] = neon_sum(both[i], used_bytes[i]);
                unlike[i] = neon_sum(unlike[i], unlike_bytes[i]);
            }
        }
        for (int i = 0; i < 2; ++i) {
            uint64x2_t value = vsubq_u64(both[i], vshlq_n_u64(unlike[i], 1));
            out[r + 2 * i] = (int16_t)vgetq_lane_u64(value, 0);
            out[r + 2 * i + 1] = (int16_t)vgetq_lane_u64(value, 1);
        }
    }
}
KERNELS(neon, )
#endif

static kernel kernel_of(int path, int ternary)
{
#if defined(__x86_64__)
    if ((path == CQ_AVX512 || path == CQ_AMX) && __builtin_cpu_supports("avx512vpopcntdq"))
        return ternary ? avx512_ternary : avx512_binary;
    if (path != CQ_SCALAR && __builtin_cpu_supports("avx2"))
        return ternary ? avx2_ternary : avx2_binary;
#endif
#if defined(__aarch64__)
    if (path != CQ_SCALAR)
        return ternary ? neon_ternary : neon_binary;
#endif
    (void)path;
    return ternary ? scalar_ternary : scalar_binary;
}

/* Rows to compare with queries, and what is wanted of them; cq_bits_scores and cq_bits_best say which. */
typedef struct {
    const uint64_t *tiles, *asked;
    int64_t rows, words, queries, tile_words, query_words;
    int features;
    kernel count;
    int16_t *scores;
    uint64_t *keys;
    int64_t kept, shares;
} job;

static int64_t tiles_of(const job *j)
{
    return (j->rows + CQ_BITS_TILE - 1) / CQ_BITS_TILE;
}

static int64_t rows_of(const job *j, int64_t tile)
{
    int64_t left = j->rows - tile * CQ_BITS_TILE;
    return left < CQ_BITS_TILE ? left : CQ_BITS_TILE;
}

static job job_of(int path, const uint64_t *tiles, int64_t rows, int64_t words, int features, int ternary,
                  const uint64_t *asked, int64_t queries)
{
    int64_t planes = ternary ? 2 : 1;
    return (job){.tiles = tiles,
                 .asked = asked,
                 .rows = rows,
                 .words = words,
                 .queries = queries,
                 .tile_words = planes * words * CQ_BITS_TILE,
                 .query_words = planes * words,
                 .features = features,
                 .count = kernel_of(path, ternary)};
}

/* Asks for a share of the next tile while `query` meets this one: memory and counting take about as long. */
static void prefetch(const job *j, int64_t tile, int64_t query)
{
    if (tile + 1 >= tiles_of(j))
        return;
    const uint64_t *next = j->tiles + (tile + 1) * j->tile_words;
    int64_t lines = j->tile_words / 8, end = lines * (query + TOGETHER) / j->queries;
    for (int64_t line = lines * query / j->queries; line < end && line < lines; ++line)
        __builtin_prefetch(next + 8 * line);
}

static void scores_task(void *context, int64_t index)
{
    const job *j = context;
    int64_t end = (index + 1) * TILES_A_TASK < tiles_of(j) ? (index + 1) * TILES_A_TASK : tiles_of(j);
    for (int64_t t = index * TILES_A_TASK; t < end; ++t) {
        int whole = rows_of(j, t) == CQ_BITS_TILE;
        for (int64_t q = 0; q < j->queries; q += TOGETHER) {
            int many = j->queries - q < TOGETHER ? 1 : TOGETHER;
            const uint64_t *query[TOGETHER];
            int16_t *out[TOGETHER], last[TOGETHER][CQ_BITS_TILE];
            for (int i = 0; i < many; ++i) {
                query[i] = j->asked + (q + i) * j->query_words;
                out[i] = whole ? j->scores + (q + i) * j->rows + t * CQ_BITS_TILE : last[i];
            }
            prefetch(j, t, q);
            j->count(j->tiles + t * j->tile_words, query, many, j->words, j->features, out);
            for (int i = 0; i < many && !whole; ++i)
                memcpy(j->scores + (q + i) * j->rows + t * CQ_BITS_TILE, last[i], (size_t)rows_of(j, t) * 2);
        }
    }
}

/* Dot products (queries, rows) of queries (queries, planes, words) with the rows of tiles. */
void cq_bits_scores(int path, const uint64_t *tiles, int64_t rows, int64_t words, int features, int ternary,
                    const uint64_t *asked, int64_t queries, int16_t *scores, int threads)
{
    job j = job_of(path, tiles, rows, words, features, ternary, asked, queries);
    j.scores = scores;
    cq_parallel(threads, (tiles_of(&j) + TILES_A_TASK - 1) / TILES_A_TASK, scores_task, &j);
}

/* A key is larger for a better row: the score above, the row below, counted from the end. 0 is none. */
#define ROW_BITS 48
#define ROW_MASK (((uint64_t)1 << ROW_BITS) - 1)

ALWAYS uint64_t key_of(int16_t score, int64_t row)
{
    return (uint64_t)(score + 32768) << ROW_BITS | (ROW_MASK - (uint64_t)row);
}

/* Puts `key` in the place of the smallest of a heap, which is its first. */
static void replace_least(uint64_t *heap, int64_t size, uint64_t key)
{
    int64_t at = 0;
    for (int64_t child; (child = 2 * at + 1) < size; at = child) {
        child += child + 1 < size && heap[child + 1] < heap[child];
        if (heap[child] >= key)
            break;
        heap[at] = heap[child];
    }
    heap[at] = key;
}

static int16_t most_of(const int16_t *scores, int64_t count)
{
    int16_t most = INT16_MIN;
    for (int64_t i = 0; i < count; ++i)
        most = scores[i] > most ? scores[i] : most;
    return most;
}

/* Takes up what is better than the worst of `heap`. Rows come in order: one with an equal score is not better. */
static void take(uint64_t *heap, int64_t size, const int16_t *scores, int64_t count, int64_t first)
{
    enum { AT_ONCE = 32 };
    if (key_of(most_of(scores, count), first) <= heap[0])
        return;
    for (int64_t from = 0; from < count; from += AT_ONCE) {
        int64_t end = from + AT_ONCE < count ? from + AT_ONCE : count;
        if (key_of(most_of(scores + from, end - from), first + from) <= heap[0])
            continue;
        for (int64_t i = from; i < end; ++i) {
            uint64_t key = key_of(scores[i], first + i);
            if (key > heap[0])
                replace_least(heap, size, key);
        }
    }
}

static void best_task(void *context, int64_t index)
{
    const job *j = context;
    uint64_t *heaps = j->keys + index * j->queries * j->kept;
    memset(heaps, 0, (size_t)(j->queries * j->kept) * sizeof *heaps);
    for (int64_t t = tiles_of(j) * index / j->shares; t < tiles_of(j) * (index + 1) / j->shares; ++t)
        for (int64_t q = 0; q < j->queries; q += TOGETHER) {
            int many = j->queries - q < TOGETHER ? 1 : TOGETHER;
            int16_t scores[TOGETHER][CQ_BITS_TILE];
            const uint64_t *first = j->asked + q * j->query_words;
            const uint64_t *query[TOGETHER] = {first, first + (many - 1) * j->query_words};
            int16_t *out[TOGETHER] = {scores[0], scores[1]};
            prefetch(j, t, q);
            j->count(j->tiles + t * j->tile_words, query, many, j->words, j->features, out);
            for (int i = 0; i < many; ++i)
                take(heaps + (q + i) * j->kept, j->kept, scores[i], rows_of(j, t), t * CQ_BITS_TILE);
        }
}

/* Keys (shares, queries, kept), in no order, of the best rows of each share of the tiles; every share is one task. */
void cq_bits_best(int path, const uint64_t *tiles, int64_t rows, int64_t words, int features, int ternary,
                  const uint64_t *asked, int64_t queries, uint64_t *keys, int64_t kept, int64_t shares, int threads)
{
    job j = job_of(path, tiles, rows, words, features, ternary, asked, queries);
    j.keys = keys;
    j.kept = kept;
    j.shares = shares;
    cq_parallel(threads, shares, best_task, &j);
}
