// The product for many tokens. A block makes 16 * MT * ROW_WARPS rows by 8 * NT * TOKEN_WARPS tokens.
//
// x goes through shared memory, 128 bytes of each token at a time, STAGES of them under way at once (cp.async), so that all
// warps of the block share it; codes go from memory to registers, a chunk ahead. Along k the work may be cut in `splits`,
// whose sums partials.cu adds in order. The arithmetic is that of product16.cu and product8.cu:
//     y = sum_g scale * step * (sum_k code * x) + (scale * zero + offset) * (sum_k x)
// where the sums of x over each run of columns come from sums.cu, or, for few tokens, from a row of ones (SUMS 0).
//
// Constants besides those of product.cuh: INTEGER: x is int8 codes with a scale a token (rows.cu), else 16-bit;
// TOKEN_WARPS of the WARPS stand side by side along tokens, the others along rows; SUMS: whether x_sums is given.
#include "codes.cuh"

constexpr int ROW_WARPS = WARPS / TOKEN_WARPS;
constexpr int TOKENS = 8 * NT * TOKEN_WARPS;
constexpr int STAGE_STEPS = INTEGER ? 4 : 2;  // 128 bytes a token
constexpr int STAGE_COLUMNS = 32 * STAGE_STEPS;
constexpr int STAGES_IN_CHUNK = CHUNK / STAGE_COLUMNS;
constexpr int STAGES = TOKENS > 64 ? 3 : 4;  // at most 48 KB
constexpr u32 MAGIC = INTEGER && !BY_ROW ? 0x4b400000u : 0;  // 1.5 * 2^23: bits of it plus a small integer are a float

template <bool>
struct Kind { typedef float Sum; };
template <>
struct Kind<true> { typedef int Sum; };
typedef Kind<INTEGER>::Sum Sum;

struct Sums {
    Sum codes[MT][NT][4], ones[SUMS ? 1 : NT][4];
    float x[SUMS && BY_ROW ? NT : 1][2];
};

DEVICE void clear(Sums& sums) {
#pragma unroll
    for (int i = 0; i < 4 * NT; i++) {
        if (!SUMS) sums.ones[SUMS ? 0 : i / 4][i % 4] = 0;
#pragma unroll
        for (int mt = 0; mt < MT; mt++) sums.codes[mt][i / 4][i % 4] = (Sum)MAGIC;
    }
}

DEVICE float number(float sum) { return sum; }
DEVICE float number(int sum) { return MAGIC ? bits_to_float((u32)sum) - 12582912.0f : (float)sum; }

// Where piece `piece` of 16 bytes of a token lies in a stage, so that lanes that read at once use different banks.
DEVICE int place(int token, int piece) {
    return 8 * token + (piece ^ (INTEGER ? (token & 3) << 1 : (token & 1) << 2));
}

DEVICE void fetch(uint4* stage, const Product& p, int token0, int first_column) {
    constexpr int BYTES = INTEGER ? 1 : 2;
    const int width = INTEGER ? p.chunks * CHUNK : p.columns;
    for (int i = threadIdx.y * 32 + threadIdx.x; i < 8 * TOKENS; i += 32 * WARPS) {
        int token = i / 8, piece = i % 8, k = first_column + piece * (16 / BYTES);
        bool there = token0 + token < p.tokens && k < width;
        const char* at = (const char*)p.x + (there ? ((size_t)(token0 + token) * width + k) * BYTES : 0);
        copy_async(stage + place(token, piece), at, there);
    }
}

// A step of 16-bit x: the lane's eight activations are two turns of the tensor cores.
DEVICE void multiply_step(float (&codes)[MT][NT][4], float (&ones)[SUMS ? 1 : NT][4], const Codes& held, int step, const uint4* stage, int token, u32 magic) {
    const int row = threadIdx.x >> 2, q = threadIdx.x & 3;
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
        const uint4 x = stage[place(token + row + 8 * nt, step % STAGE_STEPS * 4 + q)];
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int mt = 0; mt < MT; mt++) mma(codes[mt][nt], a[half][mt], word_of(x, 2 * half), word_of(x, 2 * half + 1));
            if (BITS < 8 && !SUMS)
                mma(ones[SUMS ? 0 : nt], {ONES, ONES, ONES, ONES}, word_of(x, 2 * half), word_of(x, 2 * half + 1));
        }
    }
}

DEVICE void multiply_step(int (&codes)[MT][NT][4], int (&ones)[SUMS ? 1 : NT][4], const Codes& held, int step, const uint4* stage, int token, u32) {
    const int row = threadIdx.x >> 2, q = threadIdx.x & 3, field = step % FIELDS;
    uint4 a[MT];
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
        const uint4& word = held.word[mt][step / FIELDS];
        a[mt] = {four_codes(word.x, field), four_codes(word.y, field), four_codes(word.z, field), four_codes(word.w, field)};
    }
#pragma unroll
    for (int nt = 0; nt < NT; nt++) {
        const uint2 x = ((const uint2*)(stage + place(token + row + 8 * nt, step % STAGE_STEPS * 2 + (q >> 1))))[q & 1];
#pragma unroll
        for (int mt = 0; mt < MT; mt++) {
            if (BITS == 8) mma_s8s8(codes[mt][nt], a[mt], x.x, x.y);
            else mma_u8s8(codes[mt][nt], a[mt], x.x, x.y);
        }
        if (BITS < 8 && !SUMS) mma_u8s8(ones[SUMS ? 0 : nt], {0x01010101u, 0x01010101u, 0x01010101u, 0x01010101u}, x.x, x.y);
    }
}

// The sums of x over run `run` of columns, of the lane's two tokens of column tile nt: (runs, tokens, rounded up to 2).
DEVICE float2 read_sums(const Product& p, int run, int m) {
    if (m >= p.tokens) return {0, 0};
    return read((const float2*)(p.x_sums + (size_t)run * (u32)((p.tokens + 1) & ~1) + (u32)m));
}

DEVICE void add_group(float (&y)[MT][NT][4], const Sums& sums, const Product& p, const Cursor& cursor, u32 group, int run, int m) {
    float step[MT][2], zero[MT][2];
#pragma unroll
    for (int i = 0; i < 2 * MT; i++) {
        Pairs pairs = read_pairs(p, cursor, i / 2, group);
        step[i / 2][i % 2] = pairs.scale[i % 2] * p.level_step;
        zero[i / 2][i % 2] = pairs.scale[i % 2] * p.level_zero + pairs.offset[i % 2];
    }
#pragma unroll
    for (int nt = 0; nt < NT; nt++) {
        float2 x = {0, 0};
        if (BITS < 8 && !SUMS) x = {(float)sums.ones[SUMS ? 0 : nt][0], (float)sums.ones[SUMS ? 0 : nt][1]};
        else if (BITS < 8 && BY_ROW) x = {sums.x[SUMS && BY_ROW ? nt : 0][0], sums.x[SUMS && BY_ROW ? nt : 0][1]};
        else if (BITS < 8) x = read_sums(p, run, m + 8 * nt);
#pragma unroll
        for (int i = 0; i < 4 * MT; i++) {
            int mt = i / 4, c = i % 4, rh = c / 2;
            y[mt][nt][c] += step[mt][rh] * number(sums.codes[mt][nt][c]);
            if (BITS < 8) y[mt][nt][c] += zero[mt][rh] * (c % 2 ? x.y : x.x);
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

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) gemm(const Product p) {
    __shared__ uint4 staged[STAGES][8 * TOKENS];
    const int token_blocks = (p.tokens + TOKENS - 1) / TOKENS, row_blocks = (p.row_tiles + MT * ROW_WARPS - 1) / (MT * ROW_WARPS);
    const int token0 = (int)blockIdx.x % token_blocks * TOKENS, rest = (int)blockIdx.x / token_blocks;
    const int split = rest / row_blocks, warp = threadIdx.y, token = warp % TOKEN_WARPS * 8 * NT;
    const int first = (rest % row_blocks * ROW_WARPS + warp / TOKEN_WARPS) * MT, m = token0 + token + 2 * (threadIdx.x & 3);
    const int each = (p.chunks + p.splits - 1) / p.splits, begin = split * each;
    const int end = begin + each < p.chunks ? begin + each : p.chunks, stages = (end - begin) * STAGES_IN_CHUNK;
    const u32 magic = kept(p, HALF ? 0x64006400u : 0x43004300u);
    float y[MT][NT][4] = {};
    Sums sums;
    Codes codes, next;
    Cursor cursor = start(p, first, begin, threadIdx.x);
    clear(sums);
#pragma unroll
    for (int nt = 0; nt < (SUMS && BY_ROW ? NT : 1); nt++) sums.x[nt][0] = sums.x[nt][1] = 0;
    read_codes<1>(next, cursor, begin < end);
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < stages) fetch(staged[s], p, token0, begin * CHUNK + s * STAGE_COLUMNS);
        commit_async();
    }
    int stage = 0, slot = 0;  // stage modulo STAGES
    for (int chunk = begin; chunk < end; chunk++) {
        codes = next;
        read_codes<1>(next, cursor, chunk + 1 < end);
#pragma unroll
        for (int part = 0; part < STAGES_IN_CHUNK; part++) {
            wait_async<STAGES - 2>();
            sync_block();  // this stage is here for all, and the one before it is read: its place is free
            const int ahead = stage + STAGES - 1;
            if (ahead < stages) fetch(staged[slot == 0 ? STAGES - 1 : slot - 1], p, token0, begin * CHUNK + ahead * STAGE_COLUMNS);
            commit_async();
#pragma unroll
            for (int i = 0; i < STAGE_STEPS; i++) {
                const int step = part * STAGE_STEPS + i;
                multiply_step(sums.codes, sums.ones, codes, step, staged[slot], token, magic);
                if (BY_ROW || (step + 1) % FLUSH) continue;
                const int sub = step / FLUSH;
                add_group(y, sums, p, cursor, group_of(chunk, sub), chunk * GROUPS_IN_CHUNK + sub, m);
                clear(sums);
            }
            stage++;
            slot = slot + 1 == STAGES ? 0 : slot + 1;
        }
        if (SUMS && BY_ROW && BITS < 8)
#pragma unroll
            for (int nt = 0; nt < NT; nt++) {
                float2 v = read_sums(p, chunk, m + 8 * nt);
                sums.x[SUMS && BY_ROW ? nt : 0][0] += v.x, sums.x[SUMS && BY_ROW ? nt : 0][1] += v.y;
            }
    }
    if (BY_ROW) add_group(y, sums, p, cursor, 0, 0, m);
    write_sums(y, p, first, m, split);
}
