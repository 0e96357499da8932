// Activations to int8 codes with a scale a row, as weight.quantize_activation finds them, for product8.
//
//     x_hat = scale * code,   code = clamp(round((x - offset) / scale)) - zero,   offset = -zero * scale
//
// Formats with an offset have their zero on a level, so that it is taken off the code: what is left fits 8 bits. A block
// makes one row. Codes go where product8 reads them: 2 kp + i / 2 + 4 (i % 2) of each eight is byte i of word kp.
//
// Constants: TYPE of x (0 bfloat16, 1 float16, 2 float32); AFFINE: whether the format has an offset.
#include "numbers.cuh"

struct Quantization {
    const void* x;   // (M, columns)
    u8* codes;       // (M, padded), zero beyond columns
    float* scale;    // (M)
    int columns, padded;
    float first_level, last_level;
};

DEVICE float larger(float a, float b) { return b > a || b != b ? b : a; }  // NaN wins

// The largest value of all threads of the block, for all of them.
DEVICE float block_max(float value, float* of_warp) {
#pragma unroll
    for (int mask = 16; mask; mask /= 2) value = larger(value, warp_shuffle_xor(value, mask));
    sync_block();
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
    sync_block();
    for (int w = 0; w < 8; w++) value = larger(value, of_warp[w]);
    return value;
}

extern "C" __global__ void __launch_bounds__(256) rows(const Quantization p) {
    __shared__ float of_warp[8];
    let_next_begin();
    wait_for_inputs();
    const size_t row = blockIdx.x;
    float high = 0, low = 0;  // of x and of -x; with AFFINE both count, without the larger one does
    for (int k = threadIdx.x; k < p.columns; k += 256) {
        float x = read_number(p.x, row * p.columns + k);
        high = larger(high, x);
        low = larger(low, -x);
    }
    high = block_max(high, of_warp);
    low = block_max(low, of_warp);
    float range = AFFINE ? divide(add(high, low), p.last_level - p.first_level) : divide(larger(high, low), p.last_level);
    const float scale = range > 0 || range != range ? range : 1.0f;
    const float zero = AFFINE ? round_even(add(p.first_level, divide(low, scale))) : 0.0f;
    const float offset = multiply(-zero, scale);
    for (int k = threadIdx.x; k < p.padded; k += 256) {
        int code = 0;
        if (k < p.columns) {
            float x = read_number(p.x, row * p.columns + k);
            float level = round_even(divide(AFFINE ? add(x, -offset) : x, scale));
            level = level < p.first_level ? p.first_level : level > p.last_level ? p.last_level : level;
            code = round_to_int(level - zero);
        }
        int inside = k % 8, word = inside / 2 % 2, byte = inside % 2 * 2 + inside / 4;
        write(p.codes + row * p.padded + k - inside + 4 * word + byte, (u8)code);
    }
    if (threadIdx.x == 0) write(p.scale + row, scale);
}
