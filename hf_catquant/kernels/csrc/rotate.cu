// R x or R^T x of each row, R = blockdiag(H_p, ..., H_p) diag(s): rotation.py, with the sums in another order.
//
// A block of THREADS threads rotates 8 * THREADS columns of a row, whole runs of p, then the same columns of others. A thread
// holds 8 values whose columns differ in three bits and adds and subtracts along these; through shared memory it comes to
// the next three, and in the end to eight columns in a row again, which it read and writes at once.
//
// Constants: LOG: log2(p), at most 13; TYPE of x and out (0 bfloat16, 1 float16, 2 float32); INVERSE: R^T x; THREADS.
#include "numbers.cuh"

struct Rotation {
    const void* x;  // (M, columns)
    void* out;      // (M, columns)
    int rows, columns, segments;  // M; segments of a row
    float norm;                   // 1 / sqrt(p)
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

// Eight words between runs of 64 keep threads that read at once on different banks. Where a and b have no bit in common,
// slot(a + b) is slot(a) + slot(b): below, one address and a constant for each value.
DEVICE constexpr int slot(int i) { return i + i / 64 * 8; }

// Where value 0 is of a thread whose values differ in bits low, low + 1 and low + 2 of their columns; value j is at
// slot(j << low) from it, and no other thread has them.
DEVICE float* place(float* held, int thread, int low) {
    return held + slot((thread >> low << (low + 3)) + (thread & ((1 << low) - 1)));
}

DEVICE void put(float* held, int thread, int low, const float (&v)[8]) {
    float* at = place(held, thread, low);
    if (low == 0) {
        ((float4*)at)[0] = float4{v[0], v[1], v[2], v[3]}, ((float4*)at)[1] = float4{v[4], v[5], v[6], v[7]};
        return;
    }
#pragma unroll
    for (int j = 0; j < 8; j++) at[slot(j << low)] = v[j];
}

DEVICE void take(float (&v)[8], float* held, int thread, int low) {
    const float* at = place(held, thread, low);
    if (low == 0) {
        float4 a = ((const float4*)at)[0], b = ((const float4*)at)[1];
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
        return;
    }
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = at[slot(j << low)];
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

// H_p of the runs of a block's columns, eight that follow each other a thread, not normalized.
DEVICE void transform(float (&v)[8], float* held, int thread) {
    butterfly(v, 0, 0);
    int low = 0;
#pragma unroll
    for (int next = 3; next < LOG; next += 3) {
        put(held, thread, low, v);  // where this thread read from
        sync_block();
        low = next < LOG_SPAN - 3 ? next : LOG_SPAN - 3;
        take(v, held, thread, low);
        butterfly(v, low, next);
    }
    if (LOG <= 3) return;
    put(held, thread, low, v);
    sync_block();
    take(v, held, thread, 0);
}

extern "C" __global__ void __launch_bounds__(THREADS) rotate(const Rotation p) {
    __shared__ float4 shared[LOG > 3 ? (SPAN + SPAN / 8) / 4 : 1];
    let_next_begin();
    const int thread = threadIdx.x, first = (int)(blockIdx.x % (u32)p.segments) * SPAN + 8 * thread;
    const int left = p.columns - first, step = gridDim.x / (u32)p.segments;
    const bool whole = p.columns % 8 == 0;
    float factor[8];  // of this thread's columns: made once for all rows
#pragma unroll
    for (int j = 0; j < 8; j++) factor[j] = sign(first + j) * p.norm;
    wait_for_inputs();
    for (int row = blockIdx.x / (u32)p.segments; row < p.rows; row += step) {
        const size_t at = (size_t)row * p.columns + first;
        float v[8] = {};
        if (whole) {
            if (left > 0) read_eight(v, p.x, at);
        } else {
#pragma unroll
            for (int j = 0; j < 8; j++)
                if (j < left) v[j] = read_number(p.x, at + j);
        }
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] *= INVERSE ? 1 : factor[j];
        transform(v, (float*)shared, thread);
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] *= INVERSE ? factor[j] : 1;
        if (whole) {
            if (left > 0) write_eight(p.out, at, v);
        } else {
#pragma unroll
            for (int j = 0; j < 8; j++)
                if (j < left) write_number(p.out, at + j, v[j]);
        }
    }
}
