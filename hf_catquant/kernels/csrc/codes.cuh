// Codes of a tile's word as numbers that the tensor cores multiply.
//
// A code becomes a 16-bit float without a conversion: or-ed into the mantissa of 128 (bfloat16) or 1024 (float16) at bit
// j it is 128 + code * 2^j, and one fused multiply-add makes it the code itself, exactly.
#pragma once
#include "product.cuh"

constexpr bool HALF = TYPE == 1;
constexpr u32 ONES = HALF ? 0x3c003c00u : 0x3f803f80u;

DEVICE void mma(float (&d)[4], uint4 a, u32 b0, u32 b1, const float (&c)[4]) {
    if (HALF) mma_f16(d, a, b0, b1, c);
    else mma_bf16(d, a, b0, b1, c);
}
DEVICE void mma(float (&c)[4], uint4 a, u32 b0, u32 b1) { mma(c, a, b0, b1, c); }
DEVICE void mma(int (&d)[4], uint4 a, u32 b0, u32 b1, const int (&c)[4]) {
    if (BITS == 8) mma_s8s8(d, a, b0, b1, c);
    else mma_u8s8(d, a, b0, b1, c);
}

DEVICE u32 both(u32 bits) { return bits << 16 | bits; }

// Codes at bits BITS * field of both halves of a word, as two floats. 8-bit codes have 128 taken off: that is their level.
// magic is the exponent of both halves.
DEVICE u32 two_codes(u32 word, int field, u32 magic) {
    constexpr int MANTISSA = HALF ? 10 : 7, WINDOW = BITS > MANTISSA ? BITS : MANTISSA / BITS * BITS;
    if (BITS == 8 && !HALF) {
        float low = bits_to_float(byte_permute(word, 0x4b000000u, 0x7540 + field)) - 8388736.0f;  // 2^23 + 128
        float high = bits_to_float(byte_permute(word, 0x4b000000u, 0x7542 + field)) - 8388736.0f;
        return pack_bf16(low, high);
    }
    int shift = BITS * field / WINDOW * WINDOW, j = BITS * field - shift;
    u32 exponent_one = HALF ? (15 - j) << 10 : (127 - j) << 7;              // 2^-j
    u32 exponent_base = HALF ? 0x8000u + ((25 - j) << 10) : 0x8000u + ((134 - j) << 7);  // -2^(10 - j) or -2^(7 - j)
    if (BITS == 8) exponent_base = 0xe480u;                                // -1152 = -(1024 + 128)
    u32 raised = (word >> shift & both(MASK << j)) | magic;
    return HALF ? fma_f16(raised, both(exponent_one), both(exponent_base))
                : fma_bf16(raised, both(exponent_one), both(exponent_base));
}

// Codes at bits BITS * field of the bytes of a word, as four integers. 8-bit codes have 128 taken off.
DEVICE u32 four_codes(u32 word, int field) {
    if (BITS == 8) return word ^ 0x80808080u;  // code - 128, signed
    return word >> BITS * field & MASK * 0x01010101u;
}
