// Numbers of TYPE in memory: 0 bfloat16, 1 float16, 2 float32.
#pragma once
#include "primitives.cuh"

DEVICE float read_number(const void* from, size_t at) {
    if (TYPE == 2) return read((const float*)from + at);
    u32 bits = read((const u16*)from + at);
    return TYPE == 1 ? f16_to_float(bits) : bits_to_float(bits << 16);
}

DEVICE void write_number(void* to, size_t at, float value) {
    if (TYPE == 2) write((float*)to + at, value);
    else write((u16*)to + at, (u16)(TYPE == 1 ? float_to_f16(value) : float_to_bf16(value)));
}

// Eight numbers that follow each other; `at` is a multiple of 8 from the start of a tensor, which lies on 16 bytes.
DEVICE void read_eight(float (&v)[8], const void* from, size_t at) {
    if (TYPE == 2) {
        float4 a = read((const float4*)((const float*)from + at)), b = read((const float4*)((const float*)from + at + 4));
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
        return;
    }
    uint4 word = read((const uint4*)((const u16*)from + at));
    u32 pair[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
    for (int i = 0; i < 8; i++) {
        u32 bits = pair[i / 2] >> i % 2 * 16 & 0xffff;
        v[i] = TYPE == 1 ? f16_to_float(bits) : bits_to_float(bits << 16);
    }
}

DEVICE void write_eight(void* to, size_t at, const float (&v)[8]) {
    if (TYPE == 2) {
        write((float4*)((float*)to + at), float4{v[0], v[1], v[2], v[3]});
        write((float4*)((float*)to + at + 4), float4{v[4], v[5], v[6], v[7]});
        return;
    }
    u32 pair[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 low = TYPE == 1 ? float_to_f16(v[2 * i]) : float_to_bf16(v[2 * i]);
        u32 high = TYPE == 1 ? float_to_f16(v[2 * i + 1]) : float_to_bf16(v[2 * i + 1]);
        pair[i] = low | high << 16;
    }
    write((uint4*)((u16*)to + at), uint4{pair[0], pair[1], pair[2], pair[3]});
}
