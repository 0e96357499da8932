/* Packed bytes to codes: the inverse of pack() in hf_catquant/packing.py. */
#include "catquant.h"

#include <pthread.h>
#include <string.h>

const cq_format cq_formats[CQ_FORMATS] = {
    [CQ_BINARY] = {2, 8, 1, 32, 1, 2, 1}, [CQ_TERNARY] = {3, 5, 1, 16, 1, 1, 1}, [CQ_INT2] = {4, 4, 1, 16, 1, 1, 2},
    [CQ_INT3] = {8, 8, 3, 32, 3, 1, 4},   [CQ_INT4] = {16, 2, 1, 8, 1, 1, 8},    [CQ_INT8] = {256, 1, 1, 4, 1, 1, 128},
};

/* The codes of every value of a byte, first code in the lowest byte. */
static uint64_t tables[CQ_INT8][256];
static pthread_once_t tables_once = PTHREAD_ONCE_INIT;

static void fill_tables(void)
{
    for (int f = 0; f < CQ_INT8; ++f) {
        if (cq_formats[f].nbytes != 1)
            continue;
        for (int byte = 0; byte < 256; ++byte) {
            int rest = byte;
            for (int d = 0; d < cq_formats[f].digits; ++d, rest /= cq_formats[f].radix)
                tables[f][byte] |= (uint64_t)(rest % cq_formats[f].radix) << (8 * d);
        }
    }
}

static void decode_bytes(const uint64_t *table, int digits, const uint8_t *packed, int64_t count, uint8_t *codes)
{
    int64_t k = 0;
    for (; k + 8 <= count; k += digits, ++packed) /* what is too much is written again */
        memcpy(codes + k, &table[*packed], 8);    /* little-endian, as every path here */
    for (; k < count; k += digits, ++packed)
        memcpy(codes + k, &table[*packed], (size_t)(count - k < digits ? count - k : digits));
}

/* Codes of `bits` bits, in loops that compilers vectorize. */
static inline void decode_bits(const int bits, const uint8_t *restrict packed, int64_t count, uint8_t *restrict codes)
{
    const int digits = 8 / bits;
    int64_t bytes = count / digits;
    for (int64_t i = 0; i < bytes; ++i)
        for (int d = 0; d < digits; ++d)
            codes[i * digits + d] = (uint8_t)(packed[i] >> (d * bits) & ((1 << bits) - 1));
    for (int64_t k = bytes * digits; k < count; ++k)
        codes[k] = (uint8_t)(packed[bytes] >> (k % digits * bits) & ((1 << bits) - 1));
}

static void decode_int3(const uint8_t *packed, int64_t count, uint8_t *codes)
{
    for (int64_t k = 0; k < count; k += 8, packed += 3) {
        uint64_t eight = packed[0] | (uint64_t)packed[1] << 8 | (uint64_t)packed[2] << 16;
        eight = (eight | eight << 20) & 0x00000fff00000fff; /* four codes each, then two, then one */
        eight = (eight | eight << 10) & 0x003f003f003f003f;
        eight = (eight | eight << 5) & 0x0707070707070707;
        if (count - k >= 8)
            memcpy(codes + k, &eight, 8); /* little-endian, as every path here */
        else
            memcpy(codes + k, &eight, (size_t)(count - k));
    }
}

void cq_decode_row(int format, const uint8_t *packed, int64_t columns, int64_t group_width, uint8_t *codes)
{
    const cq_format *f = &cq_formats[format];
    int64_t group_bytes = (group_width + f->digits - 1) / f->digits * f->nbytes;
    pthread_once(&tables_once, fill_tables);
    for (int64_t k = 0; k < columns; k += group_width, packed += group_bytes) {
        int64_t count = columns - k < group_width ? columns - k : group_width;
        switch (format) {
        case CQ_INT8: memcpy(codes + k, packed, (size_t)count); break;
        case CQ_INT3: decode_int3(packed, count, codes + k); break;
        case CQ_BINARY: decode_bytes(tables[format], 8, packed, count, codes + k); break;
        case CQ_TERNARY: decode_bytes(tables[format], 5, packed, count, codes + k); break;
        case CQ_INT2: decode_bits(2, packed, count, codes + k); break;
        case CQ_INT4: decode_bits(4, packed, count, codes + k); break;
        }
    }
}
