// Activations to int8 codes with a scale a row (quantize.cuh), for product8 and gemm. A block makes one row.
//
// Constants: TYPE of x (0 bfloat16, 1 float16, 2 float32); AFFINE: whether the format has an offset; THREADS; HOLDS.
#include "quantize.cuh"

struct Quantization {
    const void* x;   // (M, columns)
    u32* codes;      // (M, padded) bytes, in the order of codes_of(), zero beyond columns
    float* scale;    // (M)
    int columns, padded;
    float first_level, last_level;
};

extern "C" __global__ void __launch_bounds__(THREADS) rows(const Quantization p) {
    let_next_begin();
    wait_for_inputs();
    const int runs = p.padded / 8;
    u32* const codes = p.codes + (size_t)blockIdx.x * runs * 2;
    quantize_row(p.x, p.scale, p.columns, runs, p.first_level, p.last_level, [=](int run, const u32 (&word)[2], float) {
        if (run < runs) write((uint2*)codes + run, uint2{word[0], word[1]});
    });
}
