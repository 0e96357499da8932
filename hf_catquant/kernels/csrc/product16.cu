// The product with 16-bit activations as they are, for up to 8 * NT tokens a block.
//
// Codes are multiplied as they are (codes.cuh). The level's step and zero and the offset are applied to whole groups: the
// sum of x over a group is one more row of ones on the tensor cores.
//     y = sum_g scale * step * (sum_k code * x) + (scale * zero + offset) * (sum_k x)
#include "codes.cuh"
#include "few.cuh"

struct Sums {
    float codes[MT][NT][4], x[NT][4];
};

DEVICE void clear(Sums& sums) {
#pragma unroll
    for (int i = 0; i < 4 * NT; i++) {
        sums.x[i / 4][i % 4] = 0;
#pragma unroll
        for (int mt = 0; mt < MT; mt++) sums.codes[mt][i / 4][i % 4] = 0;
    }
}

DEVICE void add_tile(float (&y)[NT][4], const Sums& sums, const Product& p, const Pairs& pairs, int mt) {
#pragma unroll
    for (int rh = 0; rh < 2; rh++) {
        float step = pairs.scale[rh] * p.level_step, zero = pairs.scale[rh] * p.level_zero + pairs.offset[rh];
#pragma unroll
        for (int nt = 0; nt < NT; nt++)
#pragma unroll
            for (int c = 2 * rh; c < 2 * rh + 2; c++) {
                y[nt][c] += step * sums.codes[mt][nt][c];
                if (BITS < 8) y[nt][c] += zero * sums.x[nt][c];
            }
    }
}

struct Constants {
    u32 magic, ones;
};

// x holds the lane's eight activations of a step, for each column tile.
DEVICE void one_step(Sums& sums, const Codes& codes, int step, const uint4 (&x)[NT], Constants constant) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int field = step % FIELDS + half * FIELDS;
#pragma unroll
        for (int mt = 0; mt < MT; mt++) {
            const uint4& word = codes.word[mt][step / FIELDS];
            uint4 a = {two_codes(word.x, field, constant.magic), two_codes(word.y, field, constant.magic),
                       two_codes(word.z, field, constant.magic), two_codes(word.w, field, constant.magic)};
#pragma unroll
            for (int nt = 0; nt < NT; nt++) mma(sums.codes[mt][nt], a, word_of(x[nt], 2 * half), word_of(x[nt], 2 * half + 1));
        }
        uint4 ones = {constant.ones, constant.ones, constant.ones, constant.ones};
        if (BITS < 8)
#pragma unroll
            for (int nt = 0; nt < NT; nt++) mma(sums.x[nt], ones, word_of(x[nt], 2 * half), word_of(x[nt], 2 * half + 1));
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) product16(const Product p) {
    __shared__ float parts[WARPS * MT * NT * 4 * 32];
    let_next_begin();
    const int lane = threadIdx.x, warp = threadIdx.y, row = lane >> 2, q = lane & 3;
    const int first = blockIdx.x * MT, token0 = blockIdx.y * 8 * NT;
    const Constants constant = {kept(p, HALF ? 0x64006400u : 0x43004300u), kept(p, ONES)};
    float y[MT][NT][4] = {};
    Sums sums;
    Held held, next[AHEAD];
    Cursor cursor = start(p, first, warp, lane);
    const u16* x_at[NT];
    bool there[NT];
#pragma unroll
    for (int nt = 0; nt < NT; nt++) {
        int m = token0 + row + 8 * nt;
        there[nt] = m < p.tokens;
        x_at[nt] = (const u16*)p.x + (size_t)(u32)m * (u32)p.columns + 8 * q;
    }
    clear(sums);
#pragma unroll
    for (int i = 0; i < AHEAD; i++) read_held(next[i], p, cursor, warp + i * WARPS);
    wait_for_inputs();
    for (int chunk = warp; chunk < p.chunks; chunk += WARPS) {
        turn_to_next(held, next, p, cursor, chunk + AHEAD * WARPS);
#pragma unroll
        for (int sub = 0; sub < GROUPS_IN_CHUNK; sub++) {
            if (!BY_ROW) clear(sums);
#pragma unroll
            for (int s = sub * FLUSH; s < (sub + 1) * FLUSH; s++) {
                u32 k = chunk * CHUNK + 32 * s;
                bool inside = k + 8 * q < p.columns;
                uint4 x[NT];
#pragma unroll
                for (int nt = 0; nt < NT; nt++)
                    x[nt] = there[nt] && inside ? read((const uint4*)(x_at[nt] + k)) : uint4{0, 0, 0, 0};
                one_step(sums, held.codes, s, x, constant);
            }
            if (!BY_ROW)
#pragma unroll
                for (int mt = 0; mt < MT; mt++) add_tile(y[mt], sums, p, pairs_in(held, p, cursor, mt, chunk, sub), mt);
        }
    }
    if (BY_ROW)
#pragma unroll
        for (int mt = 0; mt < MT; mt++) add_tile(y[mt], sums, p, read_pairs(p, cursor, mt, 0), mt);
#pragma unroll
    for (int i = 0; i < MT * NT * 4; i++) parts[(warp * MT * NT * 4 + i) * 32 + lane] = y[i / (4 * NT)][i / 4 % NT][i % 4];
    sync_block();
    add_tiles_and_write(p, parts, first, token0);
}
