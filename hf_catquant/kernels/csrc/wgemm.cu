// The product for many tokens on Hopper. A warp group makes 64 * MT rows by 8 * NT tokens; while the tensor cores are at its
// products, it and others scale sums that are done, make codes numbers, and read on.
//
// x comes arranged (arrange.cu) through shared memory, a unit of 128 columns at a time, for all warp groups of the block: one
// thread has units copied, STAGES - 2 ahead, and nobody waits for anybody but for copies. Codes and scales go from memory to
// registers, a chunk ahead. Along k the work may be cut in `splits`, whose sums partials.cu adds in order. The arithmetic is
// that of gemm.cu, scaled after every unit:
//     y = sum_g scale * step * (sum_k code * x) + (scale * zero + offset) * (sum_k x)
//
// Constants besides those of product.cuh (MT is 1 or 2, WARPS a multiple of 4, GROUP_STEPS 0 or one): INTEGER: x is int8
// codes with a scale a token, else 16-bit; STAGES; BLOCKS of a multiprocessor.
#include "wgmma.cuh"

constexpr int TOKENS = 8 * NT;
constexpr int SLABS = INTEGER ? 1 : 2;             // of 128 bytes a token, in a unit
constexpr int SLAB = 8 * TOKENS, STAGE = SLABS * SLAB;  // in pieces of 16 bytes
constexpr int SUM_PIECES = TOKENS / 4;             // of sums of x, in a unit
constexpr int UNITS = CHUNK / 128;                 // in a chunk
constexpr int SLAB_STEPS = 4 / SLABS;              // of 32 columns
constexpr bool ZEROS = BITS < 8;                   // the level of code 0 is not 0, or there are offsets
constexpr int SIZE = TYPE == 2 ? 4 : 2;            // bytes of a result
constexpr int ROWS = 16 * MT * WARPS, PITCH = ROWS + 8;  // of a token's results in shared memory
constexpr int STAGED = STAGES * (STAGE + SUM_PIECES), RESULTS = TOKENS * PITCH * SIZE / 16;
constexpr int HELD = STAGED > RESULTS ? STAGED : RESULTS;

template <bool>
struct Kind { typedef float Sum; };
template <>
struct Kind<true> { typedef int Sum; };
typedef Kind<INTEGER>::Sum Sum;

// Brings units of x, one after another, each to the slot after the last one's.
struct Bringer {
    const uint4* x;
    const float* sums;
    int unit, end, slot, round;
};

DEVICE Bringer bringer(const Product& p, int token0, int unit, int end) {
    const size_t units = (size_t)(u32)p.chunks * UNITS, before = (size_t)(u32)(token0 / TOKENS) * units + (u32)unit;
    const float* sums = p.x_sums + (size_t)(u32)unit * (u32)sums_width(p.tokens) + token0;
    return {(const uint4*)p.x + before * STAGE, sums, unit, end, 0, 0};
}

// The next unit, if there is one, to where nobody reads any more.
DEVICE void bring(Bringer& b, const Product& p, uint4* staged, Turnstile* full, Turnstile* empty) {
    if (b.unit >= b.end) return;
    if (b.round) wait_turn(empty + b.slot, b.round - 1 & 1);
    arrive_and_expect(full + b.slot, 16 * (STAGE + (ZEROS ? SUM_PIECES : 0)));
    copy_bulk(staged + b.slot * STAGE, b.x, 16 * STAGE, full + b.slot);
    if (ZEROS) copy_bulk(staged + STAGES * STAGE + b.slot * SUM_PIECES, b.sums, 16 * SUM_PIECES, full + b.slot);
    b.x += STAGE;
    b.sums += sums_width(p.tokens);
    b.unit++;
    if (++b.slot == STAGES) b.slot = 0, b.round++;
}

// Codes of a slab as the tensor cores take them, four products' worth.
DEVICE void numbers_of(uint4 (&a)[4], const uint4 (&word)[LOADS], int step, u32 magic) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int s = INTEGER ? step + i : step + i / 2, field = s % FIELDS + (INTEGER ? 0 : i % 2 * FIELDS);
        const uint4& w = word[s / FIELDS];
        if (INTEGER) a[i] = {four_codes(w.x, field), four_codes(w.y, field), four_codes(w.z, field), four_codes(w.w, field)};
        else a[i] = {two_codes(w.x, field, magic), two_codes(w.y, field, magic), two_codes(w.z, field, magic), two_codes(w.w, field, magic)};
    }
}

DEVICE void settle_all(Sum (&sums)[4 * NT]) {
#pragma unroll
    for (int i = 0; i < 4 * NT; i++) settle(sums[i]);
}

// y += what a unit adds to a lane's sums; x: the sums of x of the lane's tokens, 8 a column tile.
DEVICE void add_group(float (&y)[4 * NT], const Sum (&sums)[4 * NT], const Product& p, const RawPairs& raw, const float* x) {
    const Pairs pairs = pairs_of(raw);
    float step[2], zero[2];
#pragma unroll
    for (int rh = 0; rh < 2; rh++) {
        step[rh] = pairs.scale[rh] * p.level_step;
        zero[rh] = pairs.scale[rh] * p.level_zero + pairs.offset[rh];
    }
#pragma unroll
    for (int nt = 0; nt < NT; nt++) {
        const float2 of_x = ZEROS ? *(const float2*)(x + 8 * nt) : float2{0, 0};
#pragma unroll
        for (int c = 0; c < 4; c++) {
            float& sum = y[4 * nt + c];
            sum += step[c / 2] * (float)sums[4 * nt + c];
            if (ZEROS) sum += zero[c / 2] * (c % 2 ? of_x.y : of_x.x);
        }
    }
}

// Float32 sums of a split (splits, M, N), eight rows side by side.
DEVICE void write_sums(const float (&y)[MT][4 * NT], const Product& p, int tile, int m0, int split) {
#pragma unroll
    for (int i = 0; i < MT * NT * 4; i++) {
        const int c = i % 4, n = (tile + i / (4 * NT) * 4) * 16 + (int)(threadIdx.x >> 2) + c / 2 * 8;
        const int m = m0 + i / 4 % NT * 8 + 2 * (threadIdx.x & 3) + c % 2;
        if (n < p.rows && m < p.tokens) write((float*)p.out + ((size_t)split * p.tokens + m) * p.rows + n, y[i / (4 * NT)][i % (4 * NT)]);
    }
}

// The results of the block, by way of shared memory: there they lie as in memory, so that writes are wide.
DEVICE void write_block(const float (&y)[MT][4 * NT], const Product& p, uint4* staged, int tile, int first, int m0) {
    u8* held = (u8*)staged;
    constexpr int WIDE = 16 / SIZE;
#pragma unroll
    for (int i = 0; i < MT * NT * 4; i++) {
        const int c = i % 4, row = (tile - first + i / (4 * NT) * 4) * 16 + (int)(threadIdx.x >> 2) + c / 2 * 8, n = first * 16 + row;
        const int token = i / 4 % NT * 8 + 2 * (threadIdx.x & 3) + c % 2, m = m0 + token;
        float sum = y[i / (4 * NT)][i % (4 * NT)];
        if (p.x_scale) sum *= read(p.x_scale + (m < p.tokens ? m : p.tokens - 1));
        if (p.bias) sum += read_number(p.bias, n < p.rows ? n : p.rows - 1);
        const int at = token * PITCH + row;
        if (TYPE == 2) ((float*)held)[at] = sum;
        else ((u16*)held)[at] = (u16)(TYPE == 1 ? float_to_f16(sum) : float_to_bf16(sum));
    }
    sync_block();
    for (int i = threadIdx.y * 32 + threadIdx.x; i < TOKENS * (ROWS / WIDE); i += 32 * WARPS) {
        const int token = i / (ROWS / WIDE), row = i % (ROWS / WIDE) * WIDE, n = first * 16 + row, m = m0 + token;
        if (m >= p.tokens || n >= p.rows) continue;
        const u8* from = held + (token * PITCH + row) * SIZE;
        u8* to = (u8*)p.out + ((size_t)m * p.rows + n) * SIZE;
        if (p.rows % WIDE == 0) write((uint4*)to, *(const uint4*)from);
        else
            for (int j = 0; j < WIDE && n + j < p.rows; j++) {
                if (TYPE == 2) write((float*)to + j, ((const float*)from)[j]);
                else write((u16*)to + j, ((const u16*)from)[j]);
            }
    }
}

// The group that a unit belongs to.
DEVICE u32 group_of_unit(int unit) { return BY_ROW ? 0 : GROUP_STEPS > 4 ? unit / (GROUP_STEPS / 4) : unit; }

// The products of a unit: those of 64 rows after those of 64 others, a slab of x at a time.
DEVICE void multiply_unit(Sum (&sums)[MT][4 * NT], uint4 (&a)[2][4], const Codes& codes, int step, Operand x, u32 magic) {
#pragma unroll
    for (int i = 0; i < MT * SLABS; i++) {
        const int mt = i / SLABS, slab = i % SLABS;
        if (i > 1) wait_wgmma<1>();  // the registers of the product before the last one are read
        numbers_of(a[i % 2], codes.word[mt], step + slab * SLAB_STEPS, magic);
#pragma unroll
        for (int j = 0; j < 4; j++) settle(a[i % 2][j]);
        begin_wgmma();
#pragma unroll
        for (int j = 0; j < 4; j++) wgmma(sums[mt], a[i % 2][j], x + slab * SLAB + 2 * j, slab > 0 || j > 0);
        commit_wgmma();
    }
}

// Scales the sums of a unit, of the first 64 rows while the tensor cores may still be at the others'. All products end in
// their unit: ptxas makes each wait for the one before it if some are under way where a loop begins again.
DEVICE void add_unit(float (&y)[MT][4 * NT], Sum (&sums)[MT][4 * NT], const Product& p, const RawPairs (&pairs)[MT], const float* x) {
    wait_wgmma<(MT - 1) * SLABS>();
    settle_all(sums[0]);
    add_group(y[0], sums[0], p, pairs[0], x);
    if (MT == 1) return;
    wait_wgmma<0>();
    settle_all(sums[MT - 1]);
    add_group(y[MT - 1], sums[MT - 1], p, pairs[MT - 1], x);
}

// Where a warp begins: its tiles, and the pairs of its first group.
DEVICE Cursor start_of_group(const Product& p, int tile, int chunk) {
    Cursor cursor;
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
        const u32 mine = tile + 4 * mt < p.row_tiles ? tile + 4 * mt : p.row_tiles - 1;
        cursor.codes[mt] = p.tiles + ((size_t)mine * (u32)p.chunks + (u32)chunk) * (LOADS * 32) + threadIdx.x;
        cursor.pairs[mt] = mine * (u32)p.groups * 8 + (threadIdx.x >> 2);
    }
    return cursor;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) wgemm(const Product p) {
    DYNAMIC_SHARED(staged, HELD + STAGES);
    let_next_begin();
    Turnstile* const full = (Turnstile*)(staged + HELD);  // a unit has come
    Turnstile* const empty = full + STAGES;                // all warps have read it
    const int token_blocks = (p.tokens + TOKENS - 1) / TOKENS, row_blocks = (p.row_tiles + MT * WARPS - 1) / (MT * WARPS);
    const int token0 = (int)blockIdx.x % token_blocks * TOKENS, rest = (int)blockIdx.x / token_blocks;
    const int split = rest / row_blocks, first = rest % row_blocks * (MT * WARPS), q = threadIdx.x & 3;
    const int tile = first + threadIdx.y / 4 * (4 * MT) + threadIdx.y % 4;  // of the warp, in its group's first 64 rows
    const int each = (p.chunks + p.splits - 1) / p.splits, begin = split * each;
    const int end = begin + each < p.chunks ? begin + each : p.chunks;
    const bool brings = threadIdx.x == 0 && threadIdx.y == 0;
    if (brings) {
        for (int s = 0; s < STAGES; s++) make_turnstile(full + s, 1), make_turnstile(empty + s, WARPS);
        publish_turnstiles();
    }
    sync_block();
    const u32 magic = kept(p, HALF ? 0x64006400u : 0x43004300u);
    const Operand x = operand_of(staged);
    const float* staged_sums = (const float*)(staged + STAGES * STAGE) + 2 * q;
    float y[MT][4 * NT] = {};
    Sum sums[MT][4 * NT] = {};
    uint4 a[2][4];
    RawPairs pairs[MT], pairs_next[MT] = {};
    Codes codes, next;
    Cursor cursor = start_of_group(p, tile, begin);
#pragma unroll
    for (int mt = 0; mt < MT; mt++)
        if (begin < end) pairs_next[mt] = read_raw_pairs(p, cursor, mt, group_of_unit(begin * UNITS));
    read_codes<1>(next, cursor, begin < end);
    wait_for_inputs();
    Bringer more = bringer(p, token0, begin * UNITS, end * UNITS);
    if (brings)
        for (int s = 0; s < STAGES - 2; s++) bring(more, p, staged, full, empty);
    int slot = 0, turn = 0;
    for (int chunk = begin; chunk < end; chunk++) {
        codes = next;
        read_codes<1>(next, cursor, chunk + 1 < end);
#pragma unroll
        for (int sub = 0; sub < UNITS; sub++) {
            const int unit = chunk * UNITS + sub;
#pragma unroll
            for (int mt = 0; mt < MT; mt++) {
                pairs[mt] = pairs_next[mt];
                if (unit + 1 < end * UNITS) pairs_next[mt] = read_raw_pairs(p, cursor, mt, group_of_unit(unit + 1));
            }
            wait_turn(full + slot, turn);
            multiply_unit(sums, a, codes, 4 * sub % STEPS, x + slot * STAGE, magic);
            if (brings) bring(more, p, staged, full, empty);  // to where the unit before the last was
            sync_warp();
            add_unit(y, sums, p, pairs, staged_sums + slot * TOKENS);
            sync_warp();
            if (threadIdx.x == 0) arrive(empty + slot);
            if (++slot == STAGES) slot = 0, turn ^= 1;
        }
    }
    if (p.splits > 1) return write_sums(y, p, tile, token0, split);
    sync_block();  // what is staged is read, its place free
    write_block(y, p, staged, tile, first, token0);
}
