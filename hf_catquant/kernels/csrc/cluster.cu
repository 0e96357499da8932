// The correction in one pass: out = gamma[c] * y + beta[c], c the nearest of C centroids to z = y @ basis.
//
// A block makes one row. Each warp takes every 8th centroid; the distance less ||z||^2 is sum_p c_p * (c_p - 2 z_p).
//
// Constants: TYPE of y and out (0 bfloat16, 1 float16, 2 float32); PROJECT 0: z is given, or is y itself; 1: basis is
// given, and rank is at most 256.
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

// Thread t adds slice t / padded of the width for component t % padded; slices are added in order.
DEVICE void project(const Correction& p, size_t row, float* parts) {
    const int padded = (p.rank + 31) / 32 * 32, slices = 256 / padded, slice = threadIdx.x / padded, c = threadIdx.x % padded;
    float sum = 0;
    if (slice < slices && c < p.rank)
        for (int d = slice; d < p.width; d += slices) sum += read_number(p.y, row * p.width + d) * read(p.basis + (size_t)d * p.rank + c);
    parts[threadIdx.x] = sum;
    sync_block();
    sum = 0;
    if (threadIdx.x < p.rank)
        for (int s = 0; s < slices; s++) sum += parts[s * padded + threadIdx.x];
    sync_block();
    parts[threadIdx.x] = sum;
    sync_block();
}

extern "C" __global__ void __launch_bounds__(256) cluster(const Correction p) {
    __shared__ float projected[256];
    __shared__ float distance_of_warp[8];
    __shared__ int cluster_of_warp[8];
    let_next_begin();
    wait_for_inputs();
    const size_t row = blockIdx.x;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (PROJECT) project(p, row, projected);
    float nearest = 0;
    int best = -1;
    for (int c = warp; c < p.clusters; c += 8) {
        float sum = 0;
        for (int r = lane; r < p.rank; r += 32) {
            float z = PROJECT ? projected[r] : p.z ? read(p.z + row * p.rank + r) : read_number(p.y, row * p.width + r);
            float at = read(p.centroids + (size_t)c * p.rank + r);
            sum += at * (at - 2 * z);
        }
#pragma unroll
        for (int mask = 16; mask; mask /= 2) sum += warp_shuffle_xor(sum, mask);
        if (best < 0 || sum < nearest) nearest = sum, best = c;
    }
    if (lane == 0) distance_of_warp[warp] = nearest, cluster_of_warp[warp] = best;
    sync_block();
    best = cluster_of_warp[0], nearest = distance_of_warp[0];
    for (int w = 1; w < 8; w++) {
        int other = cluster_of_warp[w];
        float distance = distance_of_warp[w];
        if (other >= 0 && (distance < nearest || (distance == nearest && other < best))) nearest = distance, best = other;
    }
    for (int d = threadIdx.x; d < p.width; d += 256) {
        float y = read_number(p.y, row * p.width + d);
        float value = add(multiply(read(p.gamma + (size_t)best * p.width + d), y), read(p.beta + (size_t)best * p.width + d));
        write_number(p.out, row * p.width + d, value);
    }
}
