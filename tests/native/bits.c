/* Packed dot products without Python: every path against bit after bit, and the best rows against sorting. Run under
 * sanitizers and under an emulator by `make test-native`, as products.c is.
 */
#include "catquant.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TILE = 256, QUERIES = 3, BEST = 5 };

void cq_bits_scores(int path, const uint64_t *tiles, int64_t rows, int64_t words, int features, int ternary,
                    const uint64_t *asked, int64_t queries, int16_t *scores, int threads);
void cq_bits_best(int path, const uint64_t *tiles, int64_t rows, int64_t words, int features, int ternary,
                  const uint64_t *asked, int64_t queries, uint64_t *keys, int64_t kept, int64_t shares, int threads);

static uint64_t state = 1;

static uint64_t draw(void)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return state >> 33 ^ state << 31;
}

/* Bit k of a word array; plane p starts at p * words. */
static int bit(const uint64_t *at, int64_t step, int64_t k)
{
    return at[k / 64 * step] >> k % 64 & 1;
}

static int expected(const uint64_t *row, const uint64_t *query, int64_t words, int features, int ternary)
{
    int sum = 0;
    for (int64_t k = 0; k < features; ++k) {
        int x = bit(row, TILE, k), y = bit(query, 1, k);
        if (!ternary)
            sum += x == y ? 1 : -1;
        else if (x && y)
            sum += bit(row + words * TILE, TILE, k) == bit(query + words, 1, k) ? 1 : -1;
    }
    return sum;
}

static int check(int path, int64_t rows, int features, int ternary)
{
    int64_t words = (features + 63) / 64, planes = ternary ? 2 : 1, tiles = (rows + TILE - 1) / TILE;
    size_t size = (size_t)(tiles * planes * words * TILE);
    uint64_t *memory = calloc(size, 8), *asked = calloc((size_t)(QUERIES * planes * words), 8);
    int16_t *scores = malloc((size_t)(QUERIES * rows) * 2);
    uint64_t *keys = malloc(2 * QUERIES * BEST * 8);
    int wrong = 0;
    if (memory == NULL || asked == NULL || scores == NULL || keys == NULL)
        exit(2);
    for (int64_t k = 0; k < planes * features; ++k) {
        int64_t plane = k / features, column = k % features, word = plane * words + column / 64;
        for (int64_t r = 0; r < rows; ++r)
            memory[(r / TILE * planes * words + word) * TILE + r % TILE] |= (draw() & 1) << column % 64;
        for (int64_t q = 0; q < QUERIES; ++q)
            asked[q * planes * words + word] |= (draw() & 1) << column % 64;
    }
    cq_bits_scores(path, memory, rows, words, features, ternary, asked, QUERIES, scores, 2);
    cq_bits_best(path, memory, rows, words, features, ternary, asked, QUERIES, keys, BEST, 2, 2);
    for (int64_t q = 0; q < QUERIES; ++q) {
        int most = -(1 << 15);
        for (int64_t r = 0; r < rows; ++r) {
            const uint64_t *row = memory + r / TILE * planes * words * TILE + r % TILE;
            int value = expected(row, asked + q * planes * words, words, features, ternary);
            wrong += scores[q * rows + r] != value;
            most = value > most ? value : most;
        }
        uint64_t best = 0;
        for (int share = 0; share < 2; ++share)
            for (int i = 0; i < BEST; ++i) {
                uint64_t key = keys[(share * QUERIES + q) * BEST + i];
                best = key > best ? key : best;
            }
        wrong += (int)(best >> 48) - 32768 != most;
    }
    free(memory), free(asked), free(scores), free(keys);
    if (wrong)
        printf("path %d, %d rows, %d features, ternary %d: %d wrong\n", path, (int)rows, features, ternary, wrong);
    return wrong;
}

int main(void)
{
    static const int64_t rows[] = {1, 31, 256, 600};
    static const int features[] = {1, 64, 65, 384, 2100};
    int wrong = 0, paths = 0;
    for (int path = 0; path < CQ_PATHS; ++path) {
        ++paths; /* what the processor does not have runs on what it has */
        for (size_t r = 0; r < sizeof rows / sizeof *rows; ++r)
            for (size_t f = 0; f < sizeof features / sizeof *features; ++f)
                wrong += check(path, rows[r], features[f], 0) + check(path, rows[r], features[f], 1);
    }
    printf("bits: %d paths, %d wrong\n", paths, wrong);
    return wrong != 0;
}
