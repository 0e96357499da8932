// w_hat from tiles, rows side by side again, for a product of very many tokens: rounded as weight.cu rounds it. A warp
// makes a chunk of a tile of 16 rows; a lane has eight columns of two rows in each step of 32.
#include "product.cuh"

// Code of column c of a lane's eight in step s, of row r + 8 rh: see product.cuh.
DEVICE u32 code_of(const uint4& word, int c, int s, int rh) {
    return word_of(word, (c & 2) + rh) >> (8 * (c / 4 + 2 * (c & 1)) + BITS * s) & MASK;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) untile(const Product p) {
    let_next_begin();
    const int lane = threadIdx.x, chunk = blockIdx.y * WARPS + threadIdx.y;
    if (chunk >= p.chunks) return;
    Cursor cursor = start(p, blockIdx.x, chunk, lane);
    Codes codes;
    read_codes<1>(codes, cursor, true);
    Pairs pairs;
    wait_for_inputs();
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        if (step % FLUSH == 0) pairs = read_pairs(p, cursor, 0, group_of(chunk, step / FLUSH));
        const int k = chunk * CHUNK + 32 * step + 8 * (lane & 3);
        if (k >= p.columns) continue;
#pragma unroll
        for (int rh = 0; rh < 2; rh++) {
            const int n = (int)blockIdx.x * 16 + (lane >> 2) + 8 * rh;
            if (n >= p.rows) continue;
            float value[8];
#pragma unroll
            for (int c = 0; c < 8; c++) {
                float level = p.level_step * (float)code_of(codes.word[0][step / FIELDS], c, step % FIELDS, rh) + p.level_zero;
                value[c] = add(multiply(level, pairs.scale[rh]), pairs.offset[rh]);
            }
            write_eight(p.out, (size_t)n * p.columns + k, value);
        }
    }
}
