// The product in 8-bit integers on the tensor cores, exact within a group.
//
// SPLIT 0: x comes as int8 codes with a scale a token (rows.cu), 8 tokens a column tile.
// SPLIT 1: x is 16-bit, TOKENS of them (up to 4). For each token and chunk, x = x_scale * (128 high + low) with
//          |128 high + low| <= 16256: 15 bits of the chunk's largest value. high and low are two columns of the one tile.
//
// Codes stay where they are in a byte: fields at an odd place count 2^BITS too much, and have sums of their own.
#include "product.cuh"

constexpr int PLANES = BITS == 8 ? 1 : 2;
constexpr int BLOCKS = CHUNK / 128;           // a lane quantizes 4 values of each 128
constexpr int STAGE_STRIDE = CHUNK / 4 + 8;   // words of a staged column; the 8 keep its readers on different banks
constexpr int VALUES = SPLIT ? MT * 2 : MT * NT * 4;
constexpr int LARGEST = 127 * 128;
constexpr int STAGE = SPLIT ? WARPS * 8 * STAGE_STRIDE : 0, PARTS = WARPS * VALUES * 32;

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

// y += x_scale * sum_k level * x, scaled and offset. With SPLIT, columns 2 t and 2 t + 1 are high and low of token t.
DEVICE void add_group(float* y, const Sums& sums, const Product& p, const Cursor& cursor, u32 group, float x_scale) {
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
        Pairs pairs = read_pairs(p, cursor, mt, group);
#pragma unroll
        for (int rh = 0; rh < 2; rh++) {
            float step = pairs.scale[rh] * p.level_step, zero = pairs.scale[rh] * p.level_zero + pairs.offset[rh];
            if (SPLIT) {
                int c = 2 * rh, product = 128 * sum_of(sums, mt, 0, c) + sum_of(sums, mt, 0, c + 1);
                float sum = step * (float)product;
                if (BITS < 8) sum += zero * (float)(128 * sums.x[0][c] + sums.x[0][c + 1]);
                y[mt * 2 + rh] += x_scale * sum;
            } else {
#pragma unroll
                for (int i = 0; i < 2 * NT; i++) {
                    int nt = i / 2, c = 2 * rh + i % 2;
                    float sum = step * (float)sum_of(sums, mt, nt, c);
                    if (BITS < 8) sum += zero * (float)sums.x[nt][c];
                    y[(mt * NT + nt) * 4 + c] += sum;
                }
            }
        }
    }
}

struct Raw {  // x of a chunk as it is in memory: two pairs of each 8 values
    u32 pair[TOKENS][BLOCKS][2];
};

DEVICE void read_raw(Raw& raw, const Product& p, int token0, int chunk, int lane) {
#pragma unroll
    for (int t = 0; t < TOKENS; t++)
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
            int k = chunk * CHUNK + 128 * b + 8 * (lane >> 1) + 2 * (lane & 1);
            bool there = token0 + t < p.tokens && k < p.columns;
            const u32* at = (const u32*)((const u16*)p.x + (size_t)(token0 + t) * p.columns + k);
            raw.pair[t][b][0] = there ? read(at) : 0;
            raw.pair[t][b][1] = there ? read(at + 2) : 0;
        }
}

DEVICE float low_of(u32 pair) { return TYPE == 1 ? f16_to_float(pair & 0xffff) : bits_to_float(pair << 16); }
DEVICE float high_of(u32 pair) { return TYPE == 1 ? f16_to_float(pair >> 16) : bits_to_float(pair & 0xffff0000u); }

// Writes the high and low bytes of a token's chunk to its two staged columns; returns x_scale.
DEVICE float stage_token(u32* stage, const u32 (&pair)[BLOCKS][2], int t, int lane) {
    float v[BLOCKS][4];
    u32 largest = 0;
#pragma unroll
    for (int i = 0; i < BLOCKS * 4; i++) {  // in the order of the bytes of a word: 0 4 1 5 or 2 6 3 7
        u32 from = pair[i / 4][i & 1];
        v[i / 4][i % 4] = i & 2 ? high_of(from) : low_of(from);
        u32 size = float_to_bits(v[i / 4][i % 4]) & 0x7fffffffu;
        largest = size > largest ? size : largest;
    }
    float most = bits_to_float(warp_max(largest));  // of floats without a sign, the bits are in order; NaN is the largest
    float inverse = most < 1e-30f ? 0.0f : divide((float)LARGEST, most);
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
        u32 high = 0, low = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int value = round_to_int(v[b][i] * inverse), top = (value + 64) >> 7;
            high |= ((u32)top & 255) << 8 * i;
            low |= ((u32)(value - 128 * top) & 255) << 8 * i;
        }
        stage[2 * t * STAGE_STRIDE + 32 * b + lane] = high;
        stage[(2 * t + 1) * STAGE_STRIDE + 32 * b + lane] = low;
    }
    return most * (1.0f / LARGEST);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) product8(const Product p) {
    __shared__ u32 pool[STAGE > PARTS ? STAGE : PARTS];
    let_next_begin();
    const int lane = threadIdx.x, warp = threadIdx.y, row = lane >> 2, q = lane & 3;
    const int first = blockIdx.x * MT, token0 = blockIdx.y * (SPLIT ? TOKENS : 8 * NT);
    u32* stage = pool + warp * 8 * STAGE_STRIDE;
    float y[VALUES] = {}, x_scale = 0;
    Sums sums;
    Codes codes, next;
    Raw raw;
    const u8* x_at[NT];
#pragma unroll
    for (int nt = 0; nt < NT; nt++)
        x_at[nt] = (const u8*)p.x + (size_t)(u32)(token0 + row + 8 * nt) * (u32)(p.chunks * CHUNK) + 8 * q;
    clear(sums);
    if (SPLIT)
        for (int i = lane; i < 8 * STAGE_STRIDE; i += 32) stage[i] = 0;
    Cursor cursor = start(p, first, warp, lane);
    const u32 ones = kept(p, 0x01010101u);
    read_codes<WARPS>(next, cursor, warp < p.chunks);
    wait_for_inputs();
    if (SPLIT) read_raw(raw, p, token0, warp, lane);
    for (int chunk = warp; chunk < p.chunks; chunk += WARPS) {
        codes = next;
        if (SPLIT) {
            sync_warp();
#pragma unroll
            for (int t = 0; t < TOKENS; t++) {
                float scale = stage_token(stage, raw.pair[t], t, lane);
                x_scale = t == q ? scale : x_scale;
            }
            sync_warp();
        }
        read_codes<WARPS>(next, cursor, chunk + WARPS < p.chunks);
        if (SPLIT) read_raw(raw, p, token0, chunk + WARPS, lane);
#pragma unroll
        for (int sub = 0; sub < GROUPS_IN_CHUNK; sub++) {
            if (SPLIT || !BY_ROW) clear(sums);
#pragma unroll
            for (int s = sub * FLUSH; s < (sub + 1) * FLUSH; s++) {
                uint2 x[NT];
#pragma unroll
                for (int nt = 0; nt < NT; nt++) {
                    if (SPLIT) x[nt] = *(const uint2*)(stage + row * STAGE_STRIDE + 8 * s + 2 * q);
                    else x[nt] = token0 + row + 8 * nt < p.tokens ? read((const uint2*)(x_at[nt] + chunk * CHUNK + 32 * s)) : uint2{0, 0};
                }
                one_step(sums, codes, s, x, ones);
            }
            if (SPLIT || !BY_ROW) add_group(y, sums, p, cursor, group_of(chunk, sub), x_scale);
        }
    }
    if (!SPLIT && BY_ROW) add_group(y, sums, p, cursor, 0, 1.0f);
    if (SPLIT) sync_block();  // the staged columns make room
    float* parts = (float*)pool;
#pragma unroll
    for (int i = 0; i < VALUES; i++) parts[(warp * VALUES + i) * 32 + lane] = y[i];
    sync_block();
    add_and_write<SPLIT ? 1 : 2>(p, parts, first, token0);
}
