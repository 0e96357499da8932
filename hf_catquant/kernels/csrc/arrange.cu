// x as a block of wgemm.cu takes it: each step of 32 columns in the order of the tensor cores' fragments, zeros behind the last
// column, and the sum of x over each 128 columns. With INTEGER x becomes int8 codes with a scale a row, as rows.cu makes them.
//
// A step is four runs of eight columns. As words of two 16-bit numbers it is a 4 x 4 matrix, which is transposed; as bytes,
// run q becomes words q and 4 + q, in whose bytes are its columns 0 4 1 5 and 2 6 3 7. Both are what a lane has of a weight
// (product.cuh). What a block of wgemm copies at once, a stage, follows each other as it lies in shared memory: two units of
// 128 columns of TOKENS rows, 128 bytes a row in the order of swizzled() (wgmma.cuh), then the sums of both, where a lane finds
// those of its tokens of two column tiles side by side.
//
// A thread makes runs, 16 threads one after another a sum. With INTEGER a block takes a row (quantize.cuh), else THREADS runs.
//
// Constants: TYPE of x (0 bfloat16, 1 float16, 2 float32); INTEGER; AFFINE: whether the format of the codes has an offset;
// PAIRED: words of 16-bit numbers are columns 0 4, 2 6, 1 5 and 3 7 of a run, not 0 1, 2 3, 4 5 and 6 7, as wdense.cu looks
// them up; TOKENS; THREADS; HOLDS.
#include "quantize.cuh"

struct Arrangement {
    const void* x;   // (M, columns)
    uint4* out;      // (M / TOKENS, stages): of a stage two units (slabs, TOKENS, 128 bytes), and (2, TOKENS) sums, float32
    float* scale;    // (M), with INTEGER
    int columns, stages;
    float first_level, last_level;
};

constexpr int SLABS = INTEGER ? 1 : 2, RUNS = 16 / SLABS;  // of a slab
constexpr int UNIT = SLABS * 8 * TOKENS, STAGE = 2 * UNIT + TOKENS / 2;  // in pieces of 16 bytes

DEVICE u32 pack(float low, float high) {
    return TYPE == 1 ? float_to_f16(low) | float_to_f16(high) << 16 : pack_bf16(low, high);
}

// Where run `run` of the row is written: four or two words, 4 * (word ^ token % 8) from here.
struct Home { u32* out; int first, token; };

DEVICE Home home_of(const Arrangement& p, size_t row, int run) {
    const int token = (int)(row % TOKENS), step = run / 4;
    const size_t stage = row / TOKENS * (u32)p.stages + (u32)(run / 32);
    uint4* const slab = p.out + stage * STAGE + (run / 16 % 2 * UNIT + run % 16 / RUNS * 8 * TOKENS);
    return {(u32*)(slab + token * 8) + run % 4, step % (RUNS / 4) * (INTEGER ? 2 : 4), token & 7};
}

DEVICE void put_word(const Home& at, int i, u32 word) { write(at.out + 4 * (at.first + i ^ at.token), word); }

// The sum of a unit, of 16 threads, to its place behind the units of its stage.
DEVICE void write_sum(const Arrangement& p, size_t row, int run, float sum) {
#pragma unroll
    for (int mask = 1; mask < 16; mask *= 2) sum += warp_shuffle_xor(sum, mask);
    if (run >= 32 * p.stages || run % 16) return;
    const int token = (int)(row % TOKENS), place = token / 16 * 16 + token % 8 / 2 * 4 + token / 8 % 2 * 2 + token % 2;
    const size_t stage = row / TOKENS * (u32)p.stages + (u32)(run / 32);
    write((float*)(p.out + stage * STAGE + 2 * UNIT) + run / 16 % 2 * TOKENS + place, sum);
}

extern "C" __global__ void __launch_bounds__(THREADS) arrange(const Arrangement p) {
    let_next_begin();
    wait_for_inputs();
    const size_t row = blockIdx.x;
    const int runs = 32 * p.stages;
    if (INTEGER) {
        quantize_row(p.x, p.scale, p.columns, runs, p.first_level, p.last_level, [=](int run, const u32 (&word)[2], float sum) {
            const Home at = home_of(p, row, run);
            if (run < runs) put_word(at, 0, word[0]), put_word(at, 1, word[1]);
            write_sum(p, row, run, sum);
        });
        return;
    }
    const int run = (int)blockIdx.y * THREADS + threadIdx.x;
    const Home at = home_of(p, row, run);
    const Run x = read_run(p.x, row, p.columns, run);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) sum += x.v[i];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int first = PAIRED ? i % 2 * 2 + i / 2 : 2 * i;
        if (run < runs) put_word(at, i, pack(x.v[first], x.v[first + (PAIRED ? 4 : 1)]));
    }
    write_sum(p, row, run, sum);
}
