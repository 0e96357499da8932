// x as wgemm.cu takes it: each step of 32 columns in the order of the tensor cores' fragments, zeros behind the last
// column, and the sum of x over each 128 columns. With INTEGER x becomes int8 codes with a scale a row, as rows.cu makes them.
//
// A step is four runs of eight columns. As words of two 16-bit numbers it is a 4 x 4 matrix, which is transposed; as bytes,
// run q becomes words q and 4 + q, in whose bytes are its columns 0 4 1 5 and 2 6 3 7. Both are what a lane has of a weight
// (product.cuh). What a block of wgemm reads at once, 128 columns of TOKENS rows, follows each other as it lies in shared
// memory: 128 bytes a row, in the order of swizzled() (wgmma.cuh).
//
// A thread makes a run, 16 of them a sum; a block 2048 columns of a row, or with INTEGER, where a row has one scale, all of it.
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

constexpr int SLABS = INTEGER ? 1 : 2, RUNS = 16 / SLABS;  // of a slab

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
    return TYPE == 1 ? float_to_f16(low) | float_to_f16(high) << 16 : pack_bf16(low, high);
}

// Writes run `run` of the row; returns its sum.
DEVICE float arrange_run(const Arrangement& p, size_t row, int run, const Scale& scale) {
    const int token = (int)(row % TOKENS), q = run % 4, step = run / 4;
    const size_t slab = (row / TOKENS * (size_t)(p.padded / 128) + (u32)(run / 16)) * SLABS + run % 16 / RUNS;
    u32* out = (u32*)(p.out + (slab * TOKENS + token) * 8) + q;
    const int first = step % (RUNS / 4) * (INTEGER ? 2 : 4);  // piece of 16 bytes
    const Run x = read_run(p, row, 8 * run);
    float sum = 0;
    if (INTEGER) {
        u32 both[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int code = 8 * run + i < p.columns ? code_of(x.v[i], scale, p.first_level, p.last_level) : 0;
            sum += (float)code;
            both[i / 2 % 2] |= ((u32)code & 255) << 8 * (i % 2 * 2 + i / 4);
        }
#pragma unroll
        for (int c = 0; c < 2; c++) write(out + 4 * (first + c ^ token & 7), both[c]);
        return sum;
    }
#pragma unroll
    for (int c = 0; c < 4; c++) write(out + 4 * (first + c ^ token & 7), pack(x.v[2 * c], x.v[2 * c + 1]));
#pragma unroll
    for (int i = 0; i < 8; i++) sum += x.v[i];
    return sum;
}

// Of all columns of the row.
DEVICE Scale scale_of_row(const Arrangement& p, size_t row, float* of_warp) {
    float high = 0, low = 0;
    for (int k = 8 * threadIdx.x; k < p.columns; k += 8 * 256) {
        const Run x = read_run(p, row, k);
#pragma unroll
        for (int i = 0; i < 8; i++) high = larger(high, x.v[i]), low = larger(low, -x.v[i]);
    }
    high = block_max(high, of_warp);
    return scale_of(high, block_max(low, of_warp), p.first_level, p.last_level);
}

extern "C" __global__ void __launch_bounds__(256) arrange(const Arrangement p) {
    __shared__ float of_warp[8];
    let_next_begin();
    wait_for_inputs();
    const size_t row = blockIdx.x;
    const int runs = p.padded / 8, begin = INTEGER ? 0 : 256 * blockIdx.y, end = INTEGER ? runs : begin + 256;
    Scale scale = {};
    if (INTEGER) {
        scale = scale_of_row(p, row, of_warp);
        if (threadIdx.x == 0) write(p.scale + row, scale.step);
    }
    for (int first = begin; first < end; first += 256) {  // all threads of a warp, for the sums
        const int run = first + threadIdx.x;
        float sum = run < runs ? arrange_run(p, row, run, scale) : 0.0f;
#pragma unroll
        for (int mask = 1; mask < 16; mask *= 2) sum += warp_shuffle_xor(sum, mask);
        if (run < runs && run % 16 == 0) write(p.sums + (size_t)(u32)(run / 16) * p.width + row, sum);
    }
}
