// The range of activations of a row and their codes, as weight.quantize_activation finds them; NaN makes a whole row NaN.
//
//     x_hat = scale * code,   code = clamp(round((x - offset) / scale)) - zero,   offset = -zero * scale
//
// Formats with an offset have their zero on a level, so that it is taken off the code: what is left fits 8 bits.
//
// Constants: those of numbers.cuh; AFFINE: whether the format has an offset.
#pragma once
#include "numbers.cuh"

struct Scale { float step, inverse, zero, offset; };

DEVICE float larger(float a, float b) { return b > a || b != b ? b : a; }  // NaN wins

// The largest value of all 256 threads of the block, for all of them.
DEVICE float block_max(float value, float* of_warp) {
#pragma unroll
    for (int mask = 16; mask; mask /= 2) value = larger(value, warp_shuffle_xor(value, mask));
    sync_block();
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
    sync_block();
    for (int w = 0; w < 8; w++) value = larger(value, of_warp[w]);
    return value;
}

// Of the largest values of x and of -x, at least 0: with AFFINE both count, without the larger one does.
DEVICE Scale scale_of(float high, float low, float first_level, float last_level) {
    float range = AFFINE ? divide(add(high, low), last_level - first_level) : divide(larger(high, low), last_level);
    Scale scale = {range > 0 || range != range ? range : 1.0f, 0, 0, 0};
    scale.inverse = divide(1.0f, scale.step);
    if (AFFINE) scale.zero = round_even(add(first_level, divide(low, scale.step)));
    scale.offset = multiply(-scale.zero, scale.step);
    return scale;
}

// Dividing exactly costs far more than multiplying, which errs by less than 1e-4 and so tells all levels apart but those of
// values near the middle of two.
DEVICE int code_of(float x, const Scale& scale, float first_level, float last_level) {
    const float shifted = AFFINE ? add(x, -scale.offset) : x, near = multiply(shifted, scale.inverse);
    float level = round_even(near);
    const float apart = near - level;
    if (!(apart * apart < 0.2499f)) level = round_even(divide(shifted, scale.step));  // NaN as well
    level = level < first_level ? first_level : level > last_level ? last_level : level;
    return round_to_int(level - scale.zero);
}
