/* y = x w_hat^T + bias: packs rows of x chunk by chunk, then takes the runs of the weight, both in parallel.
 *
 * Every result is computed by one thread, in an order that depends on the shapes alone: it is the same for any number
 * of threads.
 */
#include "linear.h"

#include <string.h>

/* Bytes of packed x that are multiplied before the next rows are packed: what stays in a second-level cache beside the
 * weight. */
#define HELD_BYTES (3 << 19)
/* The same of a thread that packs what it multiplies. */
#define OWN_BYTES (3 << 17)
/* Rows of x for each thread from which threads pack for themselves. */
#define ROWS_A_THREAD 32
/* Bytes of a weight that a second-level cache does not hold. */
#define LARGE_WEIGHT (1 << 20)
/* Products that are worth another thread: about ten microseconds of one. Tests have fewer. */
#if !defined(PRODUCTS_A_THREAD)
#define PRODUCTS_A_THREAD (1 << 21)
#endif

/* Rows of x with 1, 2 and 3 digits from which tiles, which cost the same for 1 to 16 rows, beat dot products. */
static const int rows_for_tiles[CQ_MAX_PARTS] = {9, 7, 5};
/* The same from which floats, where the path has them, beat digits: of at most 4 bits, and of 8 by 2 times 4. */
static const int rows_for_floats[2][CQ_MAX_PARTS] = {{24, 24, 12}, {8, 8, 4}};

static cq_chunk chunk_at(const job *j, const held_rows *held, int64_t index)
{
    cq_chunk chunk;
    int64_t left = j->rows - (held->first + index) * j->chunk_rows;
    cq_chunk_place(j->w, j->chunk_rows, j->how->parts, held->memory + (size_t)index * j->chunk_bytes, &chunk);
    chunk.filled = (int)(left < j->chunk_rows ? left : j->chunk_rows);
    return chunk;
}

/* Chunks whose rows are packed, or their results stored, together. */
static int together(const job *j)
{
    return j->window == NULL ? 1 : CQ_WINDOW_ROWS / j->chunk_rows;
}

/* Packs the chunks from `first`, together() of them. */
static void pack_chunks(job *j, const held_rows *held, int64_t first)
{
    int most = together(j), count = 0;
    cq_chunk chunk[CQ_WINDOW_ROWS];
    float *scratch = cq_scratch(1, (size_t)j->w->columns * (j->window == NULL ? 2 : CQ_MAX_ROWS) * 4);
    int state = scratch == NULL ? CQ_NO_MEMORY : CQ_OK;
    int64_t row = (held->first + first) * j->chunk_rows;
    for (; count < most && first + count < held->chunks; ++count)
        chunk[count] = chunk_at(j, held, first + count);
    if (state == CQ_OK && j->window == NULL)
        state = j->path->pack(j->w, j->how, j->x, j->dtype, j->x_stride, row, chunk, scratch);
    else if (state == CQ_OK && !j->how->quantized)
        state = j->path->pack_window(j->w, j->x, j->dtype, j->window, row, chunk, count, scratch);
    else if (state == CQ_OK)
        j->path->pack_lines(j->w, j->how->scale, &held->lines, j->window, row, chunk, count, scratch);
    if (state != CQ_OK)
        atomic_store(&j->state, state);
}

/* The lines of x under the kernel for the rows `first` to `last`: some of one image, or all of several. */
static cq_lines lines_under(const cq_window *g, int64_t first, int64_t last)
{
    int64_t top = first / g->out_width, bottom = last / g->out_width, end;
    cq_lines found = {.image = top / g->out_height, .lines = g->height};
    found.images = bottom / g->out_height - found.image + 1;
    if (found.images > 1)
        return found;
    top = top % g->out_height * g->stride_y - g->pad_y;
    end = bottom % g->out_height * g->stride_y - g->pad_y + (g->kernel_height - 1) * g->dilation_y + 1;
    found.top = top < 0 ? 0 : top < g->height ? top : g->height - 1;
    found.lines = (end < g->height ? end : g->height) - found.top;
    found.lines = found.lines < 1 ? 1 : found.lines;
    return found;
}

static size_t bytes_of_lines(const cq_window *g, const cq_lines *held)
{
    size_t values = (size_t)(held->images * g->channels * held->lines * g->width);
    return (values + 2 * CQ_MARGIN + 63) / 64 * 64;
}

/* Fills them in; 0 if a value is not finite. */
static int fill_lines(const job *j, const cq_lines *held)
{
    const cq_window *g = j->window;
    int64_t planes = held->images * g->channels, first = held->image * g->channels, beside = 1;
    if (held->lines == g->height) /* one after the other */
        beside = planes;
    for (int64_t p = 0; p < planes; p += beside) {
        const char *x = j->x + ((first + p) * g->height + held->top) * g->width * cq_size_of(j->dtype);
        /* The lines of the next channel are on another page, where no processor looks ahead. */
        if (p + beside < planes)
            for (int64_t at = 0; at < held->lines * g->width * cq_size_of(j->dtype); at += 64)
                __builtin_prefetch(x + g->height * g->width * cq_size_of(j->dtype) + at);
        if (!j->path->integers(x, j->dtype, beside * held->lines * g->width, j->how,
                               held->integers + p * held->lines * g->width))
            return 0;
    }
    return 1;
}

/* Rows of w in a run: the last one may have fewer than 16. */
static int rows_of(const cq_layout *w, int64_t run)
{
    int64_t left = w->rows - run * CQ_LANES;
    return left < CQ_LANES ? (int)left : CQ_LANES;
}

void cq_put(const job *j, float *result, int64_t first, int filled, int64_t run)
{
    int64_t size = cq_size_of(j->dtype), row = run * CQ_LANES;
    const void *bias = j->bias == NULL ? NULL : j->bias + row * cq_size_of(j->bias_dtype);
    for (int m = 0; m < filled; ++m)
        j->path->store(result + m * CQ_LANES, bias, j->bias_dtype, j->out + ((first + m) * j->out_stride + row) * size,
                       j->dtype, rows_of(j->w, run));
}

/* As cq_put(), CQ_WINDOW_ROWS at most, into channels (batch, rows of w, positions): positions lie side by side. */
static void put_channels(const job *j, float *result, int64_t first, int filled, int64_t run)
{
    int64_t size = cq_size_of(j->dtype), positions = j->window->out_height * j->window->out_width;
    int64_t row = run * CQ_LANES;
    int count = rows_of(j->w, run);
    float shift[CQ_LANES] = {0};
    if (j->bias != NULL)
        j->path->widen(j->bias + row * cq_size_of(j->bias_dtype), j->bias_dtype, count, shift);
    for (int m = 0, beside; m < filled; m += beside) {
        int64_t image = (first + m) / positions, at = (first + m) % positions;
        int most = filled - m < CQ_MAX_ROWS ? filled - m : CQ_MAX_ROWS;
        beside = positions - at < most ? (int)(positions - at) : most;
        j->path->store_lanes(result + m * CQ_LANES, beside, shift, count,
                             j->out + ((image * j->w->rows + row) * positions + at) * size, positions, j->dtype);
    }
}

/* Multiplies what is held by the runs `from` to `to`. */
static void multiply_runs(job *j, const held_rows *held, int64_t from, int64_t to)
{
    const cq_layout *w = j->w;
    float result[CQ_WINDOW_ROWS * CQ_LANES];
    int most = together(j);
    for (int64_t run = from; run < to; ++run) {
        for (int64_t c = 0; c < held->chunks; c += most) {
            int filled = 0;
            for (int i = 0; i < most && c + i < held->chunks; ++i) {
                cq_chunk chunk = chunk_at(j, held, c + i);
                j->path->run(w, run, &chunk, result + i * j->chunk_rows * CQ_LANES);
                filled += chunk.filled;
            }
            (j->window == NULL ? cq_put : put_channels)(j, result, (held->first + c) * j->chunk_rows, filled, run);
        }
    }
}

static void pack_task(void *context, int64_t index)
{
    job *j = context;
    pack_chunks(j, &j->held, index * together(j));
}

static void run_task(void *context, int64_t index)
{
    job *j = context;
    multiply_runs(j, &j->held, j->w->runs * index / j->spans, j->w->runs * (index + 1) / j->spans);
}

/* Memory of this thread for the chunks, and the integers that they need; 0 if the job has ended. */
static int hold(job *j, held_rows *held)
{
    int is_given = j->window != NULL && j->how->quantized, state = CQ_OK;
    int64_t row = held->first * j->chunk_rows, end = row + held->chunks * j->chunk_rows;
    size_t size = (size_t)held->chunks * j->chunk_bytes, more = j->table_bytes;
    if (is_given) {
        held->lines = lines_under(j->window, row, (end < j->rows ? end : j->rows) - 1);
        more = bytes_of_lines(j->window, &held->lines);
    }
    held->memory = cq_scratch(0, size + more);
    if (held->memory == NULL) {
        state = CQ_NO_MEMORY;
    } else if (is_given) {
        held->lines.integers = (int8_t *)held->memory + size + CQ_MARGIN;
        state = fill_lines(j, &held->lines) ? CQ_OK : CQ_NOT_FINITE;
    }
    if (state != CQ_OK)
        atomic_store(&j->state, state);
    return state == CQ_OK;
}

/* Packs a block of chunks and multiplies it by all runs: no other thread reads what this one packed. */
static void block_task(void *context, int64_t index)
{
    job *j = context;
    held_rows own = {.first = j->chunks * index / j->blocks};
    own.chunks = j->chunks * (index + 1) / j->blocks - own.first;
    if (!hold(j, &own))
        return;
    for (int64_t c = 0; c < own.chunks; c += together(j))
        pack_chunks(j, &own, c);
    if (atomic_load(&j->state) == CQ_OK)
        multiply_runs(j, &own, 0, j->w->runs);
}

static void lookup_task(void *context, int64_t index)
{
    job *j = context;
    const cq_layout *w = j->w;
    float result[4 * CQ_LANES];
    cq_chunk chunk = chunk_at(j, &j->held, 0);
    int64_t to = w->runs * (index + 1) / j->spans;
    for (int64_t run = w->runs * index / j->spans, done; run < to; run += done) {
        done = cq_lookup_runs(w, run, to - run, &chunk, j->tables, result);
        for (int64_t i = 0; i < done; ++i) {
            cq_put(j, result + i * CQ_LANES, 0, 1, run + i);
        }
    }
}

static void amx_task(void *context, int64_t index)
{
    job *j = context;
    int64_t span = index / j->chunk_spans, part = index % j->chunk_spans, pairs = (j->w->runs + 1) / 2;
    int64_t from = pairs * span / j->spans, to = pairs * (span + 1) / j->spans;
    int64_t first = j->held.chunks * part / j->chunk_spans,
            count = j->held.chunks * (part + 1) / j->chunk_spans - first;
    cq_chunk chunk[HELD_BYTES / (16 * CQ_TILE) + 2];
    for (int64_t c = 0; c < count; ++c)
        chunk[c] = chunk_at(j, &j->held, first + c);
    char *out = j->out + (j->held.first + first) * j->chunk_rows * j->out_stride * cq_size_of(j->dtype);
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

/* Every thread multiplies all that is packed by some of the runs. */
static int multiply(job *j, int threads)
{
    int64_t chunks = j->chunks, held = held_chunks(j, chunks);
    int64_t runs = j->amx ? (j->w->runs + 1) / 2 : j->w->runs;
    void (*task)(void *, int64_t) = j->amx ? amx_task : j->table_bytes != 0 ? lookup_task : run_task;
    for (int64_t first = 0; first < chunks; first += held) {
        j->held.first = first;
        j->held.chunks = chunks - first < held ? chunks - first : held;
        if (!hold(j, &j->held))
            break;
        j->tables = (uint8_t *)j->held.memory + (size_t)j->held.chunks * j->chunk_bytes;
        int64_t packs = (j->held.chunks + together(j) - 1) / together(j);
        cq_parallel(j->held.chunks < 4 ? 1 : threads, packs, pack_task, j);
        if (atomic_load(&j->state) != CQ_OK)
            break;
        if (task == lookup_task) {
            cq_chunk chunk = chunk_at(j, &j->held, 0);
            cq_lookup_build(j->w, &chunk, j->tables);
        }
        j->spans = threads == 1 ? 1 : runs < 4 * threads ? runs : 4 * threads;
        j->chunk_spans = !j->amx || j->spans >= 2 * threads || threads == 1 ? 1 : (j->held.chunks + 7) / 8;
        cq_parallel(threads, j->spans * j->chunk_spans, task, j);
    }
    return atomic_load(&j->state);
}

/* Every thread multiplies what it packs by all runs. */
static int multiply_blocks(job *j, int threads)
{
    int64_t most = 1 + (int64_t)(OWN_BYTES / j->chunk_bytes), least = (j->chunks + most - 1) / most;
    j->blocks = (least + threads - 1) / threads * threads;
    cq_parallel(threads, j->blocks, block_task, j);
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
    threads = useful < threads ? (int)useful : threads;
    int is_float = j->path->panel != NULL && j->window == NULL && !j->how->quantized;
    if (is_float && j->rows >= rows_for_floats[w->format == CQ_INT8][parts - 1])
        return cq_multiply_as_floats(j, threads);
    j->chunks = (j->rows + j->chunk_rows - 1) / j->chunk_rows;
    /* Each thread that packs for itself reads all of the weight: a large one only where rows are many. */
    int is_large = j->window == NULL && threads > 1 && w->bytes > LARGE_WEIGHT;
    int is_own = !j->amx && j->rows >= (is_large ? 16 : 1) * ROWS_A_THREAD * threads;
    return is_own ? multiply_blocks(j, threads) : multiply(j, threads);
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
