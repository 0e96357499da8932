// w_hat from tiles, rows side by side again, for a product of very many tokens: rounded as weight.cu rounds it.
//
// A warp makes a chunk of a tile of 16 rows, 64 columns of four rows at a time: whole lines of 128 bytes, the most that one
// write to the second-level cache takes. So of two steps of 32 columns the lanes of an even row make the first, those of the
// odd row after it the second, of both rows: `side` of a pair of steps.
#include "lookup.cuh"

constexpr int PAIRS = STEPS / 2;
constexpr int READS = FIELDS > 1 ? LOADS : LOADS / 2;  // of tiles: a pair of steps lies in one, or in two
constexpr int GROUPS = FLUSH > 1 ? STEPS / FLUSH : PAIRS;  // that a lane has columns of
constexpr bool TABLE = BITS <= 2 && TYPE < 2;  // a group of a row has four values at most: lookup.cuh

struct Values {  // of a group of a row
    Table table;
    float scale, offset;  // instead, where nothing is looked up
};

DEVICE Values values_of(const Product& p, float scale, float offset) {
    return {TABLE ? table_of(p, scale, offset) : Table{}, scale, offset};
}

// level = step * number + zero of what number_of makes of a code.
struct Levels {
    float step, zero;
};

DEVICE Levels levels_of(const Product& p) {
    return {p.level_step, p.level_zero - p.level_step * (BITS == 8 ? 8388608.0f : 128.0f)};
}

// The code in byte `byte` of `codes`, set into the mantissa of 128, or of 2^23 where it is longer than seven bits.
DEVICE float number_of(u32 codes, int byte) {
    return bits_to_float(BITS == 8 ? byte_permute(codes, 0x4b000000u, 0x7440 + byte)
                                   : byte_permute(codes, 0x43000000u, 0x7044 | byte << 8));
}

// Four words of a tile with the bytes of columns that follow each other side by side, and this lane's step in front.
DEVICE uint4 in_order(uint4 word, int shift) {
    return {byte_permute(word.x >> shift, 0, 0x3120), byte_permute(word.y >> shift, 0, 0x3120),
            byte_permute(word.z >> shift, 0, 0x3120), byte_permute(word.w >> shift, 0, 0x3120)};
}

// Eight columns of a row: bits `shift` of the bytes of two words are their codes, 0 1 4 5 and 2 3 6 7.
DEVICE void make_eight(void* out, const Levels& levels, const Values& v, u32 first, u32 second, int shift, size_t at) {
    const u32 a = first >> shift & MASK * 0x01010101u, b = second >> shift & MASK * 0x01010101u;
    float value[8];
#pragma unroll
    for (int c = 0; c < 8; c++) {
        const float level = levels.step * number_of(c & 2 ? b : a, 2 * (c / 4) + (c & 1)) + levels.zero;
        value[c] = add(multiply(level, v.scale), v.offset);
    }
    write_eight(out, at, value);
}

// The same of two pairs of steps, whose codes are four bits apart.
DEVICE void look_up_sixteen(u32 first, u32 second, const Values& a, const Values& b, uint4& made, uint4& next) {
    const u32 keep = MASK * 0x1111u, codes[4] = {first & keep, second & keep, first >> 16 & keep, second >> 16 & keep};
    made = {look_up(a.table, codes[0]), look_up(a.table, codes[1]), look_up(a.table, codes[2]), look_up(a.table, codes[3])};
    next = {look_up_next(b.table, codes[0]), look_up_next(b.table, codes[1]), look_up_next(b.table, codes[2]), look_up_next(b.table, codes[3])};
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) untile(const Product p) {
    let_next_begin();
    const int lane = threadIdx.x, chunk = blockIdx.y * WARPS + threadIdx.y, side = lane >> 2 & 1, even = lane & ~4;
    if (chunk >= p.chunks) return;
    const uint4* tiles = p.tiles + ((size_t)blockIdx.x * (u32)p.chunks + (u32)chunk) * (LOADS * 32) + even;
    uint4 word[READS][2];
    Values values[GROUPS][2][2];
#pragma unroll
    for (int i = 0; i < 2 * READS; i++)
        word[i / 2][i % 2] = read_weight(tiles + (FIELDS > 1 ? i / 2 : i / 2 * 2 + side) * 32 + i % 2 * 4);
#pragma unroll
    for (int i = 0; i < 2 * GROUPS; i++) {
        const u32 group = group_of(chunk, FLUSH > 1 ? i / 2 : i / 2 * 2 + side);
        const u32 at = (blockIdx.x * (u32)p.groups + group) * 8 + (even >> 2) + i % 2;
        const Pairs pairs = pairs_of(read_weight((const RawPairs*)p.scales + at));
#pragma unroll
        for (int rh = 0; rh < 2; rh++) values[i / 2][i % 2][rh] = values_of(p, pairs.scale[rh], pairs.offset[rh]);
    }
#pragma unroll
    for (int i = 0; i < 2 * READS; i++) word[i / 2][i % 2] = in_order(word[i / 2][i % 2], FIELDS > 1 ? BITS * side : 0);

    const Levels levels = levels_of(p);
    wait_for_inputs();
    constexpr int APART = PAIRS / 2, GROUP_PAIRS = PAIRS / GROUPS;
    const int k = chunk * CHUNK + 32 * side + 8 * (lane & 3), n = (int)blockIdx.x * 16 + (even >> 2);
#pragma unroll
    for (int turn = 0; turn < APART; turn++) {
        const int k0 = k + 64 * turn, k1 = k0 + 64 * APART, shift = 2 * BITS * turn;
#pragma unroll
        for (int row = 0; row < 4; row++) {
            const int odd = row & 1, rh = row >> 1;
            if (n + odd + 8 * rh >= p.rows) continue;
            const Values &a = values[turn / GROUP_PAIRS][odd][rh], &b = values[(turn + APART) / GROUP_PAIRS][odd][rh];
            const uint4 &now = word[0][odd], &then = word[READS - 1][odd];
            const size_t at = (size_t)(n + odd + 8 * rh) * p.columns + k0;
            if (TABLE) {
                uint4 made, next;
                look_up_sixteen(word_of(now, rh) >> shift, word_of(now, 2 + rh) >> shift, a, b, made, next);
                if (k0 < p.columns) write((uint4*)((u16*)p.out + at), made);
                if (k1 < p.columns) write((uint4*)((u16*)p.out + at + 64 * APART), next);
                continue;
            }
            const int further = READS > 1 ? shift : shift + 2 * BITS * APART;
            if (k0 < p.columns) make_eight(p.out, levels, a, word_of(now, rh), word_of(now, 2 + rh), shift, at);
            if (k1 < p.columns) make_eight(p.out, levels, b, word_of(then, rh), word_of(then, 2 + rh), further, at + 64 * APART);
        }
    }
}
