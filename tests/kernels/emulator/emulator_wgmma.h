// The products of a warp group on the host, for csrc/wgmma.cuh. A product is made when its warp waits for it, with what is
// then in shared memory: what is read too early, or overwritten too early, comes out wrong.
#pragma once

#define DYNAMIC_SHARED(NAME, PIECES)           \
    alignas(1024) static uint4 NAME[PIECES];   \
    emulator::shared_bytes = sizeof NAME

namespace emulator {

struct Asked { void* d; int count; u32 a[4]; const char* b; bool add; int group; };
struct Pending { Asked asked[64]; int count, group; };
inline Pending pending[MOST_THREADS];

// 128-byte swizzle: bits 4 to 6 of an address are changed by bits 7 to 9.
inline const char* swizzled(const char* at) { return (const char*)((uintptr_t)at ^ ((uintptr_t)at >> 3 & 0x70)); }

template <typename C, typename Number, typename ValueA, typename ValueB>
void make(const Asked& asked, int kind, int in_word, ValueA value_a, ValueB value_b) {
    Slot mine = {{asked.a[0], asked.a[1], asked.a[2], asked.a[3]}, {}, 0, kind};
    const Slot* all = exchange(mine);
    const int lane = current % 32, bits = 32 / in_word;
    const u32 keep = bits == 16 ? 0xffff : 0xff;
    C* d = (C*)asked.d;
    for (int i = 0; i < asked.count; i++) {
        const int token = i / 4 * 8 + 2 * (lane % 4) + i % 2;
        Number sum = asked.add ? (Number)d[i] : (Number)0;
        for (int j = 0; j < 2; j++)
            for (int t = 0; t < 4; t++) {
                u32 b;
                memcpy(&b, swizzled(asked.b + 128 * token + 16 * j + 4 * t), 4);
                for (int h = 0; h < in_word; h++)
                    sum += (Number)value_a(all[lane / 4 * 4 + t].a[i / 2 % 2 + 2 * j] >> bits * h & keep) * value_b(b >> bits * h & keep);
            }
        d[i] = (C)sum;
    }
}

}  // namespace emulator

// Copies happen when somebody waits for them; until then their places hold garbage.
struct Turnstile { u8 arrivals, left, turn, unused; int bytes; };
namespace emulator {
struct Bulk { char* to; const char* from; int bytes; Turnstile* at; };
inline Bulk bulks[64];
inline int bulk_count;

// What a launch that failed left under way.
inline void forget() {
    bulk_count = 0;
    for (Pending& mine : pending) mine.count = mine.group = 0;
}
static const bool forgets = (begin = forget, true);

inline void pass(Turnstile* at) {
    if (at->left || at->bytes) return;
    at->left = at->arrivals;
    at->turn ^= 1;
    moved = true;
}
}  // namespace emulator
DEVICE void make_turnstile(Turnstile* at, int arrivals) { *at = {(u8)arrivals, (u8)arrivals, 0, 0, 0}; }
DEVICE void publish_turnstiles() {}
DEVICE void arrive_and_expect(Turnstile* at, int bytes) {
    if (!at->left) emulator::fail("more arrivals than a turn has", at);
    at->bytes += bytes;
    at->left--;
    emulator::pass(at);
}
DEVICE void arrive(Turnstile* at) { arrive_and_expect(at, 0); }
DEVICE void copy_bulk(uint4* to, const void* from, int bytes, Turnstile* at) {
    if ((uintptr_t)to % 16 || (uintptr_t)from % 16 || bytes % 16) emulator::fail("misaligned copy", to);
    for (int i = 0; i < bytes; i += 16) emulator::check((const char*)from + i, 16, false);
    if (emulator::bulk_count == 64) emulator::fail("more copies under way than the emulator holds");
    memset(to, 0xff, bytes);
    emulator::bulks[emulator::bulk_count++] = {(char*)to, (const char*)from, bytes, at};
}
DEVICE void wait_turn(Turnstile* at, int parity) {
    while (at->turn == parity) {
        int left = 0;
        for (int i = 0; i < emulator::bulk_count; i++) {
            const emulator::Bulk bulk = emulator::bulks[i];
            if (bulk.at != at) {
                emulator::bulks[left++] = bulk;
                continue;
            }
            memcpy(bulk.to, bulk.from, bulk.bytes);
            at->bytes -= bulk.bytes;
        }
        emulator::bulk_count = left;
        emulator::pass(at);
        if (at->turn == parity) emulator::yield();
    }
}

// A lane's words of A are taken when a product is asked for: that they stay as they are until it is made is not checked.
template <typename T>
DEVICE void settle(T&) {}
DEVICE void begin_wgmma() {}
DEVICE void commit_wgmma() { emulator::pending[emulator::current].group++; }

template <typename T>
DEVICE T uniform(T value) { return value; }

typedef const uint4* Operand;
DEVICE Operand operand_of(const uint4* b) { return b; }
#define WGMMA(NAME)                                                                                                \
    template <typename C, int COUNT>                                                                               \
    DEVICE void NAME(C (&d)[COUNT], uint4 a, Operand b, bool add) {                                                \
        emulator::Pending& mine = emulator::pending[emulator::current];                                            \
        if (mine.count == 64) emulator::fail("more products under way than the emulator holds");                   \
        mine.asked[mine.count++] = {d, COUNT, {a.x, a.y, a.z, a.w}, (const char*)b, add, mine.group};              \
    }
WGMMA(wgmma_bf16)
WGMMA(wgmma_f16)
WGMMA(wgmma_u8s8)
WGMMA(wgmma_s8s8)
#undef WGMMA

template <int N>
DEVICE void wait_wgmma() {
    const int me = emulator::current;
    emulator::Pending& mine = emulator::pending[me];
    const int count = mine.count, until = mine.group - N;
    int made = 0;
    while (made < count && mine.asked[made].group < until) {
        const emulator::Asked asked = mine.asked[made++];
        if (INTEGER) {
            if (BITS == 8) emulator::make<int, int>(asked, 11, 4, as_s8, as_s8);
            else emulator::make<int, int>(asked, 12, 4, as_u8, as_s8);
        } else if (HALF) emulator::make<float, double>(asked, 13, 2, f16_to_float, f16_to_float);
        else emulator::make<float, double>(asked, 14, 2, bf16_to_float, bf16_to_float);
    }
    mine.count = count - made;
    for (int i = 0; i < mine.count; i++) mine.asked[i] = mine.asked[i + made];
    if (count == made && N == 0) mine.group = 0;
}
