// The product for many tokens on Hopper, of codes as they are. A warp group makes 64 * MT rows by 8 * NT tokens.
//
// The products of 64 rows with a unit of x are an item. While the tensor cores are at one, the warp group scales the sums of
// the item before it: two sets of sums take turns. The arithmetic is that of gemm.cu, scaled after every unit:
//     y = sum_g scale * step * (sum_k code * x) + (scale * zero + offset) * (sum_k x)
//
// Constants: those of warp_group.cuh.
#include "warp_group.cuh"

constexpr int ITEMS = 2 * MT;          // of a stage
constexpr int SLAB_STEPS = 4 / SLABS;  // of 32 columns
constexpr bool ZEROS = BITS < 8;       // the level of code 0 is not 0, or there are offsets

template <bool>
struct Kind { typedef float Sum; };
template <>
struct Kind<true> { typedef int Sum; };
typedef Kind<INTEGER>::Sum Sum;

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
    const int unit = item / MT, mt = item % MT;
#pragma unroll
    for (int slab = 0; slab < SLABS; slab++) {
        numbers_of(a[slab], w.word[held_at(unit)][mt], unit % UNITS * 4 + slab * SLAB_STEPS, magic);
#pragma unroll
        for (int i = 0; i < 4; i++) settle(a[slab][i]);
        begin_wgmma();
#pragma unroll
        for (int i = 0; i < 4; i++) wgmma(sums, a[slab][i], x + unit * UNIT + slab * SLAB + 2 * i, slab > 0 || i > 0);
    }
    commit_wgmma();
    read_next_words(w, p, unit, mt, stage);
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

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) wgemm(const Product p) {
    DYNAMIC_SHARED(staged, HELD + STAGES);
    let_next_begin();
    Turnstile* const full = (Turnstile*)(staged + HELD);  // a stage has come
    Turnstile* const empty = full + STAGES;                // all warps have read it
    make_turnstiles(full, empty);
    const Share share = share_of(p);
    const u32 magic = kept(p, HALF ? 0x64006400u : 0x43004300u);
    const Operand x = operand_of(staged);
    const float* const x_sums = (const float*)(staged + 2 * UNIT) + 4 * (threadIdx.x & 3);
    float y[MT][4 * NT] = {};
    Sum sums[2][4 * NT] = {};
    uint4 a[SLABS][4];
    Weights weights = weights_of(p, share.tile, share.begin);
    wait_for_inputs();
    Bringer more = bringer(p, share, staged, full, empty);
    int slot = 0, turn = 0;
    wait_turn(full, 0);
    multiply(sums[0], a, weights, p, 0, share.begin, x, magic);
    for (int stage = share.begin; stage < share.end; stage++) {
        const int next = slot + 1 == STAGES ? 0 : slot + 1, next_turn = slot + 1 == STAGES ? turn ^ 1 : turn;
#pragma unroll
        for (int item = 0; item < ITEMS; item++) {
            const int unit = item / MT, mt = item % MT;
            wait_wgmma<0>();
            settle_all(sums[item % 2]);
            if (item + 1 < ITEMS) {
                multiply(sums[(item + 1) % 2], a, weights, p, item + 1, stage, x + slot * APART, magic);
            } else if (stage + 1 < share.end) {
                wait_turn(full + next, next_turn);
                multiply(sums[0], a, weights, p, 0, stage + 1, x + next * APART, magic);
            }
            if (item == 0 && brings()) bring(more, staged, full, empty);  // to where the stage before was
            sync_warp();
            add_item(y[mt], sums[item % 2], p, weights.raw[unit][mt], x_sums + slot * (4 * APART) + unit * TOKENS);
            read_raw(weights, p, unit, mt, 2 * (stage + 1) + unit);
        }
        sync_warp();
        if (threadIdx.x == 0) arrive(empty + slot);
        slot = next, turn = next_turn;
    }
    write_results(y, p, staged, share);
}
