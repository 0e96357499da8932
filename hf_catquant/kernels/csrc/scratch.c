/* Memory that a thread keeps between calls: at most about 2 MiB and what one pair of runs needs. Freed when the thread
 * ends. */
#include "catquant.h"

#include <pthread.h>
#include <stdlib.h>

static pthread_key_t key;
static pthread_once_t once = PTHREAD_ONCE_INIT;

typedef struct {
    void *memory[2];
    size_t bytes[2];
} scratch;

static void release(void *held)
{
    scratch *s = held;
    free(s->memory[0]);
    free(s->memory[1]);
    free(s);
}

static void make_key(void)
{
    pthread_key_create(&key, release);
}

void *cq_scratch(int slot, size_t bytes)
{
    pthread_once(&once, make_key);
    scratch *s = pthread_getspecific(key);
    if (s == NULL) {
        s = calloc(1, sizeof *s);
        if (s == NULL || pthread_setspecific(key, s) != 0) {
            free(s);
            return NULL;
        }
    }
    if (s->bytes[slot] < bytes) {
        free(s->memory[slot]);
        bytes = (bytes + 4095) / 4096 * 4096;
        s->memory[slot] = aligned_alloc(64, bytes);
        s->bytes[slot] = s->memory[slot] == NULL ? 0 : bytes;
    }
    return s->memory[slot];
}
