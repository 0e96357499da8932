// x as wgemm.cu takes it: each step of 32 columns in the order of the tensor cores' fragments, zeros behind the last
// column, and the sum of x over each 128 columns. With INTEGER x becomes int8 codes with a scale a row, as rows.cu
// makes them.
//
// A step is four runs of eight columns. As words of two 16-bit numbers it is a 4 x 4 matrix, which is transposed; as bytes,
// run q becomes words q and 4 + q, in whose bytes are its columns 0 4 1 5 and 2 6 3 7. Both are what a lane has of a weight
// (product.cuh). A block makes one row.
//
// What a block of wgemm reads at once, 128 columns of TOKENS rows, follows each other as it lies in shared memory: 128 bytes
// a row, in SWIZZLED order (wgmma.cuh).
//
// Constants: TYPE of x (0 bfloat16, 1 float16, 2 float32); INTEGER; AFFINE: whether the format of the codes has an offset;
// TOKENS.
#include "quantize.cuh"

struct Arrangement {
    const void* x;   // (M, columns)
    uint4* out;      // (M / TOKENS, padded / 128, slabs, TOKENS, 128 bytes)
    float* sums;     // (padded / 128, M rounded up to 128)
    float* scale;    // (M), with INTEGER
    int columns, padded, width;  // width: M rounded up to 128
    float first_level, last_level;
};

struct Run { float v[8]; };

DEVICE Run read_run(const Arrangement& p, size_t row, int k) {
    Run run = {};
    if (k + 8 <= p.columns && p.columns % 8 == 0) {
        read_eight(run.v, p.x, row * p.columns + k);
        return run;
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (k + i < p.columns) run.v[i] = read_number(p.x, row * p.columns + k + i);
    return run;
}

DEVICE u32 pack(float low, float high) {
    return TYPE == 1 ? float_to_f16(low) | float_to_f16(high) << 16 : float_to_bf16(low) | float_to_bf16(high) << 16;
}

// Writes step `step` of the row; returns its sum.
DEVICE float arrange_step(const Arrangement& p, size_t row, int step, const Scale& scale) {
    constexpr int SLABS = INTEGER ? 1 : 2, PIECES = INTEGER ? 2 : 4;  // of 16 bytes, a step
    const int token = (int)(row % TOKENS), first = step % (4 / SLABS) * PIECES;
    const size_t slab = (row / TOKENS * (size_t)(p.padded / 128) + (u32)(step / 4)) * SLABS + step % 4 / (4 / SLABS);
    uint4* out = p.out + slab * (8 * TOKENS) + 8 * token;
    float sum = 0;
    u32 word[4][4];
#pragma unroll
    for (int q = 0; q < 4; q++) {
        const int k = 32 * step + 8 * q;
        Run run = read_run(p, row, k);
        if (INTEGER) {
            u32 both[2] = {0, 0};
#pragma unroll
            for (int i = 0; i < 8; i++) {
                int code = k + i < p.columns ? code_of(run.v[i], scale, p.first_level, p.last_level) : 0;
                sum += (float)code;
                both[i / 2 % 2] |= ((u32)code & 255) << 8 * (i % 2 * 2 + i / 4);
            }
            word[0][q] = both[0], word[1][q] = both[1];
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++) sum += run.v[i];
#pragma unroll
            for (int c = 0; c < 4; c++) word[c][q] = pack(run.v[2 * c], run.v[2 * c + 1]);
        }
    }
#pragma unroll
    for (int c = 0; c < PIECES; c++) write(out + (first + c ^ token & 7), uint4{word[c][0], word[c][1], word[c][2], word[c][3]});
    return sum;
}

extern "C" __global__ void __launch_bounds__(256) arrange(const Arrangement p) {
    __shared__ float of_warp[8];
    let_next_begin();
    wait_for_inputs();
    const size_t row = blockIdx.x;
    const int steps = p.padded / 32;
    Scale scale = {};
    if (INTEGER) {
        float high = 0, low = 0;
        for (int k = 8 * threadIdx.x; k < p.columns; k += 8 * 256) {
            Run run = read_run(p, row, k);
#pragma unroll
            for (int i = 0; i < 8; i++) high = larger(high, run.v[i]), low = larger(low, -run.v[i]);
        }
        high = block_max(high, of_warp);
        scale = scale_of(high, block_max(low, of_warp), p.first_level, p.last_level);
        if (threadIdx.x == 0) write(p.scale + row, scale.step);
    }
    for (int first = 0; first < steps; first += 256) {  // all threads of a warp, for the sums
        const int step = first + threadIdx.x;
        float sum = step < steps ? arrange_step(p, row, step, scale) : 0.0f;
        sum += warp_shuffle_xor(sum, 1);
        sum += warp_shuffle_xor(sum, 2);
        if (step < steps && step % 4 == 0) write(p.sums + (size_t)(step / 4) * p.width + row, sum);
    }
}
