/* y = x w_hat^T + bias: packs rows of x chunk by chunk, then takes the runs of the weight, both in parallel.
 *
 * Every result is computed by one thread, in an order that depends on the shapes alone: it is the same for any number
 * of threads.
 */
#include "catquant.h"

#include <stdatomic.h>
#include <string.h>

/* Bytes of packed x that are multiplied before the next rows are packed: what stays in a second-level cache beside the
 * weight. */
#define HELD_BYTES (3 << 19)
/* Products that are worth another thread: about ten microseconds of one. */
#define PRODUCTS_A_THREAD (1 << 21)

/* Rows of x with 1, 2 and 3 digits from which tiles, which cost the same for 1 to 16 rows, beat dot products. */
static const int rows_for_tiles[CQ_MAX_PARTS] = {9, 7, 5};

typedef struct {
    const cq_layout *w;
    const cq_activation *how;
    const cq_path *path;
    const char *x;
    const char *bias;
    char *out;
    const cq_window *window; /* of a convolution, whose results go to (batch, rows of w, positions); NULL: none */
    int64_t rows, x_stride, out_stride;
    int dtype, bias_dtype, chunk_rows, amx;
    char *memory;
    uint8_t *tables; /* of the one row of x whose sums are looked up, where table_bytes is not 0 */
    size_t chunk_bytes, table_bytes;
    int64_t first, chunks;      /* those held now */
    int64_t spans, chunk_spans; /* parts that the runs and the chunks are cut in */
    atomic_int state;
} job;

static int size_of(int dtype)
{
    return dtype == CQ_FLOAT32 ? 4 : 2;
}

static cq_chunk chunk_at(const job *j, int64_t index)
{
    cq_chunk chunk;
    int64_t left = j->rows - (j->first + index) * j->chunk_rows;
    cq_chunk_place(j->w, j->chunk_rows, j->how->parts, j->memory + (size_t)index * j->chunk_bytes, &chunk);
    chunk.filled = (int)(left < j->chunk_rows ? left : j->chunk_rows);
    return chunk;
}

/* Chunks whose rows are packed, or their results stored, together. */
static int together(const job *j)
{
    return j->window == NULL ? 1 : CQ_MAX_ROWS / j->chunk_rows;
}

static void pack_task(void *context, int64_t index)
{
    job *j = context;
    int most = together(j), count = 0;
    cq_chunk chunk[CQ_MAX_ROWS];
    float *scratch = cq_scratch(1, (size_t)j->w->columns * (j->window == NULL ? 2 : CQ_MAX_ROWS) * 4);
    int state = CQ_NO_MEMORY;
    int64_t first = index * most, row = (j->first + first) * j->chunk_rows;
    for (; count < most && first + count < j->chunks; ++count)
        chunk[count] = chunk_at(j, first + count);
    if (scratch != NULL && j->window == NULL)
        state = j->path->pack(j->w, j->how, j->x, j->dtype, j->x_stride, row, chunk, scratch);
    else if (scratch != NULL)
        state = j->path->pack_window(j->w, j->how, j->x, j->dtype, j->window, row, chunk, count, scratch);
    if (state != CQ_OK)
        atomic_store(&j->state, state);
}

/* Results (filled, 16) of rows `first` and on, plus bias, for the rows of w from `row`. */
static void put(const job *j, float *result, int64_t first, int filled, int64_t row, int count)
{
    int64_t size = size_of(j->dtype);
    const void *bias = j->bias == NULL ? NULL : j->bias + row * size_of(j->bias_dtype);
    for (int m = 0; m < filled; ++m)
        j->path->store(result + m * CQ_LANES, bias, j->bias_dtype, j->out + ((first + m) * j->out_stride + row) * size,
                       j->dtype, count);
}

/* The same into channels (batch, rows of w, positions): positions lie side by side. `tile` (16, 16) is spent. */
static void put_channels(const job *j, float *tile, int64_t first, int filled, int64_t row, int count)
{
    int64_t size = size_of(j->dtype), positions = j->window->out_height * j->window->out_width;
    float shift[CQ_LANES] = {0};
    if (j->bias != NULL)
        j->path->widen(j->bias + row * size_of(j->bias_dtype), j->bias_dtype, count, shift);
    j->path->transpose(tile);
    for (int lane = 0; lane < count; ++lane)
        for (int m = 0; m < CQ_LANES; ++m)
            tile[lane * CQ_LANES + m] += shift[lane];
    for (int m = 0, run; m < filled; m += run) {
        int64_t image = (first + m) / positions, at = (first + m) % positions;
        run = positions - at < filled - m ? (int)(positions - at) : filled - m;
        char *out = j->out + ((image * j->w->rows + row) * positions + at) * size;
        for (int lane = 0; lane < count; ++lane) {
            float line[CQ_LANES] = {0}; /* store() reads all of them */
            memcpy(line, tile + lane * CQ_LANES + m, (size_t)(CQ_LANES - m) * 4);
            j->path->store(line, NULL, 0, out + lane * positions * size, j->dtype, run);
        }
    }
}

static void run_task(void *context, int64_t index)
{
    job *j = context;
    const cq_layout *w = j->w;
    float result[CQ_MAX_ROWS * CQ_LANES] = {0};
    int64_t from = w->runs * index / j->spans, to = w->runs * (index + 1) / j->spans;
    int most = together(j);
    for (int64_t run = from; run < to; ++run) {
        int64_t row = run * CQ_LANES;
        int count = (int)(w->rows - row < CQ_LANES ? w->rows - row : CQ_LANES);
        for (int64_t c = 0; c < j->chunks; c += most) {
            int filled = 0;
            for (int i = 0; i < most && c + i < j->chunks; ++i) {
                cq_chunk chunk = chunk_at(j, c + i);
                j->path->run(w, run, &chunk, result + i * j->chunk_rows * CQ_LANES);
                filled += chunk.filled;
            }
            (j->window == NULL ? put : put_channels)(j, result, (j->first + c) * j->chunk_rows, filled, row, count);
        }
    }
}

static void lookup_task(void *context, int64_t index)
{
    job *j = context;
    const cq_layout *w = j->w;
    float result[4 * CQ_LANES];
    cq_chunk chunk = chunk_at(j, 0);
    int64_t to = w->runs * (index + 1) / j->spans;
    for (int64_t run = w->runs * index / j->spans, done; run < to; run += done) {
        done = cq_lookup_runs(w, run, to - run, &chunk, j->tables, result);
        for (int64_t i = 0; i < done; ++i) {
            int64_t row = (run + i) * CQ_LANES;
            put(j, result + i * CQ_LANES, 0, 1, row, (int)(w->rows - row < CQ_LANES ? w->rows - row : CQ_LANES));
        }
    }
}

static void amx_task(void *context, int64_t index)
{
    job *j = context;
    int64_t span = index / j->chunk_spans, part = index % j->chunk_spans, pairs = (j->w->runs + 1) / 2;
    int64_t from = pairs * span / j->spans, to = pairs * (span + 1) / j->spans;
    int64_t first = j->chunks * part / j->chunk_spans, count = j->chunks * (part + 1) / j->chunk_spans - first;
    cq_chunk chunk[HELD_BYTES / (16 * CQ_TILE) + 2];
    for (int64_t c = 0; c < count; ++c)
        chunk[c] = chunk_at(j, first + c);
    char *out = j->out + (j->first + first) * j->chunk_rows * j->out_stride * size_of(j->dtype);
    cq_amx_begin();
    for (int64_t pair = from; pair < to; ++pair)
        cq_amx_pair(j->w, pair, chunk, (int)count, j->bias, j->bias_dtype, out, j->dtype, j->out_stride);
    cq_amx_end();
}

/* The chunks that are held at once: an even number with AMX, which takes two together, or all that are packed
 * together. */
static int64_t held_chunks(const job *j, int64_t chunks)
{
    int64_t most = (int64_t)(HELD_BYTES / j->chunk_bytes), step = j->window == NULL ? 2 : together(j);
    most = most < step ? step : most / step * step;
    return chunks < most ? chunks : most;
}

static int multiply(job *j, int threads)
{
    int64_t chunks = (j->rows + j->chunk_rows - 1) / j->chunk_rows, held = held_chunks(j, chunks);
    int64_t runs = j->amx ? (j->w->runs + 1) / 2 : j->w->runs;
    void (*task)(void *, int64_t) = j->amx ? amx_task : j->table_bytes != 0 ? lookup_task : run_task;
    j->memory = cq_scratch(0, (size_t)held * j->chunk_bytes + j->table_bytes);
    if (j->memory == NULL)
        return CQ_NO_MEMORY;
    j->tables = (uint8_t *)j->memory + (size_t)held * j->chunk_bytes;
    for (j->first = 0; j->first < chunks; j->first += held) {
        j->chunks = chunks - j->first < held ? chunks - j->first : held;
        int64_t packs = (j->chunks + together(j) - 1) / together(j);
        cq_parallel(j->chunks < 4 ? 1 : threads, packs, pack_task, j);
        if (atomic_load(&j->state) != CQ_OK)
            break;
        if (task == lookup_task) {
            cq_chunk chunk = chunk_at(j, 0);
            cq_lookup_build(j->w, &chunk, j->tables);
        }
        j->spans = threads == 1 ? 1 : runs < 4 * threads ? runs : 4 * threads;
        j->chunk_spans = !j->amx || j->spans >= 2 * threads || threads == 1 ? 1 : (j->chunks + 7) / 8;
        cq_parallel(threads, j->spans * j->chunk_spans, task, j);
    }
    return atomic_load(&j->state);
}

/* Chooses how to cut the job, and does it. */
static int start(job *j, int path, int threads)
{
    const cq_layout *w = j->w;
    int parts = j->how->parts;
    int64_t products = w->rows * w->columns * j->rows * parts;
    int64_t useful = 1 + products / PRODUCTS_A_THREAD;
    j->path = cq_path_of(path);
    j->amx = j->window == NULL && path == CQ_AMX && j->rows >= rows_for_tiles[parts - 1];
    j->chunk_rows = j->amx ? 16 : j->path->chunk_rows(parts, j->rows);
    j->chunk_bytes = cq_chunk_bytes(w, j->chunk_rows, parts);
    int wide = path == CQ_AVX512 || path == CQ_AMX;
    if (wide && j->window == NULL && j->rows == 1 && parts > 1 && w->format == CQ_BINARY && cq_has_lookup())
        j->table_bytes = cq_lookup_bytes(w, parts);
    atomic_init(&j->state, CQ_OK);
    return multiply(j, useful < threads ? (int)useful : threads);
}

/* Rows of x (row_stride elements apart, columns side by side) times the layout, plus bias (or NULL), into out (rows,
 * w->rows). Returns CQ_OK, or says why out holds nothing: CQ_NOT_FINITE, CQ_NO_MEMORY. */
int cq_linear(const cq_layout *w, const cq_activation *how, const void *x, int64_t rows, int64_t row_stride, int dtype,
              const void *bias, int bias_dtype, void *out, int path, int threads)
{
    job j = {.w = w,
             .how = how,
             .x = x,
             .bias = bias,
             .out = out,
             .rows = rows,
             .x_stride = row_stride,
             .out_stride = w->rows,
             .dtype = dtype,
             .bias_dtype = bias_dtype};
    return start(&j, path, threads);
}

/* Convolution of x (batch, channels, height, width) with the layout, whose columns are (channel, y, x), plus bias (or
 * NULL), into out (batch, w->rows, out_height, out_width). Returns as cq_linear() does. */
int cq_conv(const cq_layout *w, const cq_activation *how, const cq_window *window, const void *x, int dtype,
            const void *bias, int bias_dtype, void *out, int path, int threads)
{
    job j = {.w = w,
             .how = how,
             .x = x,
             .bias = bias,
             .out = out,
             .window = window,
             .rows = window->batch * window->out_height * window->out_width,
             .dtype = dtype,
             .bias_dtype = bias_dtype};
    return start(&j, path, threads);
}
