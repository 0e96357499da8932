/* What the products by AVX-512 share. */
#ifndef CATQUANT_AVX512_H
#define CATQUANT_AVX512_H

#include "catquant.h"

#include <immintrin.h>

/* A kernel for every shape of a product is compiled from one body, so that its sums stay in registers. */
#define ALWAYS static inline __attribute__((always_inline))

/* The scales of 16 rows, or where `second` is 1 their offsets. */
ALWAYS __m512 lanes(const uint8_t *at, int wide, int second)
{
    if (wide)
        return _mm512_loadu_ps((const float *)at + 16 * second);
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at + second));
}

#endif
