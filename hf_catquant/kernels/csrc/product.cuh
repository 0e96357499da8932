// What all products share: out[m, n] = sum_k x[m, k] * w_hat[n, k] + bias[n], with w_hat never written anywhere.
//
// Constants given by the caller:
//   BITS         of a code in a tile: 1, 2, 4 or 8
//   GROUP_STEPS  columns that share a scale, in steps of 32; 0: the whole row
//   SCALE32      scales are float32, not float16
//   TYPE         of out and bias, and of x where it is not codes: 0 bfloat16, 1 float16, 2 float32
//   MT           tiles of 16 rows that a block computes (gemm: a warp; wgemm: of 64 rows, a warp group)
//   NT           tiles of 8 columns of the tensor-core product: tokens
//   WARPS        of a block; with few tokens they take turns along k and add up at the end in a fixed order
//
// Weights are the A operand of the tensor cores: 256 or 512 of them an instruction, for 8 columns. A tile is 16 rows by
// TILE columns, 512 bytes, one 16-byte word group for each of 32 lanes. Lane 4 r + q holds, in its word 2 kp + rh, row
// r + 8 rh; byte i of it, bits BITS * s, is the column
//     32 s + 8 q + 4 (i % 2) + 2 kp + i / 2
// of the tile. So both the bytes of an 8-bit product and the 16-bit pairs of a 16-bit product come out with one mask, and
// the lane's eight activations of a step are adjacent in memory.
#pragma once
#include "numbers.cuh"

constexpr int TILE = 256 / BITS;
constexpr int CHUNK = TILE > 128 ? TILE : 128;  // columns of one turn of a warp
constexpr int LOADS = CHUNK / TILE;
constexpr int STEPS = CHUNK / 32;
constexpr int FIELDS = 8 / BITS;  // codes in a byte
constexpr bool BY_ROW = GROUP_STEPS == 0;
constexpr int FLUSH = BY_ROW || GROUP_STEPS > STEPS ? STEPS : GROUP_STEPS;  // steps that share a scale in a chunk
constexpr int GROUPS_IN_CHUNK = STEPS / FLUSH;
constexpr int CHUNKS_IN_GROUP = GROUP_STEPS > STEPS ? GROUP_STEPS / STEPS : 1;
constexpr u32 MASK = (1u << BITS) - 1;

struct Product {
    const uint4* tiles;    // [row tiles][chunks * LOADS][32]
    const void* scales;    // [row tiles][groups][8][2] pairs (scale, offset): rows r and r + 8 side by side
    const void* x;         // (M, columns), or codes (M, chunks * CHUNK) int8; of wgemm.cu as arrange.cu writes it
    const float* x_scale;  // (M), of codes
    const float* x_sums;   // (runs, M rounded up to 128), of gemm.cu
    const void* bias;      // (N) or null
    void* out;             // (M, N)
    int tokens, rows, columns, row_tiles, chunks, groups, splits;
    float level_step, level_zero;  // level = level_step * code + level_zero
};

struct Codes {
    uint4 word[MT][LOADS];
};

struct Pairs {  // scale and offset of a lane's two rows
    float scale[2], offset[2];
};

DEVICE u32 word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Where a lane of a warp reads next. Rows beyond the last tile read it again, and are not written.
struct Cursor {
    const uint4* codes[MT];
    u32 pairs[MT];  // index of (tile, group 0, row), in pairs of rows
};

DEVICE Cursor start(const Product& p, int first, int chunk, int lane) {
    Cursor cursor;
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
        u32 tile = first + mt < p.row_tiles ? first + mt : p.row_tiles - 1;
        cursor.codes[mt] = p.tiles + ((size_t)tile * (u32)p.chunks + (u32)chunk) * (LOADS * 32) + lane;
        cursor.pairs[mt] = tile * (u32)p.groups * 8 + (lane >> 2);
    }
    return cursor;
}

// The codes of the next chunk, if there is one, and on to the one that this warp turns to after it, TURN chunks on.
template <int TURN>
DEVICE void read_codes(Codes& codes, Cursor& cursor, bool there) {
    if (!there) return;
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
#pragma unroll
        for (int i = 0; i < LOADS; i++) codes.word[mt][i] = read_once(cursor.codes[mt] + 32 * i);
        cursor.codes[mt] += TURN * LOADS * 32;
    }
}

// Tile i of the chunk at the cursor; LATE: behind wait_for_inputs().
template <bool LATE = false>
DEVICE void read_tile(Codes& codes, const Cursor& cursor, int i) {
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
        const uint4* at = cursor.codes[mt] + 32 * i;
        codes.word[mt][i] = LATE ? read_once_late(at) : read_once(at);
    }
}

// To the next chunk, if there are more: else the last one is read again, for nothing, which costs less than asking.
DEVICE void go_on(Cursor& cursor, bool more) {
#pragma unroll
    for (int mt = 0; mt < MT; mt++) cursor.codes[mt] += more ? LOADS * 32 : 0;
}

template <bool LATE = false>
DEVICE void read_chunk(Codes& codes, Cursor& cursor, bool more) {
#pragma unroll
    for (int i = 0; i < LOADS; i++) read_tile<LATE>(codes, cursor, i);
    go_on(cursor, more);
}

template <bool>
struct Pair { typedef uint2 Raw; };
template <>
struct Pair<true> { typedef float4 Raw; };
typedef Pair<SCALE32>::Raw RawPairs;  // scale and offset of row r, then of row r + 8

template <bool LATE = false>
DEVICE RawPairs read_raw_pairs(const Product& p, const Cursor& cursor, int mt, u32 group) {
    const RawPairs* at = (const RawPairs*)p.scales + (size_t)(cursor.pairs[mt] + group * 8);
    return LATE ? read_weight_late(at) : read_weight(at);
}

DEVICE Pairs pairs_of(float4 v) { return {{v.x, v.z}, {v.y, v.w}}; }
DEVICE Pairs pairs_of(uint2 v) {
    return {{f16_to_float(v.x & 0xffff), f16_to_float(v.y & 0xffff)}, {f16_to_float(v.x >> 16), f16_to_float(v.y >> 16)}};
}

DEVICE Pairs read_pairs(const Product& p, const Cursor& cursor, int mt, u32 group) {
    return pairs_of(read_raw_pairs(p, cursor, mt, group));
}

// Tokens that x_sums has room for: whole blocks of gemm.cu, so that it need not ask where they end.
DEVICE int sums_width(int tokens) { return (tokens + 127) & ~127; }

// A constant that the compiler does not know, so that it stays in a register: instructions take one constant at most.
DEVICE u32 kept(const Product& p, u32 value) { return value + ((u32)p.tokens >> 31); }

DEVICE int group_of(int chunk, int sub) {
    return BY_ROW ? 0 : GROUPS_IN_CHUNK > 1 ? chunk * GROUPS_IN_CHUNK + sub : chunk / CHUNKS_IN_GROUP;
}

// Adds what the warps found, first warp first, and writes it: parts[warp][VALUES of a lane][lane], where row r of the block
// and token t of its TOKENS_OF_BLOCK are at place(r, t) of a warp's.
template <int VALUES, int TOKENS_OF_BLOCK, typename Where>
DEVICE void add_and_write(const Product& p, const float* parts, int first, int token0, Where place) {
    for (int e = threadIdx.y * 32 + threadIdx.x; e < 16 * MT * TOKENS_OF_BLOCK; e += WARPS * 32) {
        const int r = e % (16 * MT), t = e / (16 * MT), n = first * 16 + r, m = token0 + t;
        if (n >= p.rows || m >= p.tokens) continue;
        const float* at = parts + place(r, t);
        float sum = 0;
#pragma unroll
        for (int warp = 0; warp < WARPS; warp++) sum += at[warp * VALUES * 32];
        if (p.x_scale) sum *= read(p.x_scale + m);
        if (p.bias) sum += read_number(p.bias, n);
        write_number(p.out, (size_t)m * p.rows + n, sum);
    }
}

// The same of whole column tiles: a lane has two tokens of row r, then of row r + 8, for each of MT * NT tiles.
DEVICE void add_tiles_and_write(const Product& p, const float* parts, int first, int token0) {
    add_and_write<MT * NT * 4, 8 * NT>(p, parts, first, token0, [](int r, int t) {
        const int value = (r / 16 * NT + t / 8) * 4 + (r >> 3 & 1) * 2 + t % 2;
        return value * 32 + (r & 7) * 4 + t % 8 / 2;
    });
}
