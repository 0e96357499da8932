// Activations to int8 codes with a scale a row (quantize.cuh), for product8 and gemm. A block makes one row.
//
// Codes go where product8 reads them: 2 kp + i / 2 + 4 (i % 2) of each eight is byte i of word kp.
//
// Constants: TYPE of x (0 bfloat16, 1 float16, 2 float32); AFFINE: whether the format has an offset.
#include "quantize.cuh"

struct Quantization {
    const void* x;   // (M, columns)
    u8* codes;       // (M, padded), zero beyond columns
    float* scale;    // (M)
    int columns, padded;
    float first_level, last_level;
};

extern "C" __global__ void __launch_bounds__(256) rows(const Quantization p) {
    __shared__ float of_warp[8];
    let_next_begin();
    wait_for_inputs();
    const size_t row = blockIdx.x;
    float high = 0, low = 0;
    for (int k = threadIdx.x; k < p.columns; k += 256) {
        float x = read_number(p.x, row * p.columns + k);
        high = larger(high, x);
        low = larger(low, -x);
    }
    high = block_max(high, of_warp);
    const Scale scale = scale_of(high, block_max(low, of_warp), p.first_level, p.last_level);
    for (int k = threadIdx.x; k < p.padded; k += 256) {
        int code = k < p.columns ? code_of(read_number(p.x, row * p.columns + k), scale, p.first_level, p.last_level) : 0;
        int inside = k % 8, word = inside / 2 % 2, byte = inside % 2 * 2 + inside / 4;
        write(p.codes + row * p.padded + k - inside + 4 * word + byte, (u8)code);
    }
    if (threadIdx.x == 0) write(p.scale + row, scale.step);
}
