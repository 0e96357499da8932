// The product for many tokens. A block makes 16 * MT * ROW_WARPS rows by 8 * NT * TOKEN_WARPS tokens.
//
// x goes through shared memory, 128 bytes of each token at a time, STAGES of them under way at once (cp.async), so that all
// warps of the block share it; codes go from memory to registers, a chunk ahead. Along k the work may be cut in `splits`,
// whose sums partials.cu adds in order. The arithmetic is that of product16.cu and product8.cu:
//     y = sum_g scale * step * (sum_k code * x) + (scale * zero + offset) * (sum_k x)
// where the sums of x over each run of columns come from sums.cu, or, for few tokens, from a row of ones (SUMS 0).
//
// The loop over k is unrolled for a chunk and nearly without addresses to compute: issuing instructions is what limits it.
// Scales and sums of x are asked for when their run of columns begins and used when it ends.
//
// Constants besides those of product.cuh: INTEGER: x is int8 codes with a scale a token (rows.cu), else 16-bit;
// TOKEN_WARPS of the WARPS stand side by side along tokens, the others along rows; SUMS: whether x_sums is given;
// AHEAD: chunks whose codes are under way while one is multiplied; 0: a tile of the next one is asked for, into the same
// registers, when this one's is used up; BLOCKS of a multiprocessor.
#include "codes.cuh"
#include "stage.cuh"

constexpr int ROW_WARPS = WARPS / TOKEN_WARPS;
constexpr bool ZEROS = BITS < 8;                         // the level of code 0 is not 0, or there are offsets
// Steps that are unrolled: a chunk, or, to keep few registers, a part of one that holds several groups.
constexpr int LEAST = FLUSH > STAGE_STEPS ? FLUSH : STAGE_STEPS;
constexpr int RUN = GROUPS_IN_CHUNK > 1 ? LEAST : STEPS;
constexpr int RUN_TILES = RUN < FIELDS ? 0 : RUN / FIELDS;
constexpr u32 MAGIC = INTEGER && !BY_ROW ? 0x4b400000u : 0;  // 1.5 * 2^23: bits of it plus a small integer are a float

template <bool>
struct Kind { typedef float Sum; };
template <>
struct Kind<true> { typedef int Sum; };
typedef Kind<INTEGER>::Sum Sum;

struct Sums {
    Sum codes[MT][NT][4], ones[NT][4];
};

struct Group {  // of columns with one scale a row, as it is in memory
    RawPairs pairs[MT];
    float2 x[NT];
};

DEVICE float number(float sum) { return sum; }
DEVICE float number(int sum) { return MAGIC ? bits_to_float((u32)sum) - 12582912.0f : (float)sum; }

// One tensor-core product: into d, from `begin` at the first step of a run, so that nothing has to be cleared.
DEVICE void turn(float (&d)[4], uint4 a, u32 b0, u32 b1, const float (&begin)[4], bool first) {
    if (first) mma(d, a, b0, b1, begin);
    else mma(d, a, b0, b1, d);
}
DEVICE void turn(int (&d)[4], uint4 a, u32 b0, u32 b1, const int (&begin)[4], bool first) {
    if (first) mma(d, a, b0, b1, begin);
    else mma(d, a, b0, b1, d);
}

// A step of 16-bit x: the lane's eight activations are two turns of the tensor cores. x: the lane's in the first column tile.
DEVICE void multiply_step(float (&codes)[MT][NT][4], float (&ones)[NT][4], const Codes& held, int step, const uint4* x, u32 magic,
                          const float (&begin)[4], bool first) {
    uint4 a[2][MT];
#pragma unroll
    for (int i = 0; i < 2 * MT; i++) {
        const int field = step % FIELDS + i / MT * FIELDS;
        const uint4& word = held.word[i % MT][step / FIELDS];
        a[i / MT][i % MT] = {two_codes(word.x, field, magic), two_codes(word.y, field, magic), two_codes(word.z, field, magic),
                             two_codes(word.w, field, magic)};
    }
#pragma unroll
    for (int nt = 0; nt < NT; nt++) {
        const uint4 b = x[64 * nt];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const u32 b0 = word_of(b, 2 * half), b1 = word_of(b, 2 * half + 1);
#pragma unroll
            for (int mt = 0; mt < MT; mt++) turn(codes[mt][nt], a[half][mt], b0, b1, begin, first && half == 0);
            if (ZEROS && !SUMS) turn(ones[nt], {ONES, ONES, ONES, ONES}, b0, b1, begin, first && half == 0);
        }
    }
}

DEVICE void multiply_step(int (&codes)[MT][NT][4], int (&ones)[NT][4], const Codes& held, int step, const uint4* x, u32,
                          const int (&begin)[4], bool first) {
    const int field = step % FIELDS;
    uint4 a[MT];
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
        const uint4& word = held.word[mt][step / FIELDS];
        a[mt] = {four_codes(word.x, field), four_codes(word.y, field), four_codes(word.z, field), four_codes(word.w, field)};
    }
#pragma unroll
    for (int nt = 0; nt < NT; nt++) {
        const uint2 b = ((const uint2*)(x + 64 * nt))[threadIdx.x & 1];
#pragma unroll
        for (int mt = 0; mt < MT; mt++) turn(codes[mt][nt], a[mt], b.x, b.y, begin, first);
        if (ZEROS && !SUMS)
            turn(ones[nt], {0x01010101u, 0x01010101u, 0x01010101u, 0x01010101u}, b.x, b.y, begin, first);
    }
}

// The sums of x over run `run` of columns, of the lane's two tokens in each column tile.
DEVICE void read_sums(float2 (&x)[NT], const Product& p, int run, int m) {
    const float* at = p.x_sums + ((size_t)(u32)run * (u32)sums_width(p.tokens) + (u32)m);
#pragma unroll
    for (int nt = 0; nt < NT; nt++) x[nt] = read((const float2*)(at + 8 * nt));
}

DEVICE void read_group(Group& group, const Product& p, const Cursor& cursor, int chunk, int sub, int m) {
#pragma unroll
    for (int mt = 0; mt < MT; mt++) group.pairs[mt] = read_raw_pairs<true>(p, cursor, mt, group_of(chunk, sub));
    if (SUMS) read_sums(group.x, p, chunk * GROUPS_IN_CHUNK + sub, m);
}

// Codes of later runs to where those of run `run` were; behind them, what the cursor is at.
DEVICE void shift(Codes& codes, const Cursor& cursor, int run) {
    constexpr int BITS_OF_RUN = LOADS == 1 ? BITS * RUN % 8 : 0;
#pragma unroll
    for (int i = 0; i < MT * LOADS; i++) {
        uint4& word = codes.word[i / LOADS][i % LOADS];
        if (LOADS == 1) word = {word.x >> BITS_OF_RUN, word.y >> BITS_OF_RUN, word.z >> BITS_OF_RUN, word.w >> BITS_OF_RUN};
        else if (i % LOADS + RUN_TILES < LOADS) word = codes.word[i / LOADS][(i + RUN_TILES) % LOADS];
        else word = read_once_late(cursor.codes[i / LOADS] + 32 * (i % LOADS + RUN_TILES - LOADS + run * RUN_TILES));
    }
}

DEVICE void add_group(float (&y)[MT][NT][4], const Sums& sums, const Product& p, const Group& group) {
    float step[MT][2], zero[MT][2];
#pragma unroll
    for (int i = 0; i < 2 * MT; i++) {
        Pairs pairs = pairs_of(group.pairs[i / 2]);
        step[i / 2][i % 2] = pairs.scale[i % 2] * p.level_step;
        zero[i / 2][i % 2] = pairs.scale[i % 2] * p.level_zero + pairs.offset[i % 2];
    }
#pragma unroll
    for (int nt = 0; nt < NT; nt++) {
        float2 x = {0, 0};
        if (ZEROS) x = SUMS ? group.x[nt] : float2{number(sums.ones[nt][0]), number(sums.ones[nt][1])};
#pragma unroll
        for (int i = 0; i < 4 * MT; i++) {
            int mt = i / 4, c = i % 4, rh = c / 2;
            y[mt][nt][c] += step[mt][rh] * number(sums.codes[mt][nt][c]);
            if (ZEROS) y[mt][nt][c] += zero[mt][rh] * (c % 2 ? x.y : x.x);
        }
    }
}

// A split writes its float32 sums (splits, M, N); a product in one piece writes out.
DEVICE void write_sums(const float (&y)[MT][NT][4], const Product& p, int first, int m0, int split) {
    const int row = threadIdx.x >> 2;
#pragma unroll
    for (int i = 0; i < MT * NT * 4; i++) {
        int mt = i / (4 * NT), nt = i / 4 % NT, c = i % 4;
        int n = (first + mt) * 16 + row + c / 2 * 8, m = m0 + 8 * nt + c % 2;
        if (n >= p.rows || m >= p.tokens) continue;
        float sum = y[mt][nt][c];
        if (p.splits > 1) {
            write((float*)p.out + ((size_t)split * p.tokens + m) * p.rows + n, sum);
            continue;
        }
        if (p.x_scale) sum *= read(p.x_scale + m);
        if (p.bias) sum += read_number(p.bias, n);
        write_number(p.out, (size_t)m * p.rows + n, sum);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) gemm(const Product p) {
    __shared__ uint4 staged[STAGES * STAGE];
    let_next_begin();
    const int token_blocks = (p.tokens + TOKENS - 1) / TOKENS, row_blocks = (p.row_tiles + MT * ROW_WARPS - 1) / (MT * ROW_WARPS);
    const int token0 = (int)blockIdx.x % token_blocks * TOKENS, rest = (int)blockIdx.x / token_blocks;
    const int split = rest / row_blocks, warp = threadIdx.y, token = warp % TOKEN_WARPS * 8 * NT;
    const int first = (rest % row_blocks * ROW_WARPS + warp / TOKEN_WARPS) * MT, m = token0 + token + 2 * (threadIdx.x & 3);
    const int each = (p.chunks + p.splits - 1) / p.splits, begin = split * each;
    const int end = begin + each < p.chunks ? begin + each : p.chunks;
    const int lane = place(token + (threadIdx.x >> 2), INTEGER ? threadIdx.x >> 1 & 1 : threadIdx.x & 3);
    const u32 magic = kept(p, HALF ? 0x64006400u : 0x43004300u);
    const Sum origin[4] = {(Sum)opaque(MAGIC), (Sum)opaque(MAGIC), (Sum)opaque(MAGIC), (Sum)opaque(MAGIC)};
    float y[MT][NT][4] = {};
    Sums sums = {};
    Group group = {};
    Codes codes, next[AHEAD + 1];
    Cursor cursor = start(p, first, begin, threadIdx.x);
    if (AHEAD) read_chunk(codes, cursor, begin + 1 < end);
#pragma unroll
    for (int i = 0; i < AHEAD; i++) read_chunk(next[i], cursor, begin + 2 + i < end);
    wait_for_inputs();
    Copier copy = copier(p, token0, begin, end);
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        fetch(copy, staged + s * STAGE);
        commit_async();
    }
    if (!AHEAD) read_chunk<true>(codes, cursor, begin + 1 < end);  // so many that they would spill before that
    int slot = 0, vacant = (STAGES - 1) * STAGE;
    for (int chunk = begin; chunk < end; chunk++) {
#pragma unroll (RUN < STEPS ? 1 : STEPS / RUN)
        for (int run = 0; run < STEPS / RUN; run++) {
#pragma unroll
            for (int step = 0; step < RUN; step++) {
                const bool begins = !BY_ROW && step % FLUSH == 0;
                if (step % STAGE_STEPS == 0) {
                    wait_async<STAGES - 2>();
                    sync_block();  // this stage is here for all, and the one before it is read: its place is free
                    fetch(copy, staged + vacant);
                    commit_async();
                }
                if (begins) read_group(group, p, cursor, chunk, run * (RUN / FLUSH) + step / FLUSH, m);
                const uint4* x = staged + slot + (lane ^ STEP_PIECES * (step % STAGE_STEPS));
                multiply_step(sums.codes, sums.ones, codes, step, x, magic, origin, begins);
                if (!AHEAD && RUN == STEPS && (step + 1) % FIELDS == 0) read_tile<true>(codes, cursor, step / FIELDS);
                if (!BY_ROW && (step + 1) % FLUSH == 0) add_group(y, sums, p, group);
                if ((step + 1) % STAGE_STEPS) continue;
                vacant = slot;
                slot = slot + STAGE == STAGES * STAGE ? 0 : slot + STAGE;
            }
            if (RUN < STEPS) shift(codes, cursor, run);
        }
        if (AHEAD) {
            codes = next[0];
#pragma unroll
            for (int i = 1; i < AHEAD; i++) next[i - 1] = next[i];
            read_chunk<true>(next[AHEAD ? AHEAD - 1 : 0], cursor, chunk + AHEAD + 2 < end);
        } else {
            go_on(cursor, chunk + 2 < end);
        }
        if (SUMS && BY_ROW) {
            float2 some[NT];
            read_sums(some, p, chunk, m);
#pragma unroll
            for (int nt = 0; nt < NT; nt++) group.x[nt].x += some[nt].x, group.x[nt].y += some[nt].y;
        }
    }
    wait_async<0>();  // nothing is on its way to a block that has ended
    if (BY_ROW) {
#pragma unroll
        for (int mt = 0; mt < MT; mt++) group.pairs[mt] = read_raw_pairs<true>(p, cursor, mt, 0);
        add_group(y, sums, p, group);
    }
    write_sums(y, p, first, m, split);
}
