/* Which paths were compiled and which of them this processor runs. CQ_HAS_* come from setup.py. */
#include "catquant.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(CQ_HAS_AMX)
/* Tiles are 8 KiB of state that Linux saves for a thread only after the process has asked for it. */
static int may_use_tiles(void)
{
#if defined(__linux__)
    enum { ASK = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
#else
    return 0;
#endif
}

static int has_amx(void)
{
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d))
        return 0;
    return (d >> 24 & 1) && (d >> 25 & 1) && may_use_tiles();
}
#endif

#if defined(CQ_HAS_AVX512)
static int has_avx512(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma");
}
#endif

#if defined(CQ_HAS_NEON)
static int has_dot_products(void)
{
#if defined(__linux__)
    return getauxval(AT_HWCAP) >> 20 & 1; /* HWCAP_ASIMDDP */
#else
    return 1; /* Apple's processors have them all */
#endif
}
#endif

/* Whether this build and this processor have the path. */
int cq_has_path(int path)
{
    switch (path) {
    case CQ_SCALAR: return 1;
#if defined(CQ_HAS_AVX2)
    case CQ_AVX2:
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
#if defined(CQ_HAS_AVX512)
    case CQ_AVX512: return has_avx512();
#endif
#if defined(CQ_HAS_AMX)
    case CQ_AMX: return has_avx512() && has_amx();
#endif
#if defined(CQ_HAS_NEON)
    case CQ_NEON: return has_dot_products();
#endif
    default: return 0;
    }
}

/* Whether binary rows are looked up where a path of AVX-512 was chosen. */
int cq_has_lookup(void)
{
#if defined(CQ_HAS_LOOKUP)
    return __builtin_cpu_supports("avx512vbmi") != 0;
#else
    return 0;
#endif
}

#if !defined(CQ_SOURCES)
#define CQ_SOURCES ""
#endif

/* The sources that this library was built from, as setup.py names them: Python calls no other library. */
const char *cq_sources(void)
{
    return CQ_SOURCES;
}

const cq_path *cq_path_of(int path)
{
    switch (path) {
#if defined(CQ_HAS_AVX2)
    case CQ_AVX2: return &cq_avx2_path;
#endif
#if defined(CQ_HAS_AVX512)
    case CQ_AVX512:
    case CQ_AMX: return &cq_avx512_path;
#endif
#if defined(CQ_HAS_NEON)
    case CQ_NEON: return &cq_neon_path;
#endif
    default: return &cq_scalar_path;
    }
}

#if !defined(CQ_HAS_AMX) /* linear.c names these; it never calls them where cq_has_path(CQ_AMX) is 0 */
void cq_amx_pair(const cq_layout *w, int64_t pair, const cq_chunk *chunk, int chunks, const void *bias, int bias_dtype,
                 void *out, int dtype, int64_t out_stride)
{
    (void)w, (void)pair, (void)chunk, (void)chunks, (void)bias, (void)bias_dtype, (void)out, (void)dtype,
        (void)out_stride;
}
void cq_amx_begin(void)
{
}
void cq_amx_end(void)
{
}
void cq_amx_peak(int64_t rounds)
{
    (void)rounds;
}
#endif

#if !defined(CQ_HAS_AVX512)
void cq_avx512_peak(int64_t rounds)
{
    (void)rounds;
}
#endif

#if !defined(CQ_HAS_LOOKUP) /* linear.c names these; it never calls them where cq_has_lookup() is 0 */
size_t cq_lookup_bytes(const cq_layout *w, int parts)
{
    (void)w, (void)parts;
    return 0;
}
void cq_lookup_build(const cq_layout *w, const cq_chunk *chunk, uint8_t *tables)
{
    (void)w, (void)chunk, (void)tables;
}
int cq_lookup_runs(const cq_layout *w, int64_t first, int64_t runs, const cq_chunk *chunk, const uint8_t *tables,
                   float *result)
{
    (void)w, (void)first, (void)runs, (void)chunk, (void)tables, (void)result;
    return 1;
}
#endif
