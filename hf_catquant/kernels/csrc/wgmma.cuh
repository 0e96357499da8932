// Hopper's tensor-core products of a warp group: 64 rows of weights in registers by 8 * N tokens in shared memory, which
// run behind the back of the threads that ask for them. PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions";
// compute capability 9.0 alone has them (sm_90a).
//
// d: a lane's sums, as mma has them for each 8 tokens; a: as mma has it, 16 rows a warp; b: 128 bytes a token, their pieces in
// the order of swizzled(), the first token on a multiple of 1024 bytes.
#pragma once
#include "codes.cuh"

// Piece `piece` of 16 bytes of a token's 128 lies at this one: a row of 8 tokens by 16 bytes then uses every bank once.
DEVICE int swizzled(int token, int piece) { return 8 * token + (piece ^ (token & 7)); }

#ifdef CATQUANT_EMULATED
#include "emulator_wgmma.h"
#else

#define DYNAMIC_SHARED(NAME, PIECES) extern __shared__ __align__(1024) uint4 NAME[]

// A barrier in shared memory that counts arrivals, and bytes that copies have yet to bring; both come to an end in turns,
// which have parities 0 and 1. It is made by one thread, before a barrier of the block.
typedef unsigned long long Turnstile;
DEVICE u32 shared_address(const void* at) { return (u32)__cvta_generic_to_shared(at); }
DEVICE void make_turnstile(Turnstile* at, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(shared_address(at)), "r"(arrivals) : "memory");
}
DEVICE void publish_turnstiles() { asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory"); }
DEVICE void arrive(Turnstile* at) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(shared_address(at)) : "memory"); }
DEVICE void arrive_and_expect(Turnstile* at, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" : : "r"(shared_address(at)), "r"(bytes) : "memory");
}
DEVICE void wait_turn(Turnstile* at, int parity) {
    asm volatile("{.reg .pred p; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @!p bra AGAIN;}"
                 : : "r"(shared_address(at)), "r"(parity) : "memory");
}
// Multiples of 16 bytes from global to shared memory, which the turnstile counts.
DEVICE void copy_bulk(uint4* to, const void* from, int bytes, Turnstile* at) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 : : "r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(at)) : "memory");
}

// Registers that were written since are the tensor cores' from here on.
DEVICE void begin_wgmma() { asm volatile("wgmma.fence.sync.aligned;" : : : "memory"); }
DEVICE void commit_wgmma() { asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory"); }
// Waits for all groups but the N newest.
template <int N>
DEVICE void wait_wgmma() { asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(N) : "memory"); }

// A value that is the same in all lanes, for the compiler to know it.
DEVICE u32 uniform(u32 value) { return __shfl_sync(0xffffffffu, value, 0); }

// Values that the tensor cores have been waited for, or are about to get: what is done with them stays on its side.
DEVICE void settle(float& value) { asm volatile("" : "+f"(value) : : "memory"); }
DEVICE void settle(int& value) { asm volatile("" : "+r"(value) : : "memory"); }
DEVICE void settle(uint4& v) { asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w) : : "memory"); }

// Where the tensor cores find b: rows of 128 bytes, swizzled; eight of them, 1024 bytes, follow each other. Adding n to it
// goes n pieces of 16 bytes on.
// This is the lower half of their descriptor; the upper one says how far apart eight rows are, and how they are swizzled.
typedef u32 Operand;
DEVICE Operand operand_of(const uint4* b) { return (shared_address(b) & 0x3ffff) >> 4 | 1 << 16; }

#define D8 "{%0, %1, %2, %3, %4, %5, %6, %7}"
#define D16 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}"
#define D32                                                                                                 \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                               \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define D64                                                                                                 \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                               \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                      \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                      \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
#define HELD4(K, I) "+" K(d[I]), "+" K(d[I + 1]), "+" K(d[I + 2]), "+" K(d[I + 3])
#define HELD8(K) HELD4(K, 0), HELD4(K, 4)
#define HELD16(K) HELD8(K), HELD4(K, 8), HELD4(K, 12)
#define HELD32(K) HELD16(K), HELD4(K, 16), HELD4(K, 20), HELD4(K, 24), HELD4(K, 28)
#define HELD64(K)                                                                                           \
    HELD32(K), HELD4(K, 32), HELD4(K, 36), HELD4(K, 40), HELD4(K, 44), HELD4(K, 48), HELD4(K, 52), HELD4(K, 56), HELD4(K, 60)
#define WGMMA(NAME, C, K, COUNT, SHAPE, REST, A0, A1, A2, A3, B, ADD)                                       \
    DEVICE void NAME(C (&d)[COUNT], uint4 a, Operand b, bool add) {                                         \
        asm volatile("{.reg .pred p; .reg .b64 b; setp.ne.b32 p, %" #ADD ", 0; mov.b64 b, {%" #B            \
                     ", 0x40000040}; wgmma.mma_async.sync.aligned." SHAPE " " D##COUNT                      \
                     ", {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, b, p" REST ";}"                           \
                     : HELD##COUNT(K)                                                                       \
                     : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b), "r"((int)add));                      \
    }
#define WGMMA_SIZES(NAME, C, K, SHAPE, REST)                                  \
    WGMMA(NAME, C, K, 8, "m64n16" SHAPE, REST, 8, 9, 10, 11, 12, 13)          \
    WGMMA(NAME, C, K, 16, "m64n32" SHAPE, REST, 16, 17, 18, 19, 20, 21)       \
    WGMMA(NAME, C, K, 32, "m64n64" SHAPE, REST, 32, 33, 34, 35, 36, 37)       \
    WGMMA(NAME, C, K, 64, "m64n128" SHAPE, REST, 64, 65, 66, 67, 68, 69)
// Behind the predicate: neither operand is negated, b is not transposed.
WGMMA_SIZES(wgmma_bf16, float, "f", "k16.f32.bf16.bf16", ", 1, 1, 0")
WGMMA_SIZES(wgmma_f16, float, "f", "k16.f32.f16.f16", ", 1, 1, 0")
WGMMA_SIZES(wgmma_u8s8, int, "r", "k32.s32.u8.s8", "")
WGMMA_SIZES(wgmma_s8s8, int, "r", "k32.s32.s8.s8", "")
#undef WGMMA_SIZES
#undef WGMMA
#endif

// d = a * b, or d += a * b, for 16 columns of 16-bit or 32 of 8-bit numbers.
template <int COUNT>
DEVICE void wgmma(float (&d)[COUNT], uint4 a, Operand b, bool add) {
    if (HALF) wgmma_f16(d, a, b, add);
    else wgmma_bf16(d, a, b, add);
}
template <int COUNT>
DEVICE void wgmma(int (&d)[COUNT], uint4 a, Operand b, bool add) {
    if (BITS == 8) wgmma_s8s8(d, a, b, add);
    else wgmma_u8s8(d, a, b, add);
}
