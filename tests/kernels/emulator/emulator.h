// A CUDA block on the host: every thread is a fiber, and warp and block operations are where fibers wait for each other.
//
// Stands in for hf_catquant/kernels/csrc/primitives.cuh. Tensor-core products follow the fragment maps of the PTX ISA
// ("Warp Level Matrix Instructions") and add in double; memory that is read or written must lie in a region that the
// caller named, and be aligned. It does not model how tensor cores round, and finds no race between warps that happens
// to come out right in its one order.
#pragma once
#include <csetjmp>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

#define DEVICE static inline
#define __global__
#define __shared__ static
#define __launch_bounds__(...)
#define __restrict__

struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct Place { int x, y, z; };

namespace emulator {

struct Region { const char *begin, *end; int writable; };
struct Slot { u32 a[4], b[2]; float f; int kind; };
struct Warp { Slot slots[2][32]; int arrived; unsigned generation; };
struct Copy { uint4* to; const uint4* from; int group; };
constexpr int MOST_COPIES = 256;
struct Fiber { ucontext_t start; jmp_buf at; char* stack; bool begun, done, waited; Place thread; Copy copies[MOST_COPIES]; int waiting, group; };

constexpr int MOST_THREADS = 1024, STACK = 128 << 10;
inline Fiber fibers[MOST_THREADS];
inline Warp warps[MOST_THREADS / 32];
inline Warp whole;
inline jmp_buf scheduler, failure;
inline char message[256];
inline const Region* regions;
inline int region_count, threads, current;
inline bool moved;  // since the last round of the scheduler
inline Place block, block_size, grid_size;
inline void (*entry)();
static void (*begin)();  // of a launch; of its own library, which inline variables are not

[[noreturn]] inline void fail(const char* what, const void* at = nullptr) {
    snprintf(message, sizeof message, "%s (address %p, block %d %d, thread %d %d)", what, at, block.x, block.y,
             fibers[current].thread.x, fibers[current].thread.y);
    longjmp(failure, 1);
}

// Memory that an earlier launch may have written, or may still read, unless `weight`.
inline void check(const void* at, size_t size, bool write, bool weight = false) {
    if (!weight && !fibers[current].waited) fail("earlier launches are not waited for", at);
    if ((uintptr_t)at % size) fail("misaligned access", at);
    const char* p = (const char*)at;
    for (int i = 0; i < region_count; i++)
        if (p >= regions[i].begin && p + size <= regions[i].end) {
            if (write && !regions[i].writable) fail("write to an input", at);
            return;
        }
    fail(write ? "write out of bounds" : "read out of bounds", at);
}

inline void yield() {
    if (!_setjmp(fibers[current].at)) _longjmp(scheduler, 1);
}

inline void wait(Warp& of, int members) {
    unsigned before = of.generation;
    moved = true;
    if (++of.arrived == members) {
        of.arrived = 0;
        of.generation++;
        return;
    }
    while (of.generation == before) yield();
}

// Puts this lane's operands where the whole warp sees them; returns those of all lanes.
inline const Slot* exchange(const Slot& mine) {
    Warp& warp = warps[current / 32];
    Slot* slots = warp.slots[warp.generation & 1];
    slots[current % 32] = mine;
    wait(warp, 32);
    for (int lane = 0; lane < 32; lane++)
        if (slots[lane].kind != mine.kind) fail("lanes of a warp are at different operations");
    return slots;
}

inline void trampoline() {
    entry();
    fibers[current].done = true;
    moved = true;
    _longjmp(scheduler, 1);
}

inline void run_block() {
    memset(&whole, 0, sizeof whole);
    memset(warps, 0, sizeof warps);
    for (int t = 0; t < threads; t++) {
        Fiber& fiber = fibers[t];
        fiber.thread = {t % block_size.x, t / block_size.x, 0};
        fiber.begun = fiber.done = fiber.waited = false;
        fiber.waiting = fiber.group = 0;
        if (!fiber.stack) fiber.stack = (char*)malloc(STACK);
        getcontext(&fiber.start);
        fiber.start.uc_stack = {fiber.stack, 0, (size_t)STACK};
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, trampoline, 0);
    }
    for (;;) {
        volatile int left = 0;
        moved = false;
        for (volatile int i = 0; i < threads; i++) {
            // Up in one warp, down in the next: where a barrier is missing, one of the two comes too early.
            const int t = i ^ ((i / 32 + block.x + block.y) % 2 ? 31 : 0);
            Fiber& fiber = fibers[t];
            if (fiber.done) continue;
            left++;
            current = t;
            if (!_setjmp(scheduler)) {
                if (fiber.begun) _longjmp(fiber.at, 1);
                fiber.begun = true;
                setcontext(&fiber.start);
            }
        }
        if (!left) return;
        if (!moved) fail("threads wait for each other forever");
    }
}

}  // namespace emulator

#define threadIdx (emulator::fibers[emulator::current].thread)
#define blockIdx (emulator::block)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)

template <typename T>
DEVICE T read(const T* at) {
    emulator::check(at, sizeof(T), false);
    return *at;
}
DEVICE u32 read_or_zero(const u32* at, bool there) { return there ? read(at) : 0; }
template <typename T>
DEVICE T read_weight(const T* at) {
    emulator::check(at, sizeof(T), false, true);
    return *at;
}
DEVICE uint4 read_once(const uint4* at) { return read_weight(at); }
template <typename T>
DEVICE T read_weight_late(const T* at) { return read(at); }
DEVICE uint4 read_once_late(const uint4* at) { return read(at); }
template <typename T>
DEVICE void write(T* at, T value) {
    emulator::check(at, sizeof(T), true);
    *at = value;
}

// A copy happens when its thread waits for it; until then the place holds garbage, as if others still wrote to it.
DEVICE void copy_async(uint4* to, const void* from, bool there) {
    emulator::Fiber& fiber = emulator::fibers[emulator::current];
    if ((uintptr_t)to % 16) emulator::fail("misaligned copy", to);
    if (there) emulator::check(from, 16, false);
    if (fiber.waiting == emulator::MOST_COPIES) emulator::fail("more copies under way than the emulator holds");
    memset(to, 0xff, 16);
    fiber.copies[fiber.waiting++] = {to, there ? (const uint4*)from : nullptr, fiber.group};
}
DEVICE void commit_async() { emulator::fibers[emulator::current].group++; }
template <int N>
DEVICE void wait_async() {
    emulator::Fiber& fiber = emulator::fibers[emulator::current];
    int left = 0;
    for (int i = 0; i < fiber.waiting; i++) {
        emulator::Copy copy = fiber.copies[i];
        if (copy.group >= fiber.group - N) fiber.copies[left++] = copy;
        else if (copy.from) *copy.to = *copy.from;
        else memset(copy.to, 0, 16);
    }
    fiber.waiting = left;
}

DEVICE float bits_to_float(u32 bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
DEVICE u32 float_to_bits(float value) {
    u32 bits;
    memcpy(&bits, &value, 4);
    return bits;
}
DEVICE float round_even(float value) { return nearbyintf(value); }
DEVICE int round_to_int(float value) {
    return value != value ? 0 : value >= 2147483648.0f ? INT32_MAX : value < -2147483648.0f ? INT32_MIN : (int)nearbyintf(value);
}
DEVICE float divide(float a, float b) { return a / b; }
DEVICE float reciprocal(float value) { return 1.0f / value; }
DEVICE float multiply(float a, float b) { return a * b; }
DEVICE float add(float a, float b) { return a + b; }

DEVICE float f16_to_float(u32 bits) {
    u32 sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, mantissa = bits & 1023;
    if (exponent == 31) return bits_to_float(sign | 0x7f800000u | mantissa << 13);
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * ldexpf((float)mantissa, -24);
    return bits_to_float(sign | (exponent + 112) << 23 | mantissa << 13);
}
DEVICE u32 float_to_f16(double value) {
    u32 sign = std::signbit(value) ? 0x8000u : 0;
    double size = fabs(value);
    if (value != value) return 0x7fff;
    if (size == 0) return sign;
    if (size >= 65520) return sign | 0x7c00;
    int exponent;
    frexp(size, &exponent);
    int unit = exponent - 11 < -24 ? -24 : exponent - 11;  // 2^unit is the last bit
    double count = nearbyint(ldexp(size, -unit));
    if (unit == -24) return sign | (u32)count;  // without the implied bit; 1024 carries into the exponent by itself
    return sign | ((u32)(unit + 24) << 10) + (u32)count;
}
DEVICE float bf16_to_float(u32 bits) { return bits_to_float(bits << 16); }
DEVICE u32 float_to_bf16(float value) {
    u32 bits = float_to_bits(value);
    return value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
DEVICE u32 pack_bf16(float low, float high) { return float_to_bf16(low) | float_to_bf16(high) << 16; }

// Products of two 16-bit floats are exact in a double; what the tests multiply and add is exact in a float as well.
DEVICE u32 fma_bf16(u32 a, u32 b, u32 c) {
    u32 d = 0;
    for (int s = 0; s < 32; s += 16)
        d |= float_to_bf16((float)((double)bf16_to_float(a >> s & 0xffff) * bf16_to_float(b >> s & 0xffff) + bf16_to_float(c >> s & 0xffff))) << s;
    return d;
}
DEVICE u32 fma_f16(u32 a, u32 b, u32 c) {
    u32 d = 0;
    for (int s = 0; s < 32; s += 16)
        d |= float_to_f16((double)f16_to_float(a >> s & 0xffff) * f16_to_float(b >> s & 0xffff) + f16_to_float(c >> s & 0xffff)) << s;
    return d;
}

DEVICE u32 byte_permute(u32 a, u32 b, u32 selector) {
    uint64_t all = (uint64_t)b << 32 | a;
    u32 d = 0;
    for (int i = 0; i < 4; i++) d |= (u32)(all >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return d;
}

// c[i] of lane 4 g + t is row g + 8 (i / 2), column 2 t + i % 2.
// 16-bit: a[j] half h of lane 4 g + t is row g + 8 (j % 2), k = 2 t + h + 8 (j / 2); b[j] half h: k likewise, column g.
// 8-bit:  a[j] byte h of lane 4 g + t is row g + 8 (j % 2), k = 4 t + h + 16 (j / 2); b[j] byte h: k likewise, column g.
template <typename C, typename Number, typename ValueA, typename ValueB>
DEVICE void mma(C (&c)[4], uint4 a, u32 b0, u32 b1, int kind, int in_word, ValueA value_a, ValueB value_b) {
    emulator::Slot mine = {{a.x, a.y, a.z, a.w}, {b0, b1}, 0, kind};
    const emulator::Slot* all = emulator::exchange(mine);
    int lane = emulator::current % 32, bits = 32 / in_word;
    u32 keep = bits == 16 ? 0xffff : 0xff;
    for (int i = 0; i < 4; i++) {
        int g = lane / 4, column = 2 * (lane % 4) + i % 2;
        Number sum = c[i];
        for (int j = 0; j < 2; j++)
            for (int t = 0; t < 4; t++)
                for (int h = 0; h < in_word; h++)
                    sum += (Number)value_a(all[4 * g + t].a[i / 2 + 2 * j] >> bits * h & keep) *
                           value_b(all[4 * column + t].b[j] >> bits * h & keep);
        c[i] = (C)sum;
    }
}
DEVICE u32 opaque(u32 value) { return value; }

DEVICE int as_u8(u32 v) { return (int)v; }
DEVICE int as_s8(u32 v) { return (int)(signed char)v; }
// d = a b + c, where d and c may be the same.
#define MMA(NAME, C, NUMBER, KIND, IN_WORD, VALUE_A, VALUE_B)                                     \
    DEVICE void NAME(C (&d)[4], uint4 a, u32 b0, u32 b1, const C (&c)[4]) {                       \
        for (int i = 0; i < 4; i++) d[i] = c[i];                                                  \
        mma<C, NUMBER>(d, a, b0, b1, KIND, IN_WORD, VALUE_A, VALUE_B);                            \
    }                                                                                             \
    DEVICE void NAME(C (&c)[4], uint4 a, u32 b0, u32 b1) { NAME(c, a, b0, b1, c); }
MMA(mma_bf16, float, double, 1, 2, bf16_to_float, bf16_to_float)
MMA(mma_f16, float, double, 2, 2, f16_to_float, f16_to_float)
MMA(mma_u8s8, int, int, 3, 4, as_u8, as_s8)
MMA(mma_s8s8, int, int, 4, 4, as_s8, as_s8)
#undef MMA

DEVICE u32 warp_max(u32 value) {
    const emulator::Slot* all = emulator::exchange({{value}, {}, 0, 5});
    u32 most = 0;
    for (int lane = 0; lane < 32; lane++) most = all[lane].a[0] > most ? all[lane].a[0] : most;
    return most;
}
DEVICE float warp_shuffle_xor(float value, int mask) {
    return emulator::exchange({{}, {}, value, 6})[emulator::current % 32 ^ mask].f;
}
DEVICE void sync_warp() { emulator::exchange({{}, {}, 0, 7}); }
DEVICE void sync_block() { emulator::wait(emulator::whole, emulator::threads); }
DEVICE void let_next_begin() {}
DEVICE void wait_for_inputs() { emulator::fibers[emulator::current].waited = true; }
DEVICE void refuse() { emulator::fail("the kernel refuses its arguments"); }

namespace emulator {

inline const void* argument;
static long shared_bytes;  // that the kernel has of its launch; of its own library, which inline variables are not

// Runs a kernel of one struct on a grid of blocks, one after another. Returns null, or what went wrong.
template <typename T, void (*KERNEL)(const T)>
const char* launch(Place grid, Place threads_of_block, const void* arguments, const Region* legal, int count) {
    argument = arguments;
    entry = [] { KERNEL(*(const T*)argument); };
    regions = legal;
    region_count = count;
    grid_size = grid;
    block_size = threads_of_block;
    threads = block_size.x * block_size.y;
    if (setjmp(failure)) return message;
    if (begin) begin();
    for (block.y = 0; block.y < grid.y; block.y++)
        for (block.x = 0; block.x < grid.x; block.x++) run_block();
    return nullptr;
}

}  // namespace emulator

#define EMULATE(KERNEL, ARGUMENTS)                                                                                     \
    extern "C" const char* run(int gx, int gy, int bx, int by, const void* arguments, const emulator::Region* legal, int n) { \
        return emulator::launch<ARGUMENTS, KERNEL>({gx, gy, 1}, {bx, by, 1}, arguments, legal, n);                     \
    }                                                                                                                  \
    extern "C" long shared_bytes() { return emulator::shared_bytes; }
