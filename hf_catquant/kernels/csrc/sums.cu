// Sums of x over each run of 32 * FLUSH columns, for gemm.cu: a warp makes one, always in the same order.
//
// Constants: those of product.cuh; INTEGER: x is int8 codes, in any order within eight.
#include "product.cuh"

struct XSums {
    const void* x;   // (M, columns) 16-bit, or int8
    float* x_sums;   // (runs, M rounded up to 128)
    int tokens, columns, runs;
};

extern "C" __global__ void __launch_bounds__(256) sums(const XSums p) {
    let_next_begin();
    wait_for_inputs();
    const int m = blockIdx.x, run = blockIdx.y * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < FLUSH; i++) {
        int k = 32 * (FLUSH * run + i) + lane;
        if (run >= p.runs || k >= p.columns) continue;
        size_t at = (size_t)m * p.columns + k;
        sum += INTEGER ? (float)read((const signed char*)p.x + at) : read_number(p.x, at);
    }
#pragma unroll
    for (int mask = 16; mask; mask /= 2) sum += warp_shuffle_xor(sum, mask);
    if (lane == 0 && run < p.runs) write(p.x_sums + (size_t)run * sums_width(p.tokens) + m, sum);
}
