// w_hat = scale * level + offset, from the stored bytes, in any order of rows: dequantization and embedding.
//
// A thread makes 8 columns, which never cross a group (groups are multiples of 8). Rounded as the reference rounds:
// the product, then the sum, in float32, then once to the type of out.
//
// Constants: RADIX, DIGITS, NBYTES of the storage word; SCALE32; TYPE of out (0 bfloat16, 1 float16, 2 float32);
// INDEX 0: row i is row i, 32 or 64: row i is row index[i], int32 or int64.
#include "numbers.cuh"

struct Rows {
    const u8* packed;     // (table_rows, width)
    const void* scale;    // (table_rows, groups)
    const void* offset;   // the same, or null
    const void* index;    // (rows), or null
    void* out;            // (rows, columns)
    int rows, columns, table_rows, width, group_width, group_bytes, groups;
    float level_step, level_zero;
};

DEVICE float read_scale(const void* from, size_t at) {
    return SCALE32 ? read((const float*)from + at) : f16_to_float(read((const u16*)from + at));
}

DEVICE u32 read_word(const u8* at) {
    u32 word = read(at);
    if (NBYTES > 1) word |= (u32)read(at + 1) << 8 | (u32)read(at + 2) << 16;
    return word;
}

extern "C" __global__ void __launch_bounds__(256) weight(const Rows p) {
    let_next_begin();
    wait_for_inputs();
    const u32 blocks = (p.columns + 7) / 8, id = blockIdx.x * 256u + threadIdx.x, i = id / blocks;  // less than 2^32 of them
    if (i >= (u32)p.rows) return;
    const int k = (int)(id % blocks) * 8, group = k / p.group_width, inside = k - group * p.group_width;
    long long row = INDEX == 0 ? (long long)i : INDEX == 32 ? read((const int*)p.index + i) : read((const long long*)p.index + i);
    if (row < 0 || row >= p.table_rows) refuse();
    const u8* at = p.packed + row * p.width + (size_t)group * p.group_bytes + inside / DIGITS * NBYTES;
    const float scale = read_scale(p.scale, row * p.groups + group);
    const float offset = p.offset ? read_scale(p.offset, row * p.groups + group) : 0.0f;
    const int count = p.columns - k < 8 ? p.columns - k : 8;
    int digit = inside % DIGITS;
    u32 word = read_word(at);
    for (int d = 0; d < digit; d++) word /= RADIX;
    float value[8];
#pragma unroll
    for (int c = 0; c < 8; c++) {
        if (c < count && digit == DIGITS) {
            at += NBYTES;
            word = read_word(at);
            digit = 0;
        }
        float level = p.level_step * (float)(word % RADIX) + p.level_zero;
        value[c] = multiply(level, scale);
        if (p.offset) value[c] = add(value[c], offset);
        word /= RADIX;
        digit++;
    }
    if (p.columns % 8 == 0) return write_eight(p.out, (size_t)i * p.columns + k, value);
    for (int c = 0; c < count; c++) write_number(p.out, (size_t)i * p.columns + k + c, value[c]);
}
