// What the products of warp groups have in common, wgemm.cu and wdense.cu: x in stages, codes and scales on their way, results.
//
// x comes arranged (arrange.cu) through shared memory, a stage of two units of 128 columns at a time, for all warp groups of
// the block: one thread has stages copied, STAGES - 1 ahead, and nobody waits for anybody but for copies. Codes and scales
// go from memory to registers, as soon as what was there is used. Along k the work may be cut in `splits`, whose sums
// partials.cu adds in order.
//
// Constants besides those of product.cuh (MT is 1 or 2, WARPS a multiple of 4, GROUP_STEPS 0 or a multiple of 4): INTEGER:
// x is int8 codes with a scale a token, else 16-bit; STAGES; BLOCKS of a multiprocessor.
#pragma once
#include "wgmma.cuh"

constexpr int TOKENS = 8 * NT;
constexpr int SLABS = INTEGER ? 1 : 2;             // of 128 bytes a token, in a unit
constexpr int SLAB = 8 * TOKENS, UNIT = SLABS * SLAB;  // in pieces of 16 bytes
constexpr int STAGE = 2 * UNIT + TOKENS / 2;       // two units, and behind them their sums of x
constexpr int APART = (STAGE + 63) / 64 * 64;      // from stage to stage in shared memory: whole 1024 bytes
constexpr int UNITS = CHUNK / 128;                 // of a chunk
constexpr int CHUNKS_HELD = UNITS == 1 && NT < 16 ? 2 : 1;  // of codes, by a warp: as many as there are registers for
constexpr int SIZE = TYPE == 2 ? 4 : 2;            // bytes of a result
constexpr int ROWS = 16 * MT * WARPS, PITCH = ROWS + 8;  // of a token's results in shared memory
constexpr int STAGED = STAGES * APART, RESULTS = TOKENS * PITCH * SIZE / 16;
constexpr int HELD = STAGED > RESULTS ? STAGED : RESULTS;

// What a block, and a warp of it, makes: all of it follows from where it stands.
struct Share {
    int token_block, split, first, tile;  // first: tile of the block; tile: of the warp, in its group's first 64 rows
    int stages, begin, end;               // of the whole row, and of this part of it, which has one at least
};

DEVICE Share share_of(const Product& p) {
    const int token_blocks = (p.tokens + TOKENS - 1) / TOKENS, row_blocks = (p.row_tiles + MT * WARPS - 1) / (MT * WARPS);
    const int rest = (int)blockIdx.x / token_blocks, first = rest % row_blocks * (MT * WARPS);
    const int stages = (p.chunks * UNITS + 1) / 2, each = (stages + p.splits - 1) / p.splits, begin = rest / row_blocks * each;
    const int tile = first + threadIdx.y / 4 * (4 * MT) + threadIdx.y % 4;
    return {(int)blockIdx.x % token_blocks, rest / row_blocks, first, tile, stages, begin, begin + each < stages ? begin + each : stages};
}

DEVICE bool brings() { return threadIdx.x == 0 && threadIdx.y == 0; }

DEVICE void make_turnstiles(Turnstile* full, Turnstile* empty) {
    if (brings()) {
        for (int s = 0; s < STAGES; s++) make_turnstile(full + s, 1), make_turnstile(empty + s, WARPS);
        publish_turnstiles();
    }
    sync_block();
}

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

// Begins with the first stages, all but one that there is room for.
DEVICE Bringer bringer(const Product& p, const Share& share, uint4* staged, Turnstile* full, Turnstile* empty) {
    const size_t before = (size_t)(u32)share.token_block * (u32)share.stages + (u32)share.begin;
    Bringer b = {(const uint4*)p.x + before * STAGE, share.end - share.begin, 0, 0};
    if (brings())
        for (int s = 0; s < STAGES - 1; s++) bring(b, staged, full, empty);
    return b;
}

// What a warp has of its weights: the codes of its tiles in the next chunks, the pairs of the next two units, and where all are.
struct Weights {
    u32 codes[MT], pairs[MT];  // where its tiles begin
    uint4 word[CHUNKS_HELD][MT][LOADS];
    RawPairs raw[2][MT];
};

// The group that a unit belongs to.
DEVICE u32 group_of_unit(int unit) { return BY_ROW ? 0 : GROUP_STEPS > 4 ? unit / (GROUP_STEPS / 4) : unit; }

DEVICE int held_at(int unit) { return unit / UNITS % CHUNKS_HELD; }

DEVICE void read_words(Weights& w, const Product& p, int held, int mt, int chunk) {
    const uint4* at = p.tiles + (w.codes[mt] + (u32)(chunk < p.chunks ? chunk : p.chunks - 1) * (LOADS * 32));
#pragma unroll
    for (int i = 0; i < LOADS; i++) w.word[held][mt][i] = read_once(at + 32 * i);
}

// Those that come after the codes of a unit of a stage in their place, if all of the chunk has been used.
DEVICE void read_next_words(Weights& w, const Product& p, int unit, int mt, int stage) {
    if (unit % UNITS == UNITS - 1) read_words(w, p, held_at(unit), mt, (2 * stage + unit) / UNITS + CHUNKS_HELD);
}

DEVICE void read_raw(Weights& w, const Product& p, int held, int mt, int unit) {
    const int last = p.chunks * UNITS - 1;
    w.raw[held][mt] = read_weight((const RawPairs*)p.scales + (w.pairs[mt] + group_of_unit(unit < last ? unit : last) * 8));
}

// Those of a stage.
DEVICE Weights weights_of(const Product& p, int tile, int stage) {
    Weights w;
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
        const u32 mine = tile + 4 * mt < p.row_tiles ? tile + 4 * mt : p.row_tiles - 1;
        w.codes[mt] = mine * (u32)p.chunks * (LOADS * 32) + threadIdx.x;
        w.pairs[mt] = mine * (u32)p.groups * 8 + (threadIdx.x >> 2);
#pragma unroll
        for (int unit = 0; unit < 2; unit++) {
            if (unit < CHUNKS_HELD) read_words(w, p, unit, mt, 2 / UNITS * stage + unit);
            read_raw(w, p, unit, mt, 2 * stage + unit);
        }
    }
    return w;
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
    sync_block();  // what is staged is read, its place free
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

DEVICE void write_results(const float (&y)[MT][4 * NT], const Product& p, uint4* staged, const Share& share) {
    const int token0 = share.token_block * TOKENS;
    if (p.splits > 1) write_sums(y, p, share.tile, token0, share.split);
    else write_block(y, p, staged, share.tile, share.first, token0);
}
