// The product of a few tokens of 16-bit x, TOKENS of them (1, 2 or 4), in 8-bit integers on the tensor cores, exact within
// a group.
//
// For each token and chunk, x = x_scale * (128 high + low) with |128 high + low| <= 16256, low from 0 to 127: 15 bits of the
// chunk's largest value. high and low of a token are two of the eight columns of a tensor-core product. SHARED row tiles,
// so many that all columns are used, add to the same registers, each with columns of its own and zeros in those of the
// others: lane 4 r + q of a warp ends with the sums of tile q / TOKENS and token q % TOKENS, scales them alone, and
// needs SHARED times fewer registers.
//
// Codes stay where they are in a byte: those of field f count 2^(BITS f) too much, and have sums of their own, PLANES in
// all.
//
// A warp has AHEAD chunks of codes and scales under way: the registers of a tile are asked for again once it is multiplied.
// x of the next chunk is made ready beside the products of this one.
//
// Constants besides those of product.cuh: TOKENS; AHEAD: 1, 2 or 4; BLOCKS of a multiprocessor. NT is 1.
#include "product.cuh"

constexpr int SHARED = 4 / TOKENS;
constexpr int SETS = (MT + SHARED - 1) / SHARED;  // of row tiles that share registers
constexpr int PLANES = BITS == 8 ? 1 : BITS == 4 ? 2 : 4;
constexpr int PIECES = CHUNK / 128;          // a lane makes 4 values of each 128 ready
constexpr int STAGE_STRIDE = CHUNK / 4 + 8;  // words of a staged column; the 8 keep its readers on different banks
constexpr int COLUMNS = 2 * TOKENS + (SHARED > 1 ? 1 : 0);  // high and low of each token, and zeros
constexpr int STAGE = COLUMNS * STAGE_STRIDE;
constexpr int VALUES = SETS * 2, PARTS = WARPS * VALUES * 32;
constexpr int LARGEST = 127 * 128;
constexpr int TURNS = AHEAD == 1 ? 2 : AHEAD;  // chunks that the loop goes through at a time: stages take turns in twos
static_assert(TURNS % 2 == 0, "x of two chunks is staged in turn");
constexpr bool EARLY = GROUPS_IN_CHUNK <= 2;  // scales are asked for with their codes; more of them, when they are wanted

struct Weights {  // of a chunk
    uint4 word[MT][LOADS];
    RawPairs pairs[EARLY ? GROUPS_IN_CHUNK : 1][SETS];
};

struct Next {  // of what a lane asks for next
    const uint4* codes[MT];
    const RawPairs* pairs[SETS];  // of its tile of the set, of group 0
};

struct Raw {  // x of a chunk as it is in memory: two pairs of each 8 values
    u32 pair[TOKENS][PIECES][2];
};

struct Columns {  // where a lane finds what it multiplies with: its own column, and for each tile of a set that or zeros
    u32 own, of_tile[SHARED];  // in bytes from the start of shared memory
};

DEVICE u32 tile_or_last(const Product& p, u32 tile) { return tile < (u32)p.row_tiles ? tile : (u32)p.row_tiles - 1; }

DEVICE Next begin(const Product& p, int first, int warp, int lane) {
    Next next;
#pragma unroll
    for (int mt = 0; mt < MT; mt++)
        next.codes[mt] = p.tiles + ((size_t)tile_or_last(p, first + mt) * (u32)p.chunks + (u32)warp) * (LOADS * 32) + lane;
#pragma unroll
    for (int set = 0; set < SETS; set++) {
        const u32 tile = tile_or_last(p, first + set * SHARED + (lane & 3) / TOKENS);
        next.pairs[set] = (const RawPairs*)p.scales + (size_t)tile * (u32)p.groups * 8 + (lane >> 2);
    }
    return next;
}

DEVICE void read_tile(Weights& weights, Next& next, int mt) {
#pragma unroll
    for (int i = 0; i < LOADS; i++) weights.word[mt][i] = read_once(next.codes[mt] + 32 * i);
}

DEVICE RawPairs pairs_at(const Next& next, int set, u32 group) { return read_weight(next.pairs[set] + (size_t)(group * 8)); }

DEVICE void read_scales(Weights& weights, const Next& next, int set, int chunk) {
#pragma unroll
    for (int sub = 0; sub < GROUPS_IN_CHUNK; sub++) weights.pairs[sub][set] = pairs_at(next, set, group_of(chunk, sub));
}

DEVICE void go_on(Next& next) {
#pragma unroll
    for (int mt = 0; mt < MT; mt++) next.codes[mt] += WARPS * LOADS * 32;
}

// Codes at bits BITS * field of the bytes of a word, as four integers; 8-bit codes have 128 taken off, others are
// 2^(BITS * plane) times as large.
DEVICE u32 four_codes(u32 word, int field) {
    if (BITS == 8) return word ^ 0x80808080u;
    const int plane = field % PLANES;
    return word >> BITS * (field - plane) & (MASK << BITS * plane) * 0x01010101u;
}

// Adds the products of steps `from` up to `from` + FLUSH of the tile's codes with x.
DEVICE void multiply_tile(int (&sums)[PLANES][4], const uint4 (&tile)[LOADS], const u32* x, int from) {
#pragma unroll
    for (int step = from; step < from + FLUSH; step++) {
        const int field = step % FIELDS;
        const uint4& word = tile[step / FIELDS];
        const uint4 a = {four_codes(word.x, field), four_codes(word.y, field), four_codes(word.z, field),
                         four_codes(word.w, field)};
        const uint2 b = *(const uint2*)(x + 8 * step);
        if (BITS == 8) mma_s8s8(sums[0], a, b.x, b.y);
        else mma_u8s8(sums[field % PLANES], a, b.x, b.y);
    }
}

// The sum of the lane's token over steps `from` up to `from` + FLUSH: a row of ones.
DEVICE float sum_of_x(const u32* x, u32 ones, int from) {
    int sums[4] = {};
#pragma unroll
    for (int step = from; step < from + FLUSH; step++) {
        const uint2 b = *(const uint2*)(x + 8 * step);
        mma_u8s8(sums, {ones, ones, ones, ones}, b.x, b.y);
    }
    return (float)(128 * sums[0] + sums[1]);
}

// y += scale * sum_k level * x + offset * sum_k x, of rows r and r + 8.
DEVICE void add_group(float* y, const int (&sums)[PLANES][4], RawPairs raw, float x_sum, float x_scale, const Product& p) {
    const Pairs pairs = pairs_of(raw);
#pragma unroll
    for (int rh = 0; rh < 2; rh++) {
        int product = 0;
#pragma unroll
        for (int plane = 0; plane < PLANES; plane++)
            product += (128 * sums[plane][2 * rh] + sums[plane][2 * rh + 1]) >> BITS * plane;
        float levels = p.level_step * (float)product;
        if (BITS < 8) levels += p.level_zero * x_sum;
        y[rh] += pairs.scale[rh] * (x_scale * levels);
        if (BITS < 8) y[rh] += pairs.offset[rh] * (x_scale * x_sum);
    }
}

DEVICE void read_raw(Raw& raw, const Product& p, const u16* at, int token0, int k) {
#pragma unroll
    for (int t = 0; t < TOKENS; t++)
#pragma unroll
        for (int b = 0; b < PIECES; b++) {
            const bool there = (t == 0 || token0 + t < p.tokens) && k + 128 * b < p.columns;
            const u32* from = (const u32*)(at + (size_t)((u32)t * (u32)p.columns) + 128 * b);
            raw.pair[t][b][0] = read_or_zero(from, there);
            raw.pair[t][b][1] = read_or_zero(from + 2, there);
        }
}

DEVICE float low_of(u32 pair) { return TYPE == 1 ? f16_to_float(pair & 0xffff) : bits_to_float(pair << 16); }
DEVICE float high_of(u32 pair) { return TYPE == 1 ? f16_to_float(pair >> 16) : bits_to_float(pair & 0xffff0000u); }

// The largest size among the warp's values: without a sign the bits are in order, and NaN is the largest.
DEVICE float largest(const u32 (&pair)[PIECES][2]) {
    u32 most = 0;
#pragma unroll
    for (int i = 0; i < 2 * PIECES; i++) {
        const u32 high = pair[i / 2][i % 2] << 1, low = pair[i / 2][i % 2] << 17;  // what is below 15 bits is of no account
        most = most > high ? most : high;
        most = most > low ? most : low;
    }
    most = warp_max(most);
    return TYPE == 1 ? f16_to_float(most >> 17) : bits_to_float(most >> 1 & 0x7fff0000u);
}

// Writes the high and low bytes of a token's chunk to its two staged columns; returns x_scale.
DEVICE float stage_token(u32* columns, const u32 (&pair)[PIECES][2]) {
    const float x_scale = largest(pair) * (1.0f / LARGEST);
    const float inverse = x_scale < 1e-34f ? 0.0f : reciprocal(x_scale);
#pragma unroll
    for (int b = 0; b < PIECES; b++) {
        u32 value[4];  // integers below the mantissa of 1.5 * 2^23, in the order of the bytes of a word: 0 4 1 5 or 2 6 3 7
#pragma unroll
        for (int i = 0; i < 4; i++)
            value[i] = float_to_bits((i & 2 ? high_of(pair[b][i & 1]) : low_of(pair[b][i & 1])) * inverse + 12582912.0f);
        const u32 front = byte_permute(value[0], value[1], 0x5410), back = byte_permute(value[2], value[3], 0x5410);
        columns[32 * b] = byte_permute(front << 1, back << 1, 0x7531);
        columns[STAGE_STRIDE + 32 * b] = byte_permute(front, back, 0x6420) & 0x7f7f7f7fu;
    }
    return x_scale;
}

// All tokens; returns the x_scale of the lane's.
DEVICE float stage_tokens(u32* stage, const Raw& raw, int token) {
    float x_scale = 0;
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        const float scale = stage_token(stage + 2 * t * STAGE_STRIDE, raw.pair[t]);
        x_scale = t == token ? scale : x_scale;
    }
    return x_scale;
}

// Columns 2 c and 2 c + 1 of a product are token c % TOKENS, for the lanes of tile c / TOKENS.
DEVICE Columns columns_of(u32 stage, int lane) {
    const int pair = lane >> 3, high_or_low = lane >> 2 & 1, inside = 2 * (lane & 3);
    const u32 own = 4 * (stage + (2 * (pair % TOKENS) + high_or_low) * STAGE_STRIDE + inside);
    const u32 zeros = 4 * (stage + (COLUMNS - 1) * STAGE_STRIDE + inside);
    Columns columns;
    columns.own = opaque(own);  // not to be found out again and again
#pragma unroll
    for (int s = 0; s < SHARED; s++) columns.of_tile[s] = opaque(pair / TOKENS == s ? own : zeros);
    return columns;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) split8(const Product p) {
    __shared__ uint2 pool[(WARPS * 2 * STAGE > PARTS ? WARPS * 2 * STAGE : PARTS) / 2];
    let_next_begin();
    const int lane = threadIdx.x, warp = threadIdx.y, token = (lane & 3) % TOKENS;
    const int first = blockIdx.x * MT, token0 = blockIdx.y * TOKENS;
    const Columns columns = columns_of(warp * 2 * STAGE, lane);
    char* const shared = (char*)pool;
    u32* const stage = (u32*)(shared + opaque(4 * (warp * 2 * STAGE + lane)));
    const u32 ones = kept(p, 0x01010101u);
    float y[SETS][2] = {};
    Weights held[AHEAD];
    RawPairs of_row[SETS];
    Raw raw;
    Next next = begin(p, first, warp, lane);
#pragma unroll
    for (int slot = 0; slot < AHEAD; slot++) {
        const int chunk = warp + slot * WARPS;
        if (chunk < p.chunks) {
#pragma unroll
            for (int mt = 0; mt < MT; mt++) read_tile(held[slot], next, mt);
#pragma unroll
            for (int set = 0; set < SETS; set++)
                if (EARLY && !BY_ROW) read_scales(held[slot], next, set, chunk);
        }
        go_on(next);
    }
    if (BY_ROW)
#pragma unroll
        for (int set = 0; set < SETS; set++) of_row[set] = pairs_at(next, set, 0);
    if (SHARED > 1)
#pragma unroll
        for (int i = 0; i < 2 * PIECES; i++) stage[i % 2 * STAGE + (COLUMNS - 1) * STAGE_STRIDE + i / 2 * 32] = 0;
    sync_warp();
    wait_for_inputs();
    int k = warp * CHUNK + 8 * (lane >> 1) + 2 * (lane & 1);
    const u16* x_at = (const u16*)p.x + (size_t)((u32)token0 * (u32)p.columns) + k;
    read_raw(raw, p, x_at, token0, k);
    float x_scale = stage_tokens(stage, raw, token);
    read_raw(raw, p, x_at + WARPS * CHUNK, token0, k + WARPS * CHUNK);
    for (int chunk = warp; chunk < p.chunks;) {
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
            if (turn > 0 && chunk >= p.chunks) break;
            Weights& now = held[turn % AHEAD];
            const u32 staged = turn % 2 * STAGE;
            const bool more = chunk + AHEAD * WARPS < p.chunks;
            sync_warp();  // this chunk's x is there for all lanes, and the one before it is read
            const float next_scale = stage_tokens(stage + STAGE - staged, raw, token);
            k += WARPS * CHUNK;
            x_at += WARPS * CHUNK;
            read_raw(raw, p, x_at + WARPS * CHUNK, token0, k + WARPS * CHUNK);
            float x_sum[GROUPS_IN_CHUNK] = {};
            const u32* const own = (const u32*)(shared + columns.own) + staged;
            if (BITS < 8)
#pragma unroll
                for (int sub = 0; sub < GROUPS_IN_CHUNK; sub++) x_sum[sub] = sum_of_x(own, ones, sub * FLUSH);
#pragma unroll
            for (int set = 0; set < SETS; set++) {
#pragma unroll
                for (int sub = 0; sub < GROUPS_IN_CHUNK; sub++) {
                    int sums[PLANES][4] = {};
                    RawPairs pairs = BY_ROW ? of_row[set] : now.pairs[EARLY ? sub : 0][set];
                    if (!BY_ROW && !EARLY) pairs = pairs_at(next, set, group_of(chunk, sub));
#pragma unroll
                    for (int s = 0; s < SHARED; s++) {
                        const int mt = set * SHARED + s;
                        if (mt >= MT) continue;
                        multiply_tile(sums, now.word[mt], (const u32*)(shared + columns.of_tile[s]) + staged, sub * FLUSH);
                        if (sub == GROUPS_IN_CHUNK - 1 && more) read_tile(now, next, mt);
                    }
                    add_group(y[set], sums, pairs, x_sum[sub], x_scale, p);
                }
                if (EARLY && !BY_ROW && more) read_scales(now, next, set, chunk + AHEAD * WARPS);
            }
            x_scale = next_scale;
            go_on(next);
            chunk += WARPS;
        }
    }
    sync_block();  // the staged columns make room
    float* parts = (float*)pool;
#pragma unroll
    for (int i = 0; i < VALUES; i++) parts[(warp * VALUES + i) * 32 + lane] = y[i / 2][i % 2];
    sync_block();
    add_and_write<VALUES, TOKENS>(p, parts, first, token0, [](int r, int t) {
        const int mt = r / 16, value = mt / SHARED * 2 + (r >> 3 & 1);
        return value * 32 + (r & 7) * 4 + mt % SHARED * TOKENS + t;
    });
}
