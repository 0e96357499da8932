// Adds the sums of the splits of gemm.cu or wgemm.cu, first split first: out[m, n] = x_scale[m] * sum_s partial[s, m, n] + bias[n].
//
// Constants: TYPE of out and bias (0 bfloat16, 1 float16, 2 float32).
#include "numbers.cuh"

struct Partials {
    const float* partial;  // (splits, M, N)
    const float* x_scale;  // (M) or null
    const void* bias;      // (N) or null
    void* out;             // (M, N)
    int tokens, rows, splits;
};

extern "C" __global__ void __launch_bounds__(256) partials(const Partials p) {
    let_next_begin();
    wait_for_inputs();
    const int n = blockIdx.x * 256 + threadIdx.x, m = blockIdx.y;
    if (n >= p.rows) return;
    const size_t at = (size_t)m * p.rows + n, one = (size_t)p.tokens * p.rows;
    float sum = 0;
#pragma unroll 4
    for (int s = 0; s < p.splits; s++) sum += read(p.partial + s * one + at);
    if (p.x_scale) sum *= read(p.x_scale + m);
    if (p.bias) sum += read_number(p.bias, n);
    write_number(p.out, at, sum);
}
