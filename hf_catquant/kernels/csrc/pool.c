/* Threads that share the tasks of one call and sleep between calls: those of torch's OpenMP where Python has named it,
 * since its threads wait awake for the next call and would hold up others, else threads of our own.
 *
 * Tasks are taken one by one from a counter, so a thread that the system holds up does not hold up the others; what a
 * task computes does not depend on who runs it. A thread that finds the pool in use, and a child after fork(), whose
 * parent's threads are not there, work alone or start threads of their own. Threads that find nothing to do look for
 * work for about as long as waking up takes, then sleep.
 */
#include "catquant.h"

#include <pthread.h>
#include <stdatomic.h>

#define MOST_HELPERS 255
#define LOOKS 2000 /* about 30 microseconds */

static pthread_mutex_t in_use = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER, done = PTHREAD_COND_INITIALIZER;
static int helpers;        /* threads that were started */
static atomic_uint turn;   /* counts calls */
static int wanted;         /* helpers of this call */
static atomic_int running; /* helpers that have not finished it */
static atomic_int_fast64_t next;
static int64_t count;
static void (*current)(void *, int64_t);
static void *argument;
static pthread_once_t fork_once = PTHREAD_ONCE_INIT;

/* GOMP_parallel(function, data, threads, flags), which every OpenMP library of gcc, clang and Intel has. */
typedef void (*parallel_region)(void (*)(void *), void *, unsigned, unsigned);
static parallel_region openmp;

void cq_use_openmp(void *function)
{
    openmp = (parallel_region)function;
}

static inline void pause_briefly(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void work(void)
{
    for (int64_t i; (i = atomic_fetch_add(&next, 1)) < count;)
        current(argument, i);
}

static void work_of_region(void *unused)
{
    (void)unused;
    work();
}

static void *helper(void *number)
{
    int self = (int)(intptr_t)number;
    unsigned seen = 0;
    for (;;) {
        for (int look = 0; look < LOOKS && atomic_load_explicit(&turn, memory_order_acquire) == seen; ++look)
            pause_briefly();
        pthread_mutex_lock(&lock);
        while (atomic_load(&turn) == seen)
            pthread_cond_wait(&wake, &lock);
        seen = atomic_load(&turn);
        int take = self < wanted;
        pthread_mutex_unlock(&lock);
        if (!take)
            continue;
        work();
        if (atomic_fetch_sub(&running, 1) == 1) {
            pthread_mutex_lock(&lock);
            pthread_cond_signal(&done);
            pthread_mutex_unlock(&lock);
        }
    }
    return NULL;
}

/* In a child after fork() only the forking thread is left. */
static void forget(void)
{
    helpers = 0;
    openmp = NULL; /* gcc's would wait for threads that are not there */
    pthread_mutex_init(&in_use, NULL);
    pthread_mutex_init(&lock, NULL);
    pthread_cond_init(&wake, NULL);
    pthread_cond_init(&done, NULL);
    atomic_store(&turn, 0);
    atomic_store(&running, 0);
}

static void watch_forks(void)
{
    pthread_atfork(NULL, NULL, forget);
}

/* Starts threads until there are `most`; returns how many there are. Called with the pool in use and the lock held. */
static int start(int most)
{
    pthread_attr_t detached;
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    pthread_t thread;
    while (helpers < most && helpers < MOST_HELPERS &&
           pthread_create(&thread, &detached, helper, (void *)(intptr_t)helpers) == 0)
        ++helpers;
    pthread_attr_destroy(&detached);
    return helpers < most ? helpers : most;
}

void cq_parallel(int threads, int64_t tasks, void (*task)(void *, int64_t), void *context)
{
    if (threads > tasks)
        threads = (int)tasks;
    if (threads <= 1 || pthread_mutex_trylock(&in_use) != 0) {
        for (int64_t i = 0; i < tasks; ++i)
            task(context, i);
        return;
    }
    pthread_once(&fork_once, watch_forks);
    if (openmp != NULL) {
        current = task;
        argument = context;
        count = tasks;
        atomic_store(&next, 0);
        openmp(work_of_region, NULL, (unsigned)threads, 0);
        pthread_mutex_unlock(&in_use);
        return;
    }
    pthread_mutex_lock(&lock);
    wanted = start(threads - 1);
    current = task;
    argument = context;
    count = tasks;
    atomic_store(&next, 0);
    atomic_store(&running, wanted);
    atomic_fetch_add(&turn, 1);
    pthread_cond_broadcast(&wake);
    pthread_mutex_unlock(&lock);
    work();
    for (int look = 0; look < LOOKS && atomic_load(&running) != 0; ++look)
        pause_briefly();
    if (atomic_load(&running) != 0) {
        pthread_mutex_lock(&lock);
        while (atomic_load(&running) != 0)
            pthread_cond_wait(&done, &lock);
        pthread_mutex_unlock(&lock);
    }
    pthread_mutex_unlock(&in_use);
}
