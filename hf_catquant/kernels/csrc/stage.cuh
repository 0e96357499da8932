// x in shared memory, for gemm.cu: 128 bytes of each of a block's tokens are a stage, and STAGES of them are under way.
//
// Constants: INTEGER, TOKEN_WARPS (gemm.cu), and those of product.cuh.
#pragma once
#include "product.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int TOKENS = 8 * NT * TOKEN_WARPS;
constexpr int STAGE_STEPS = INTEGER ? 4 : 2;  // 128 bytes a token
constexpr int STAGE = 8 * TOKENS;             // pieces of 16 bytes
constexpr int STAGES = TOKENS > 64 ? 3 : 4;   // at most 48 KB
constexpr int STEP_PIECES = 8 / STAGE_STEPS;
constexpr int PIECES = (STAGE + THREADS - 1) / THREADS;  // of a stage, that a thread copies

// Where piece `piece` of a token lies in a stage, so that lanes that read at once use different banks. A step's pieces
// are those of step 0 with STEP_PIECES * step xor-ed in.
DEVICE int place(int token, int piece) {
    return 8 * token + (piece ^ (INTEGER ? (token & 3) << 1 : (token & 1) << 2));
}

// What a thread copies of each stage: a piece of each of PIECES tokens. Tokens that are not there are the last one again.
struct Copier {
    const uint4* x;
    u32 row[PIECES], column, end;  // in pieces
    int to, left;
};

// For the chunks from begin up to end, of the tokens from token0 on.
DEVICE Copier copier(const Product& p, int token0, int begin, int end) {
    constexpr int COLUMNS = INTEGER ? 16 : 8;  // of a piece
    const int width = (INTEGER ? p.chunks * CHUNK : p.columns) / COLUMNS, each = CHUNK / COLUMNS;
    const int thread = threadIdx.y * 32 + threadIdx.x, token = thread / 8, piece = thread % 8;
    Copier c;
    c.x = (const uint4*)p.x;
    c.column = begin * each + piece;
    c.end = end * each < width ? end * each : width;
    c.to = place(token, piece);
    c.left = STAGE - thread;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        int m = token0 + token + i * (THREADS / 8);
        c.row[i] = (u32)(m < p.tokens ? m : p.tokens - 1) * (u32)width;
    }
    return c;
}

// The next stage; zeros where the columns, or this block's part of them, have ended.
DEVICE void fetch(Copier& c, uint4* stage) {
#pragma unroll
    for (int i = 0; i < PIECES; i++)
        if (STAGE % THREADS == 0 || i * THREADS < c.left)
            copy_async(stage + c.to + i * THREADS, c.x + (c.row[i] + c.column), c.column < c.end);
    c.column += 8;
}
