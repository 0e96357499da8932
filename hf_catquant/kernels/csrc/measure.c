/* What this machine can do at most: reading memory, and multiplying integers. */
#include "catquant.h"

#include <stdatomic.h>

typedef struct {
    const uint64_t *memory;
    int64_t words, tasks, rounds;
    int path;
    atomic_uint_fast64_t sum; /* kept, so that no loop is left out */
} job;

static void read_task(void *context, int64_t index)
{
    job *j = context;
    const uint64_t *from = j->memory + j->words * index / j->tasks,
                   *to = j->memory + j->words * (index + 1) / j->tasks;
    uint64_t sum[8] = {0};
    for (; from + 8 <= to; from += 8) {
        __builtin_prefetch(from + 256);
        for (int i = 0; i < 8; ++i)
            sum[i] |= from[i];
    }
    for (int i = 1; i < 8; ++i)
        sum[0] |= sum[i];
    atomic_fetch_or(&j->sum, sum[0]);
}

/* Reads `bytes` of memory once. */
uint64_t cq_measure_read(const void *memory, int64_t bytes, int threads)
{
    job j = {.memory = memory, .words = bytes / 8, .tasks = threads == 1 ? 1 : 4 * threads};
    atomic_init(&j.sum, 0);
    cq_parallel(threads, j.tasks, read_task, &j);
    return atomic_load(&j.sum);
}

static void product_task(void *context, int64_t index)
{
    job *j = context;
    (void)index;
    if (j->path == CQ_AMX)
        cq_amx_peak(j->rounds);
    else
        cq_avx512_peak(j->rounds);
}

/* Multiplies pairs of 8-bit integers and adds them up, from registers, on every thread; returns how many pairs that
 * were, 0 where the path has no such instruction. */
int64_t cq_measure_products(int path, int64_t rounds, int threads)
{
    job j = {.rounds = rounds, .path = path, .tasks = threads};
    if (!cq_has_path(path) || (path != CQ_AMX && path != CQ_AVX512))
        return 0;
    cq_parallel(threads, threads, product_task, &j);
    return rounds * threads * (path == CQ_AMX ? CQ_AMX_PRODUCTS : CQ_AVX512_PRODUCTS);
}
