// R x or R^T x of each row, R = blockdiag(H_p, ..., H_p) diag(s): rotation.py, with the sums in another order.
//
// A block of THREADS threads rotates 8 * THREADS columns of a row, whole runs of p. A thread holds 8 values whose columns
// differ in three bits and adds and subtracts along these; through shared memory it comes to the next three.
//
// Constants: LOG: log2(p), at most 13; TYPE of x and out (0 bfloat16, 1 float16, 2 float32); INVERSE: R^T x; THREADS.
#include "numbers.cuh"

struct Rotation {
    const void* x;  // (M, columns)
    void* out;      // (M, columns)
    int columns, segments;  // segments of a row
    float norm;             // 1 / sqrt(p)
};

constexpr int SPAN = 8 * THREADS;
template <int N>
struct Log2 { static constexpr int value = 1 + Log2<N / 2>::value; };  // no function: older NVRTC wants those to be __device__
template <>
struct Log2<1> { static constexpr int value = 0; };
constexpr int LOG_SPAN = Log2<SPAN>::value;  // THREADS is a power of two

// s of column k: rotation._signs.
DEVICE float sign(u32 k) {
    u32 h = (k + 1) * 2654435761u;
    h = (h ^ h >> 15) * 2246822519u;
    h ^= h >> 16, h ^= h >> 8, h ^= h >> 4, h ^= h >> 2, h ^= h >> 1;
    return h & 1 ? -1.0f : 1.0f;
}

// Eight words between runs of 64 keep threads that read at once on different banks.
DEVICE int slot(int i) { return i + i / 64 * 8; }

// The column, within the block's, of value j of a thread whose values differ in bits LOW, LOW + 1 and LOW + 2.
DEVICE int column_of(int thread, int low, int j) {
    return (thread >> low << (low + 3)) + (j << low) + (thread & ((1 << low) - 1));
}

// Sums and differences along those of bits low, low + 1, low + 2 of the columns that H_p has, from bit `next` on.
DEVICE void butterfly(float (&v)[8], int low, int next) {
#pragma unroll
    for (int bit = 0; bit < 3; bit++) {
        if (low + bit < next || low + bit >= LOG) continue;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            if (j >> bit & 1) continue;
            float a = v[j], b = v[j | 1 << bit];
            v[j] = a + b, v[j | 1 << bit] = a - b;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) rotate(const Rotation p) {
    __shared__ float4 shared[LOG > 3 ? (SPAN + SPAN / 8) / 4 : 1];
    let_next_begin();
    wait_for_inputs();
    float* held = (float*)shared;
    const size_t row = blockIdx.x / (u32)p.segments * (size_t)p.columns;
    const int first = (int)(blockIdx.x % (u32)p.segments) * SPAN, thread = threadIdx.x;
    const bool whole = p.columns % 8 == 0;
    float v[8];
    if (whole && first + 8 * thread < p.columns) {
        read_eight(v, p.x, row + first + 8 * thread);
    } else {
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = first + 8 * thread + j < p.columns ? read_number(p.x, row + first + 8 * thread + j) : 0.0f;
    }
    if (!INVERSE)
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] *= sign(first + 8 * thread + j);
    butterfly(v, 0, 0);
    int low = 0;
#pragma unroll
    for (int next = 3; next < LOG; next += 3) {
        if (low == 0) {
            float4* at = shared + slot(8 * thread) / 4;
            at[0] = float4{v[0], v[1], v[2], v[3]}, at[1] = float4{v[4], v[5], v[6], v[7]};
        } else {
#pragma unroll
            for (int j = 0; j < 8; j++) held[slot(column_of(thread, low, j))] = v[j];  // where it read from, alone
        }
        sync_block();
        low = next < LOG_SPAN - 3 ? next : LOG_SPAN - 3;
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = held[slot(column_of(thread, low, j))];
        butterfly(v, low, next);
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {
        v[j] *= p.norm;
        if (INVERSE) v[j] *= sign(first + column_of(thread, low, j));
    }
    if (whole && low == 0) {
        if (first + 8 * thread < p.columns) write_eight(p.out, row + first + 8 * thread, v);
        return;
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {
        int k = first + column_of(thread, low, j);
        if (k < p.columns) write_number(p.out, row + k, v[j]);
    }
}
