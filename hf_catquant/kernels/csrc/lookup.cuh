// w_hat of codes of one or two bits by looking it up: a group of a row has four values at most, of 16 bits, rounded as
// weight.cu rounds them. A byte permutation looks up four codes at once.
#pragma once
#include "product.cuh"

// What codes become in a group of a row: the lower and the upper bytes of the numbers of code 0, 1, 2 and 3.
struct Table { u32 low, high; };

DEVICE Table table_of(const Product& p, float scale, float offset) {
    u32 number[4] = {};
#pragma unroll
    for (int code = 0; code < 1 << BITS && code < 4; code++) {
        const float value = add(multiply(p.level_step * (float)code + p.level_zero, scale), offset);
        number[code] = TYPE == 1 ? float_to_f16(value) : float_to_bf16(value);
    }
    const u32 first = number[0] | number[1] << 16, second = number[2] | number[3] << 16;
    return {byte_permute(first, second, 0x6420), byte_permute(first, second, 0x7531)};
}

// Two columns of a step whose codes are in nibbles 0 and 2 of `codes`, and of the step four bits on, from nibbles 1 and 3.
DEVICE u32 look_up(const Table& table, u32 codes) {
    return byte_permute(byte_permute(table.low, 0, codes), byte_permute(table.high, 0, codes), 0x6240);
}
DEVICE u32 look_up_next(const Table& table, u32 codes) {
    return byte_permute(byte_permute(table.low, 0, codes), byte_permute(table.high, 0, codes), 0x7351);
}
