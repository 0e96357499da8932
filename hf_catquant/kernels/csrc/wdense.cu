// The product for many tokens on Hopper, of weights rounded to the type of x, as dequantization writes them: 1 or 2 bits and
// 16-bit x. A warp group makes 64 * MT rows by 8 * NT tokens.
//
// Numbers are looked up on the way to the tensor cores (lookup.cuh), so that their sums are the result: nothing is scaled, and
// while the products of 64 rows with a unit of x are made, the numbers of the next are. A look-up makes a pair of columns c and
// c + 4, so arrange.cu pairs those of x (PAIRED).
//
// Constants: those of warp_group.cuh; INTEGER is 0, BITS 1 or 2.
#include "warp_group.cuh"
#include "lookup.cuh"

constexpr int ITEMS = 2 * MT;  // of a stage
constexpr int NIBBLE = 4 / BITS;

// Numbers of an item, a step of 32 columns after another, of each its even and its odd ones.
DEVICE void numbers_of(uint4 (&a)[8], const uint4 (&word)[LOADS], int unit, const Table (&tables)[2]) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int step = unit % UNITS * 4 + i / 2, shift = BITS * (step % NIBBLE) + i % 2 * 16;
        u32 made[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const u32 codes = word_of(word[0], j) >> shift & MASK * 0x1111u;
            made[j] = step / NIBBLE ? look_up_next(tables[j % 2], codes) : look_up(tables[j % 2], codes);
        }
        a[i] = {made[0], made[1], made[2], made[3]};
    }
}

// Asks for the products of an item at x, and for the weights that take the place of its own.
DEVICE void multiply(float (&y)[4 * NT], uint4 (&a)[8], Weights& w, const Product& p, int item, int stage, Operand x) {
    const int unit = item / MT, mt = item % MT;
    const Pairs pairs = pairs_of(w.raw[unit][mt]);
    const Table tables[2] = {table_of(p, pairs.scale[0], pairs.offset[0]), table_of(p, pairs.scale[1], pairs.offset[1])};
    numbers_of(a, w.word[held_at(unit)][mt], unit, tables);
    read_next_words(w, p, unit, mt, stage);
    read_raw(w, p, unit, mt, 2 * (stage + 1) + unit);
#pragma unroll
    for (int i = 0; i < 8; i++) settle(a[i]);
    begin_wgmma();
#pragma unroll
    for (int i = 0; i < 8; i++) wgmma(y, a[i], x + unit * UNIT + i / 4 * SLAB + i % 4 * 2, true);
    commit_wgmma();
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) wdense(const Product p) {
    DYNAMIC_SHARED(staged, HELD + STAGES);
    let_next_begin();
    Turnstile* const full = (Turnstile*)(staged + HELD);  // a stage has come
    Turnstile* const empty = full + STAGES;                // all warps have read it
    make_turnstiles(full, empty);
    const Share share = share_of(p);
    const Operand x = operand_of(staged);
    float y[MT][4 * NT] = {};
    uint4 a[2][8];
    Weights weights = weights_of(p, share.tile, share.begin);
    wait_for_inputs();
    Bringer more = bringer(p, share, staged, full, empty);
    int slot = 0, turn = 0;
    for (int stage = share.begin; stage < share.end; stage++) {
        wait_turn(full + slot, turn);
#pragma unroll
        for (int item = 0; item < ITEMS; item++) {
            wait_wgmma<1>();  // the item before the last one is made: its numbers are read
            if (item == 1) {  // the stage before is read
                sync_warp();
                if (threadIdx.x == 0 && stage > share.begin) arrive(empty + (slot ? slot : STAGES) - 1);
            }
            multiply(y[item % MT], a[item % 2], weights, p, item, stage, uniform(x + slot * APART));
        }
        if (brings()) bring(more, staged, full, empty);
        const int next = slot + 1 == STAGES ? 0 : slot + 1;
        turn ^= next == 0;
        slot = next;
    }
    wait_wgmma<0>();
#pragma unroll
    for (int i = 0; i < MT * 4 * NT; i++) settle(y[i / (4 * NT)][i % (4 * NT)]);
    write_results(y, p, staged, share);
}
