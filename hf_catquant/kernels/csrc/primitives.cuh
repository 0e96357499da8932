// What the kernels need of the machine, and nothing else of CUDA: no header of the toolkit is included, so that NVRTC
// alone compiles them. The tests put a host version of this file's functions in their place (CATQUANT_EMULATED).
//
// Global memory is read and written through the functions here only, which is where the host version checks bounds.
//
// A launch may begin while the one before it runs (cuda_driver.py): every kernel lets the next one begin at once, and waits
// before it touches what an earlier launch may have written, or may still read. Tiles and scales of weights it need not
// wait for: cuda_layout.py lets the device finish them when it builds them.
#pragma once

#ifdef CATQUANT_EMULATED
#include "emulator.h"
#else

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

#define DEVICE static __device__ __forceinline__

// Plain loads, not those of memory that never changes: the compiler moves the latter across wait_for_inputs() as it likes,
// what must be behind it up, and what is to be on its way meanwhile down.
template <typename T>
DEVICE T read(const T* at) { return *at; }

// 0 where nothing is there: a load that is not taken, not a branch, after which a warp would have to meet again.
DEVICE u32 read_or_zero(const u32* at, bool there) {
    u32 v;
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; mov.b32 %0, 0; @p ld.global.b32 %0, [%1]; }"
                 : "=r"(v) : "l"(at), "r"((u32)there));
    return v;
}

// Of what no launch under way writes: it may be read before wait_for_inputs().
template <typename T>
DEVICE T read_weight(const T* at) { return *at; }

// Codes are read once: they leave the first-level cache to x, which is read again and again.
DEVICE uint4 read_once(const uint4* at) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
    return v;
}

// The same two where the kernel has waited: the compiler may move them, and needs fewer registers.
template <typename T>
DEVICE T read_weight_late(const T* at) { return __ldg(at); }
DEVICE uint4 read_once_late(const uint4* at) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
    return v;
}

template <typename T>
DEVICE void write(T* at, T value) { *at = value; }

// 16 bytes from global to shared memory behind the thread's back, or 16 zeros; what is asked for between two commits
// is one group, and wait_async<N> waits for all groups but the N newest of this thread.
DEVICE void copy_async(uint4* to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 : : "r"((u32)__cvta_generic_to_shared(to)), "l"(from), "r"(there ? 16 : 0) : "memory");
}
DEVICE void commit_async() { asm volatile("cp.async.commit_group;" : : : "memory"); }
template <int N>
DEVICE void wait_async() { asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory"); }

// d = a * b + c, or c += a * b, on the tensor cores; a is 16 rows, b 8 columns. PTX ISA, "Warp Level Matrix Instructions".
#define MMA(NAME, SHAPE, C, CONSTRAINT)                                                                      \
    DEVICE void NAME(C (&d)[4], uint4 a, u32 b0, u32 b1, const C (&c)[4]) {                                  \
        asm("mma.sync.aligned." SHAPE " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};" \
            : "=" CONSTRAINT(d[0]), "=" CONSTRAINT(d[1]), "=" CONSTRAINT(d[2]), "=" CONSTRAINT(d[3])         \
            : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), CONSTRAINT(c[0]), CONSTRAINT(c[1]),  \
              CONSTRAINT(c[2]), CONSTRAINT(c[3]));                                                           \
    }                                                                                                        \
    DEVICE void NAME(C (&c)[4], uint4 a, u32 b0, u32 b1) { NAME(c, a, b0, b1, c); }
MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32", float, "f")
MMA(mma_f16, "m16n8k16.row.col.f32.f16.f16.f32", float, "f")
MMA(mma_u8s8, "m16n8k32.row.col.s32.u8.s8.s32", int, "r")
MMA(mma_s8s8, "m16n8k32.row.col.s32.s8.s8.s32", int, "r")
#undef MMA

// a * b + c of two 16-bit numbers at once, rounded once.
DEVICE u32 fma_bf16(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
DEVICE u32 fma_f16(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

DEVICE float bits_to_float(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 float_to_bits(float value) { return __float_as_uint(value); }
DEVICE int round_to_int(float value) { return __float2int_rn(value); }  // ties to even; saturates; NaN is 0
DEVICE float round_even(float value) { return rintf(value); }
DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
DEVICE float reciprocal(float value) {  // to a few 2^-24; 0 of what is infinite
    float d;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(value));
    return d;
}
DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }  // never fused with an addition
DEVICE float add(float a, float b) { return __fadd_rn(a, b); }

DEVICE u32 float_to_bf16(float value) {
    u16 h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(value));
    return h;
}
DEVICE u32 float_to_f16(float value) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(value));
    return h;
}
DEVICE float f16_to_float(u32 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((u16)bits));
    return value;
}
DEVICE u32 pack_bf16(float low, float high) {
    u32 d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

// A value that the compiler takes for an unknown one, so that it stays where it is.
DEVICE u32 opaque(u32 value) {
    u32 same;
    asm volatile("mov.b32 %0, %1;" : "=r"(same) : "r"(value));
    return same;
}

DEVICE u32 byte_permute(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }

DEVICE u32 warp_max(u32 value) {
    u32 d;
    asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(d) : "r"(value));
    return d;
}
DEVICE float warp_shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE void sync_block() { __syncthreads(); }

// The next launch of the stream may begin when every block has said so; what it must not do before this one has ended and
// its writes are seen is behind its own wait_for_inputs(). Devices before sm_90 run launches one after another.
#if __CUDA_ARCH__ >= 900
DEVICE void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;" : : : "memory"); }
DEVICE void wait_for_inputs() { asm volatile("griddepcontrol.wait;" : : : "memory"); }
#else
DEVICE void let_next_begin() {}
DEVICE void wait_for_inputs() {}
#endif
DEVICE void refuse() { __trap(); }

#endif
