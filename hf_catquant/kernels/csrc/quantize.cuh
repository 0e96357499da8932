// The range of activations of a row and their codes, as weight.quantize_activation finds them; NaN makes a whole row NaN.
//
//     x_hat = scale * code,   code = clamp(round((x - offset) / scale)) - zero,   offset = -zero * scale
//
// Formats with an offset have their zero on a level, so that it is taken off the code: what is left fits 8 bits.
//
// Constants: those of numbers.cuh; AFFINE: whether the format has an offset; THREADS of a block, which takes a row; HOLDS: runs
// of eight values that a thread keeps from the first reading to the second, 0 for none.
#pragma once
#include "numbers.cuh"

struct Scale { float step, inverse, zero, offset; };

// What values span. With AFFINE the largest of x and of -x, at least 0; else the bits of the largest size, which are in the
// order of the sizes, NaN above all.
struct Range { float high, low; u32 most; };

DEVICE float larger(float a, float b) { return b > a || b != b ? b : a; }  // NaN wins

DEVICE void widen(Range& range, float x) {
    if (AFFINE) {
        range.high = larger(range.high, x), range.low = larger(range.low, -x);
        return;
    }
    const u32 size = float_to_bits(x) & 0x7fffffffu;
    range.most = range.most > size ? range.most : size;
}

DEVICE void widen(Range& range, const Range& other) {
    range.high = larger(range.high, other.high), range.low = larger(range.low, other.low);
    range.most = range.most > other.most ? range.most : other.most;
}

// Of all threads of the block, for all of them.
DEVICE Range range_of_block(Range range, Range* of_warp) {
    if (AFFINE)
#pragma unroll
        for (int mask = 16; mask; mask /= 2) {
            range.high = larger(range.high, warp_shuffle_xor(range.high, mask));
            range.low = larger(range.low, warp_shuffle_xor(range.low, mask));
        }
    else range.most = warp_max(range.most);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = range;
    sync_block();
#pragma unroll
    for (int w = 0; w < THREADS / 32; w++) widen(range, of_warp[w]);
    return range;
}

DEVICE Scale scale_of(const Range& range, float first_level, float last_level) {
    float step = AFFINE ? divide(add(range.high, range.low), last_level - first_level) : divide(bits_to_float(range.most), last_level);
    Scale scale = {step > 0 || step != step ? step : 1.0f, 0, 0, 0};
    scale.inverse = divide(1.0f, scale.step);
    if (AFFINE) scale.zero = round_even(add(first_level, divide(range.low, scale.step)));
    scale.offset = multiply(-scale.zero, scale.step);
    return scale;
}

constexpr float ROUNDER = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to a whole number, ties to even

// Dividing exactly costs far more than multiplying, which errs by less than 1e-4 and so tells all levels apart but those of
// values near the middle of two. No value without an offset is beyond the last level, of which the scale was made.
DEVICE float code_of(float x, const Scale& scale, float first_level, float last_level) {
    const float shifted = AFFINE ? add(x, -scale.offset) : x, near = multiply(shifted, scale.inverse);
    float level = add(add(near, ROUNDER), -ROUNDER);
    const float apart = near - level;
    const bool sure = apart * apart < 0.2499f;
    if (!sure) level = round_even(divide(shifted, scale.step));  // NaN as well
    if (AFFINE || !sure) level = level < first_level ? first_level : level > last_level ? last_level : level;
    return AFFINE ? level - scale.zero : level;
}

// Of a whole number from -128 to 255.
DEVICE u32 low_byte_of(float number) { return float_to_bits(number + ROUNDER); }

struct Run { float v[8]; };

// Zeros where the row has ended.
DEVICE Run read_run(const void* x, size_t row, int columns, int run) {
    const int k = 8 * run;
    Run made = {};
    if (k + 8 <= columns && columns % 8 == 0) {
        read_eight(made.v, x, row * columns + k);
        return made;
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (k + i < columns) made.v[i] = read_number(x, row * columns + k + i);
    return made;
}

DEVICE void widen(Range& range, const Run& x) {
#pragma unroll
    for (int i = 0; i < 8; i++) widen(range, x.v[i]);
}

// The codes of a run, `left` of them and zeros: column 2 kp + i / 2 + 4 (i % 2) is byte i of word kp. Returns their sum.
DEVICE float codes_of(u32 (&word)[2], const Run& x, int left, const Scale& scale, float first_level, float last_level) {
    u32 code[8];
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float level = i < left ? code_of(x.v[i], scale, first_level, last_level) : 0.0f;
        sum += level;
        code[i] = low_byte_of(level);
    }
#pragma unroll
    for (int kp = 0; kp < 2; kp++) {
        const u32 even = byte_permute(code[2 * kp], code[2 * kp + 4], 0x0040);
        word[kp] = byte_permute(even, byte_permute(code[2 * kp + 1], code[2 * kp + 5], 0x0040), 0x5410);
    }
    return sum;
}

// What a block makes of a row: put(run, words, sum) of `runs` runs, and of more, so that warps stay together. Writes scale[row].
template <typename Put>
DEVICE void quantize_row(const void* x, float* scales, int columns, int runs, float first_level, float last_level, Put put) {
    __shared__ Range of_warp[THREADS / 32];
    constexpr int HELD = HOLDS > 0 ? HOLDS : 1;
    const size_t row = blockIdx.x;
    Range range = {};
    Run held[HELD];
    for (int turn = 0; turn < (HOLDS ? 1 : (runs + THREADS - 1) / THREADS); turn++)
#pragma unroll
        for (int i = 0; i < HELD; i++) held[i] = read_run(x, row, columns, (turn + i) * THREADS + threadIdx.x), widen(range, held[i]);
    const Scale scale = scale_of(range_of_block(range, of_warp), first_level, last_level);
    if (threadIdx.x == 0) write(scales + row, scale.step);
    for (int turn = 0; turn < (HOLDS ? 1 : (runs + THREADS - 1) / THREADS); turn++)
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            const int run = (turn + i) * THREADS + threadIdx.x;
            if (!HOLDS) held[0] = read_run(x, row, columns, run);
            u32 word[2];
            const float sum = codes_of(word, held[i], columns - 8 * run, scale, first_level, last_level);
            put(run, word, sum);
        }
}
