// The product for many tokens on Hopper. A warp group makes 64 * MT rows by 8 * NT tokens.
//
// x comes arranged (arrange.cu) through shared memory, a stage of two units of 128 columns at a time, for all warp groups of
// the block: one thread has stages copied, STAGES - 1 ahead, and nobody waits for anybody but for copies. Codes and scales
// go from memory to registers, as soon as what was there is used.
//
// The products of 64 rows with a unit are an item. While the tensor cores are at one, the warp group scales the sums of the
// item before it: two sets of sums take turns. Along k the work may be cut in `splits`, whose sums partials.cu adds in
// order. The arithmetic is that of gemm.cu, scaled after every unit:
//     y = sum_g scale * step * (sum_k code * x) + (scale * zero + offset) * (sum_k x)
//
// Constants besides those of product.cuh (MT is 1 or 2, WARPS a multiple of 4, GROUP_STEPS 0 or a multiple of 4): INTEGER:
// x is int8 codes with a scale a token, else 16-bit; STAGES; BLOCKS of a multiprocessor.
#include "wgmma.cuh"

constexpr int TOKENS = 8 * NT;
constexpr int SLABS = INTEGER ? 1 : 2;             // of 128 bytes a token, in a unit
constexpr int SLAB = 8 * TOKENS, UNIT = SLABS * SLAB;  // in pieces of 16 bytes
constexpr int STAGE = 2 * UNIT + TOKENS / 2;       // two units, and behind them their sums of x
constexpr int APART = (STAGE + 63) / 64 * 64;      // from stage to stage in shared memory: whole 1024 bytes
constexpr int ITEMS = 2 * MT;                      // of a stage
constexpr int UNITS = CHUNK / 128;                 // of a chunk
constexpr int SLAB_STEPS = 4 / SLABS;              // of 32 columns
constexpr bool ZEROS = BITS < 8;                   // the level of code 0 is not 0, or there are offsets
constexpr int SIZE = TYPE == 2 ? 4 : 2;            // bytes of a result
constexpr int ROWS = 16 * MT * WARPS, PITCH = ROWS + 8;  // of a token's results in shared memory
constexpr int STAGED = STAGES * APART, RESULTS = TOKENS * PITCH * SIZE / 16;
constexpr int HELD = STAGED > RESULTS ? STAGED : RESULTS;

template <bool>
struct Kind { typedef float Sum; };
template <>
struct Kind<true> { typedef int Sum; };
typedef Kind<INTEGER>::Sum Sum;

// Brings stages of x, one after another, each to the slot after the last one's.
struct Bringer {
    const uint4* x;
    int left, slot, round;
};

// The next stage, if there is one, to where nobody reads any more.
DEVICE void bring(Bringer& b, uint4* staged, Turnstile* full, Turnstile* empty) {
    if (b.left <= 0) return;
    if (b.round) wait_turn(empty + b.slot, b.round - 1 & 1);
    arrive_and_expect(full + b.slot, 16 * STAGE);
    copy_bulk(staged + b.slot * APART, b.x, 16 * STAGE, full + b.slot);
    b.x += STAGE;
    b.left--;
    if (++b.slot == STAGES) b.slot = 0, b.round++;
}

// What a warp has of its weights: for each unit of a stage the codes and pairs of its tiles, and where the next ones are.
struct Weights {
    const uint4* codes[MT];
    const RawPairs* pairs[MT];
    uint4 word[UNITS == 1 ? 2 : 1][MT][LOADS];
    RawPairs raw[2][MT];
};

// The group that a unit belongs to.
DEVICE u32 group_of_unit(int unit) { return BY_ROW ? 0 : GROUP_STEPS > 4 ? unit / (GROUP_STEPS / 4) : unit; }

DEVICE void read_words(Weights& w, const Product& p, int held, int mt, int chunk) {
    const uint4* at = w.codes[mt] + (size_t)(u32)(chunk < p.chunks ? chunk : p.chunks - 1) * (LOADS * 32);
#pragma unroll
    for (int i = 0; i < LOADS; i++) w.word[held][mt][i] = read_once(at + 32 * i);
}

DEVICE void read_raw(Weights& w, const Product& p, int held, int mt, int unit) {
    const int last = p.chunks * UNITS - 1;
    w.raw[held][mt] = read_weight(w.pairs[mt] + (size_t)(group_of_unit(unit < last ? unit : last) * 8));
}

// Those of a stage.
DEVICE Weights weights_of(const Product& p, int tile, int stage) {
    Weights w;
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
        const u32 mine = tile + 4 * mt < p.row_tiles ? tile + 4 * mt : p.row_tiles - 1;
        w.codes[mt] = p.tiles + (size_t)mine * (u32)p.chunks * (LOADS * 32) + threadIdx.x;
        w.pairs[mt] = (const RawPairs*)p.scales + (size_t)mine * (u32)p.groups * 8 + (threadIdx.x >> 2);
#pragma unroll
        for (int unit = 0; unit < 2; unit++) {
            if (unit % UNITS == 0) read_words(w, p, unit, mt, 2 / UNITS * stage + unit);
            read_raw(w, p, unit, mt, 2 * stage + unit);
        }
    }
    return w;
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

// Asks for the products of an item of a stage at x, and for the codes that take the place of its own.
DEVICE void multiply(Sum (&sums)[4 * NT], uint4 (&a)[SLABS][4], Weights& w, const Product& p, int item, int stage, Operand x, u32 magic) {
    const int unit = item / MT, mt = item % MT, held = unit / UNITS;
#pragma unroll
    for (int slab = 0; slab < SLABS; slab++) {
        numbers_of(a[slab], w.word[held][mt], unit % UNITS * 4 + slab * SLAB_STEPS, magic);
#pragma unroll
        for (int i = 0; i < 4; i++) settle(a[slab][i]);
        begin_wgmma();
#pragma unroll
        for (int i = 0; i < 4; i++) wgmma(sums, a[slab][i], x + unit * UNIT + slab * SLAB + 2 * i, slab > 0 || i > 0);
    }
    commit_wgmma();
    if (unit % UNITS == UNITS - 1) read_words(w, p, held, mt, 2 / UNITS * (stage + 1) + held);
}

// y += what an item adds to a lane's sums; x: the lane's sums of x, those of two column tiles side by side.
DEVICE void add_item(float (&y)[4 * NT], const Sum (&sums)[4 * NT], const Product& p, const RawPairs& raw, const float* x) {
    const Pairs pairs = pairs_of(raw);
    float step[2], zero[2];
#pragma unroll
    for (int rh = 0; rh < 2; rh++) {
        step[rh] = pairs.scale[rh] * p.level_step;
        zero[rh] = pairs.scale[rh] * p.level_zero + pairs.offset[rh];
    }
#pragma unroll
    for (int two = 0; two < NT / 2; two++) {
        const float4 of_x = ZEROS ? *(const float4*)(x + 16 * two) : float4{0, 0, 0, 0};
#pragma unroll
        for (int c = 0; c < 8; c++) {
            float& sum = y[8 * two + c];
            sum += step[c / 2 % 2] * (float)sums[8 * two + c];
            if (ZEROS) sum += zero[c / 2 % 2] * (c < 4 ? c % 2 ? of_x.y : of_x.x : c % 2 ? of_x.w : of_x.z);
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

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) wgemm(const Product p) {
    DYNAMIC_SHARED(staged, HELD + STAGES);
    let_next_begin();
    Turnstile* const full = (Turnstile*)(staged + HELD);  // a stage has come
    Turnstile* const empty = full + STAGES;                // all warps have read it
    const int token_blocks = (p.tokens + TOKENS - 1) / TOKENS, row_blocks = (p.row_tiles + MT * WARPS - 1) / (MT * WARPS);
    const int token_block = (int)blockIdx.x % token_blocks, rest = (int)blockIdx.x / token_blocks;
    const int split = rest / row_blocks, first = rest % row_blocks * (MT * WARPS);
    const int tile = first + threadIdx.y / 4 * (4 * MT) + threadIdx.y % 4;  // of the warp, in its group's first 64 rows
    const int stages = (p.chunks * UNITS + 1) / 2, each = (stages + p.splits - 1) / p.splits, begin = split * each;
    const int end = begin + each < stages ? begin + each : stages;
    const bool brings = threadIdx.x == 0 && threadIdx.y == 0;
    if (brings) {
        for (int s = 0; s < STAGES; s++) make_turnstile(full + s, 1), make_turnstile(empty + s, WARPS);
        publish_turnstiles();
    }
    sync_block();
    const u32 magic = kept(p, HALF ? 0x64006400u : 0x43004300u);
    const Operand x = operand_of(staged);
    const float* const x_sums = (const float*)(staged + 2 * UNIT) + 4 * (threadIdx.x & 3);
    float y[MT][4 * NT] = {};
    Sum sums[2][4 * NT] = {};
    uint4 a[SLABS][4];
    Weights weights = weights_of(p, tile, begin);
    wait_for_inputs();
    Bringer more = {(const uint4*)p.x + ((size_t)(u32)token_block * (u32)stages + (u32)begin) * STAGE, end - begin, 0, 0};
    if (brings)
        for (int s = 0; s < STAGES - 1; s++) bring(more, staged, full, empty);
    int slot = 0, turn = 0;
    wait_turn(full, 0);
    multiply(sums[0], a, weights, p, 0, begin, x, magic);
    for (int stage = begin; stage < end; stage++) {
        const int next = slot + 1 == STAGES ? 0 : slot + 1, next_turn = slot + 1 == STAGES ? turn ^ 1 : turn;
#pragma unroll
        for (int item = 0; item < ITEMS; item++) {
            const int unit = item / MT, mt = item % MT;
            wait_wgmma<0>();
            settle_all(sums[item % 2]);
            if (item + 1 < ITEMS) {
                multiply(sums[(item + 1) % 2], a, weights, p, item + 1, stage, x + slot * APART, magic);
            } else if (stage + 1 < end) {
                wait_turn(full + next, next_turn);
                multiply(sums[0], a, weights, p, 0, stage + 1, x + next * APART, magic);
            }
            if (item == 0 && brings) bring(more, staged, full, empty);  // to where the stage before was
            sync_warp();
            add_item(y[mt], sums[item % 2], p, weights.raw[unit][mt], x_sums + slot * (4 * APART) + unit * TOKENS);
            read_raw(weights, p, unit, mt, 2 * (stage + 1) + unit);
        }
        sync_warp();
        if (threadIdx.x == 0) arrive(empty + slot);
        slot = next, turn = next_turn;
    }
    const int token0 = token_block * TOKENS;
    if (p.splits > 1) return write_sums(y, p, tile, token0, split);
    sync_block();  // what is staged is read, its place free
    write_block(y, p, staged, tile, first, token0);
}
