// The product in 8-bit integers on the tensor cores, exact within a group, for up to 8 * NT tokens a block: x comes as int8
// codes with a scale a token (rows.cu).
//
// Codes stay where they are in a byte: fields at an odd place count 2^BITS too much, and have sums of their own.
#include "few.cuh"

constexpr int PLANES = BITS == 8 ? 1 : 2;
constexpr int VALUES = MT * NT * 4;

struct Sums {
    int codes[PLANES][MT][NT][4], x[NT][4];
};

DEVICE void clear(Sums& sums) {
#pragma unroll
    for (int i = 0; i < 4 * NT; i++) {
        sums.x[i / 4][i % 4] = 0;
#pragma unroll
        for (int mt = 0; mt < MT * PLANES; mt++) sums.codes[mt / MT][mt % MT][i / 4][i % 4] = 0;
    }
}

DEVICE u32 four_codes(u32 word, int field) {
    if (BITS == 8) return word ^ 0x80808080u;  // code - 128, signed
    return word >> BITS * (field & ~1) & (MASK << BITS * (field & 1)) * 0x01010101u;
}

DEVICE void one_step(Sums& sums, const Codes& codes, int step, const uint2 (&x)[NT], u32 ones) {
    int field = step % FIELDS, plane = PLANES == 1 ? 0 : field & 1;
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
        const uint4& word = codes.word[mt][step / FIELDS];
        uint4 a = {four_codes(word.x, field), four_codes(word.y, field), four_codes(word.z, field), four_codes(word.w, field)};
#pragma unroll
        for (int nt = 0; nt < NT; nt++) {
            if (BITS == 8) mma_s8s8(sums.codes[plane][mt][nt], a, x[nt].x, x[nt].y);
            else mma_u8s8(sums.codes[plane][mt][nt], a, x[nt].x, x[nt].y);
        }
    }
    if (BITS < 8)
#pragma unroll
        for (int nt = 0; nt < NT; nt++)
            mma_u8s8(sums.x[nt], {ones, ones, ones, ones}, x[nt].x, x[nt].y);
}

DEVICE int sum_of(const Sums& sums, int mt, int nt, int c) {
    int odd = PLANES == 2 ? sums.codes[PLANES - 1][mt][nt][c] >> BITS : 0;
    return sums.codes[0][mt][nt][c] + odd;
}

// y += sum_k level * x of tile mt, scaled and offset.
DEVICE void add_tile(float (&y)[NT][4], const Sums& sums, const Product& p, const Pairs& pairs, int mt) {
#pragma unroll
    for (int rh = 0; rh < 2; rh++) {
        float step = pairs.scale[rh] * p.level_step, zero = pairs.scale[rh] * p.level_zero + pairs.offset[rh];
#pragma unroll
        for (int i = 0; i < 2 * NT; i++) {
            int nt = i / 2, c = 2 * rh + i % 2;
            float sum = step * (float)sum_of(sums, mt, nt, c);
            if (BITS < 8) sum += zero * (float)sums.x[nt][c];
            y[nt][c] += sum;
        }
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) product8(const Product p) {
    __shared__ float parts[WARPS * VALUES * 32];
    let_next_begin();
    const int lane = threadIdx.x, warp = threadIdx.y, row = lane >> 2, q = lane & 3;
    const int first = blockIdx.x * MT, token0 = blockIdx.y * 8 * NT;
    float y[MT][NT][4] = {};
    Sums sums;
    Held held, next[AHEAD];
    const u8* x_at[NT];
#pragma unroll
    for (int nt = 0; nt < NT; nt++)
        x_at[nt] = (const u8*)p.x + (size_t)(u32)(token0 + row + 8 * nt) * (u32)(p.chunks * CHUNK) + 8 * q;
    clear(sums);
    Cursor cursor = start(p, first, warp, lane);
    const u32 ones = kept(p, 0x01010101u);
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
                uint2 x[NT];
#pragma unroll
                for (int nt = 0; nt < NT; nt++)
                    x[nt] = token0 + row + 8 * nt < p.tokens ? read((const uint2*)(x_at[nt] + chunk * CHUNK + 32 * s)) : uint2{0, 0};
                one_step(sums, held.codes, s, x, ones);
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
    for (int i = 0; i < VALUES; i++) parts[(warp * VALUES + i) * 32 + lane] = y[i / (4 * NT)][i / 4 % NT][i % 4];
    sync_block();
    add_tiles_and_write(p, parts, first, token0);
}
