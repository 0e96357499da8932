// Weights of product8.cu and product16.cu: a warp multiplies a chunk while AHEAD more are on their way to it.
//
// Constants besides those of product.cuh: AHEAD, at least 1.
#pragma once
#include "product.cuh"

constexpr bool EARLY = !BY_ROW && GROUPS_IN_CHUNK * MT <= 8;  // scales come with their codes; many of them, when wanted

struct Held {  // of a chunk
    Codes codes;
    RawPairs pairs[EARLY ? GROUPS_IN_CHUNK : 1][MT];
};

// The chunk at the cursor, if it is one, and on to the one that this warp turns to after it.
DEVICE void read_held(Held& held, const Product& p, Cursor& cursor, int chunk) {
    if (chunk >= p.chunks) return;
    read_codes<WARPS>(held.codes, cursor, true);
    if (EARLY)
#pragma unroll
        for (int i = 0; i < GROUPS_IN_CHUNK * MT; i++)
            held.pairs[i / MT][i % MT] = read_raw_pairs(p, cursor, i % MT, group_of(chunk, i / MT));
}

// Scales and offsets of tile mt for group `sub` of a chunk that is held.
DEVICE Pairs pairs_in(const Held& held, const Product& p, const Cursor& cursor, int mt, int chunk, int sub) {
    return EARLY ? pairs_of(held.pairs[sub][mt]) : read_pairs(p, cursor, mt, group_of(chunk, sub));
}

// The chunk that has been under way longest becomes the one to multiply, and chunk `later` is asked for.
DEVICE void turn_to_next(Held& now, Held (&next)[AHEAD], const Product& p, Cursor& cursor, int later) {
    now = next[0];
#pragma unroll
    for (int i = 1; i < AHEAD; i++) next[i - 1] = next[i];
    read_held(next[AHEAD - 1], p, cursor, later);
}
