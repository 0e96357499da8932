// The correction in one pass: out = gamma[c] * y + beta[c], c the nearest of C centroids to z = y @ basis.
//
// A block makes one row, a thread eight columns of it at a time. Each warp takes every WARPS-th centroid; the distance
// less ||z||^2 is sum_p c_p * (c_p - 2 z_p).
//
// Constants: TYPE of y and out (0 bfloat16, 1 float16, 2 float32); THREADS; PROJECT 0: z is given, or is y itself; else
// basis is given, rank is at most 256 and width at most 8 * THREADS, and PROJECT is the largest of 1, 2 and 4 that divides
// rank: so many numbers of the basis, from a multiple of it on, lie in one row.
#include "numbers.cuh"

struct Correction {
    const void* y;           // (M, width)
    const float* basis;      // (width, rank), with PROJECT
    const float* z;          // (M, rank), or null: y itself
    const float* centroids;  // (clusters, rank)
    const float* gamma;      // (clusters, width)
    const float* beta;       // (clusters, width)
    void* out;               // (M, width)
    int width, rank, clusters;
};

constexpr int WARPS = THREADS / 32, COLUMNS = 8 * THREADS;
constexpr int RUN = PROJECT ? PROJECT : 1, RUNS = 4 / RUN;  // of four numbers of the basis, those of one row
constexpr int AHEAD = 3;  // reads of the basis that a thread has under way: 48 KB a block, more than the delay of a read holds

DEVICE float sum_of_warp(float sum) {
#pragma unroll
    for (int mask = 16; mask; mask /= 2) sum += warp_shuffle_xor(sum, mask);
    return sum;
}

// Eight columns of a row of y from d on: together where rows begin on 16 bytes.
DEVICE void read_columns(float (&v)[8], const Correction& p, size_t row, int d) {
    if (p.width % 8 == 0) return read_eight(v, p.y, row * p.width + d);
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = d + j < p.width ? read_number(p.y, row * p.width + d + j) : 0.0f;
}

DEVICE void read_floats(float (&v)[8], const float* from) {
    float4 a = read((const float4*)from), b = read((const float4*)from + 1);
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}

// sum += four numbers of the basis times y of the rows that they lie in.
DEVICE void add_products(float (&sum)[4], float4 basis, const float* const (&y)[RUNS], int ahead) {
    const float value[4] = {basis.x, basis.y, basis.z, basis.w};
#pragma unroll
    for (int i = 0; i < RUNS; i++) {
        const float at = y[i][ahead];
#pragma unroll
        for (int j = i * RUN; j < (i + 1) * RUN; j++) sum[j] += at * value[j];
    }
}

// z = y @ basis of a row whose y is in `held`, into `projected`; `held` is overwritten.
//
// The basis is read as it lies in memory, four numbers a thread, by as many threads as take whole rows at a turn: the
// numbers of a thread are of the same components at each. What the threads found is added in order.
DEVICE void project(const Correction& p, size_t row, float* held, float* projected) {
    const int rank = p.rank, thread = threadIdx.x, total = p.width * rank, fours = total / 4;
    const int readers = THREADS / (rank / RUN) * (rank / RUN), rows = readers / (rank / RUN) * RUNS;  // of a turn
    const float4* from = (const float4*)p.basis + thread;
    const float* y[RUNS];
    int left = thread < readers ? (fours - thread + readers - 1) / readers : 0;  // turns
    float sum[4] = {};
    float4 next[AHEAD];
#pragma unroll
    for (int i = 0; i < RUNS; i++) y[i] = held + (4 * thread + i * RUN) / rank;
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
        if (i < left) next[i] = read(from + i * readers);
    sync_block();  // y is there
    while (left > 0) {
        float4 now[AHEAD];
        from += AHEAD * readers, left -= AHEAD;
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            now[i] = next[i];
            if (i < left) next[i] = read(from + i * readers);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (i < left + AHEAD) add_products(sum, now[i], y, i * rows);
#pragma unroll
        for (int i = 0; i < RUNS; i++) y[i] += AHEAD * rows;
    }
    sync_block();  // nobody reads y any more
    if (thread < readers)
#pragma unroll
        for (int j = 0; j < 4; j++) held[4 * thread + j] = sum[j];
    sync_block();
    for (int c = thread / 32; c < rank; c += WARPS) {
        float z = 0;
        for (int r = thread % 32; r < rows; r += 32) z += held[r * rank + c];
        z = sum_of_warp(z);
        if (thread % 32) continue;
        for (int i = 4 * fours; i < total; i++)  // the last ones, where four do not divide them
            if (i % rank == c) z += read_number(p.y, row * p.width + i / rank) * read(p.basis + i);
        projected[c] = z;
    }
    sync_block();
}

// The first of the nearest centroids.
DEVICE int nearest(const Correction& p, size_t row, const float* projected) {
    __shared__ float distance_of_warp[WARPS];
    __shared__ int cluster_of_warp[WARPS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float least = 0;
    int best = -1;
    for (int c = warp; c < p.clusters; c += WARPS) {
        float sum = 0;
        for (int r = lane; r < p.rank; r += 32) {
            float z = PROJECT ? projected[r] : p.z ? read(p.z + row * p.rank + r) : read_number(p.y, row * p.width + r);
            float at = read(p.centroids + (size_t)c * p.rank + r);
            sum += at * (at - 2 * z);
        }
        sum = sum_of_warp(sum);
        if (best < 0 || sum < least) least = sum, best = c;
    }
    if (lane == 0) distance_of_warp[warp] = least, cluster_of_warp[warp] = best;
    sync_block();
    best = cluster_of_warp[0], least = distance_of_warp[0];
    for (int w = 1; w < WARPS && w < p.clusters; w++) {
        int other = cluster_of_warp[w];
        float distance = distance_of_warp[w];
        if (distance < least || (distance == least && other < best)) least = distance, best = other;
    }
    return best;
}

// Eight columns from d on, of which some may be beyond the end.
DEVICE void correct(const Correction& p, size_t row, size_t best, int d, const float (&y)[8]) {
    const float *gamma = p.gamma + best * p.width + d, *beta = p.beta + best * p.width + d;
    if (p.width % 8 == 0) {
        float g[8], b[8], value[8];
        read_floats(g, gamma), read_floats(b, beta);
#pragma unroll
        for (int j = 0; j < 8; j++) value[j] = add(multiply(g[j], y[j]), b[j]);
        return write_eight(p.out, row * p.width + d, value);
    }
#pragma unroll
    for (int j = 0; j < 8; j++)
        if (d + j < p.width) write_number(p.out, row * p.width + d + j, add(multiply(read(gamma + j), y[j]), read(beta + j)));
}

extern "C" __global__ void __launch_bounds__(THREADS) cluster(const Correction p) {
    __shared__ float held[PROJECT ? COLUMNS : 1], projected[PROJECT ? 256 : 1];
    let_next_begin();
    wait_for_inputs();
    const size_t row = blockIdx.x;
    const int first = 8 * threadIdx.x;
    float y[8];
    if (first < p.width) read_columns(y, p, row, first);  // asked for before it is known which cluster
    if (PROJECT) {
        if (first < p.width)
#pragma unroll
            for (int j = 0; j < 8; j++) held[first + j] = y[j];
        project(p, row, held, projected);
    }
    const int best = nearest(p, row, projected);
    for (int d = first; d < p.width; d += COLUMNS) {
        if (d != first) read_columns(y, p, row, d);
        correct(p, row, best, d, y);
    }
}
