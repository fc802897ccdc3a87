/* One pass of a decoder over the rows of many sequences, all layers in one call.
 *
 * Rows are tokens: parts of prompts and the newest tokens of answers, side by side. Every matrix
 * product takes all rows at once, each with the change of its own adapter; attention looks at each
 * sequence's own pages. A row's arithmetic does not depend on the rows it shares a pass with, nor
 * on the number of threads: each of its sums is taken in one and the same order.
 *
 * Matrices are bfloat16 in strips of 16 columns, [columns / 16][depth / 2][16][2]: two numbers of a
 * column lie together, as VDPBF16PS multiplies them. Where there is that instruction, the rows'
 * numbers are rounded to bfloat16 before they are multiplied. Elsewhere they stay float32, and a
 * pair of a column is widened in registers, exactly, and takes two fused steps.
 * The residual stream, norms, angles, scores and sums are float32 everywhere.
 *
 * A page holds the keys and values of 16 tokens, of one layer and one group of heads that share
 * them, in bfloat16: keys as [head / 2][16][2], values as [head / 16][16 / 2][16][2], so that either
 * is made of strips. A head is stored with its width rounded up to 16.
 *
 * Compiled on the machine it runs on (forward.py, which also says what the fields of the structs
 * are); plain C with vectors of GCC and Clang. Not with -fassociative-math: order is a promise.
 */

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef UNIT /* numbers of a vector; tests set it */
#if defined(__AVX512F__)
#define UNIT 16
#elif defined(__AVX__)
#define UNIT 8
#else
#define UNIT 4
#endif
#endif
#ifdef __AVX512BF16__
#define ROUNDED /* rows' numbers are; tests set it */
#endif

#define STRIP 16               /* columns of a matrix that lie together */
#define VECTORS (STRIP / UNIT) /* of a strip */
#define ROWS 6                 /* of a tile */
#define STRIPS 4               /* of a tile, at most */
#ifndef FUSED
#define FUSED 2
#endif
#ifndef DEPTH
#define DEPTH 192              /* of a part of a strip, a multiple of 64: 12 KiB in float32 */
#endif
#define PAGE 16                /* tokens */
#define TILE 64                /* keys that attention looks at together */
#define QUERY_TOKENS 8         /* tokens of a task of attention, at most */
#define QUERY_ROWS 48          /* those, times the heads that share keys */
#define MAX_HEAD 256

typedef uint16_t half; /* bfloat16: the upper half of a float32 */
typedef float vec __attribute__((vector_size(UNIT * 4), aligned(UNIT * 4)));
typedef uint32_t words __attribute__((vector_size(UNIT * 4), aligned(UNIT * 4)));
typedef int32_t ints __attribute__((vector_size(UNIT * 4), aligned(UNIT * 4)));
typedef half halves __attribute__((vector_size(UNIT * 2), aligned(2)));
typedef int8_t signed_bytes __attribute__((vector_size(UNIT), aligned(1)));

#ifdef ROUNDED
typedef half act; /* what rows are multiplied in */
#else
typedef float act;
#endif

#define INLINE static inline __attribute__((always_inline))

/* ---- numbers ---- */

INLINE vec all(float x) { return x - (vec){0}; }

INLINE vec pick(ints which, vec a, vec b) {
    return (vec)((which & (ints)a) | (~which & (ints)b));
}

INLINE vec greater(vec a, vec b) { return pick(a > b, a, b); }

INLINE float widen(half x) {
    uint32_t bits = (uint32_t)x << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

INLINE half narrow(float x) { /* to nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (half)(x != x ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

INLINE halves narrows(vec x) {
#ifdef __AVX512BF16__
    return (halves)_mm512_cvtneps_pbh((__m512)x);
#else
    words bits = (words)x;
    words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    ints wrong = x != x;
    rounded = (words)((wrong & 0x7fc0) | (~wrong & (ints)rounded));
    return __builtin_convertvector(rounded, halves);
#endif
}

INLINE vec widens(halves x) { return (vec)(__builtin_convertvector(x, words) << 16); }

/* The next bytes as whole numbers. Compilers take them apart one by one, if they are not told. */
INLINE ints read_bytes(const void *from) {
#if UNIT == 16 && defined(__AVX512F__)
    return (ints)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from));
#elif UNIT == 8 && defined(__AVX2__)
    return (ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from));
#else
    return __builtin_convertvector(*(const signed_bytes *)from, ints);
#endif
}

/* What is multiplied: a row's numbers, and a strip's. */
INLINE vec first_of(words both) { return (vec)(both << 16); }
INLINE vec second_of(words both) { return (vec)(both & 0xffff0000u); }
#ifdef ROUNDED
INLINE vec pairs(vec sum, const act *x, words both) { /* sum + the products of a pair of a row */
#ifdef __AVX512BF16__
    uint32_t pair;
    memcpy(&pair, x, sizeof pair);
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)pair),
                                 (__m512bh)both);
#else
    sum += all(widen(x[0])) * first_of(both);
    return sum + all(widen(x[1])) * second_of(both);
#endif
}
INLINE act to_act(float x) { return narrow(x); }
INLINE void put_acts(act *to, vec x) { *(halves *)to = narrows(x); }
INLINE vec take_acts(const act *from) { return widens(*(const halves *)from); }
#else
INLINE act to_act(float x) { return x; }
INLINE void put_acts(act *to, vec x) { memcpy(to, &x, sizeof x); }
INLINE vec take_acts(const act *from) {
    vec x;
    memcpy(&x, from, sizeof x);
    return x;
}
#endif

/* x in a register: where compilers take it from memory each time, loads are what a product waits for. */
INLINE vec held(vec x) {
#if UNIT == 16 && defined(__AVX512F__)
    __asm__("" : "+v"(x));
#elif UNIT == 4 && defined(__x86_64__) || UNIT == 8 && defined(__AVX__)
    __asm__("" : "+x"(x));
#elif UNIT == 4 && defined(__aarch64__)
    __asm__("" : "+w"(x));
#endif
    return x;
}

/* exp(x) of numbers up to 88, with a relative error below 3e-7; below -87 it is as at -87. Reduced
 * to +-ln(2)/2; there a polynomial of degree 6 with Cephes' coefficients does. */
INLINE vec exponentials(vec x) {
    const float to_integer = 12582912.0f; /* 1.5 * 2^23: adding it drops the fraction */
    x = greater(x, all(-87.0f));
    vec n = (x * all(1.44269504088896341f) + all(to_integer)) - all(to_integer);
    vec r = n * all(-0.693359375f) + x;
    r = n * all(2.12194440e-4f) + r;
    vec p = all(1.9875691500e-4f);
    p = p * r + all(1.3981999507e-3f);
    p = p * r + all(8.3334519073e-3f);
    p = p * r + all(4.1665795894e-2f);
    p = p * r + all(1.6666665459e-1f);
    p = p * r + all(5.0000001201e-1f);
    vec value = p * (r * r) + (r + all(1.0f));
    ints power = (__builtin_convertvector(n, ints) + 127) << 23;
    return value * (vec)power;
}

INLINE int64_t share(int64_t total, int64_t index, int64_t count) { return total * index / count; }

/* ---- threads that meet ----
 *
 * Whoever waits looks for a while, then sleeps: looking is quicker, and where other processes want
 * the cores, whoever never sleeps keeps the late thread from running. */

typedef struct {
    atomic_int arrived, sleeping;
    atomic_uint phase; /* wraps around */
    int count, looks;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
} gate;

static void open_gate(gate *g, int count, int looks) {
    memset(g, 0, sizeof *g);
    g->count = count;
    g->looks = looks;
    pthread_mutex_init(&g->mutex, 0);
    pthread_cond_init(&g->changed, 0);
}

static void close_gate(gate *g) {
    pthread_cond_destroy(&g->changed);
    pthread_mutex_destroy(&g->mutex);
}

INLINE void breathe(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void wait_while(gate *g, unsigned phase) {
    for (int i = 0; i < g->looks; i++) {
        if (atomic_load_explicit(&g->phase, memory_order_acquire) != phase) return;
        breathe();
    }
    pthread_mutex_lock(&g->mutex);
    atomic_fetch_add(&g->sleeping, 1);
    while (atomic_load(&g->phase) == phase) pthread_cond_wait(&g->changed, &g->mutex);
    atomic_fetch_sub(&g->sleeping, 1);
    pthread_mutex_unlock(&g->mutex);
}

static void go_on(gate *g) {
    atomic_fetch_add(&g->phase, 1);
    if (atomic_load(&g->sleeping)) {
        pthread_mutex_lock(&g->mutex);
        pthread_cond_broadcast(&g->changed);
        pthread_mutex_unlock(&g->mutex);
    }
}

static void meet(gate *g) {
    if (g->count == 1) return;
    unsigned phase = atomic_load_explicit(&g->phase, memory_order_relaxed);
    if (atomic_fetch_add(&g->arrived, 1) == g->count - 1) {
        atomic_store_explicit(&g->arrived, 0, memory_order_relaxed);
        go_on(g);
    } else
        wait_while(g, phase);
}

/* ---- what a pass is given: the same structs stand in forward.py ---- */

enum { QKV, OUT, GATE_UP, DOWN, LINEARS };

/* How a strip's numbers are held. Those of few bits are a scale times a whole number from -127 on, or
 * the least one plus a scale times one from 0 to 15; scales and least ones are bfloat16.
 *   BFLOAT16  [depth / 2][16][2]
 *   FLOAT32   [depth][16]
 *   INT8      for each 64 of the depth: scales [16], numbers [64][16]
 *   INT4      for each 32 of the depth: scales [16], least [16], numbers [32 / 2][16], the even one of
 *             a pair in the lower half of a byte */
enum { BFLOAT16, FLOAT32, INT8, INT4, FORMATS };
#define GROUP_OF(FORMAT) (FORMAT == INT8 ? 64 : FORMAT == INT4 ? 32 : (int64_t)1 << 32)
#define GROUP_BYTES(FORMAT) (FORMAT == INT8 ? 64 * STRIP + 2 * STRIP : 32 / 2 * STRIP + 4 * STRIP)

typedef struct {
    const char *data;
    int64_t format;
} matrix;

typedef struct {
    const float *norms[2], *qkv_bias, *query_norm, *key_norm;
    matrix matrices[LINEARS];
} layer;

typedef struct {
    const half *a[LINEARS], *b[LINEARS];
} change_layer;

typedef struct {
    int64_t rank;
    const change_layer *layers;
} change;

typedef struct {
    int64_t layers, width, inner, heads, groups, head, vocabulary;
    int64_t window;
    double epsilon, scale;
    const layer *layer;
    const float *final_norm, *cosines, *sines;
    matrix embedding, lm_head; /* no embedding where the head is it too */
} model;

typedef struct {
    int64_t rows, changed, pages;
} limits;

typedef struct {
    int64_t first_row, rows, first_position;
    const int32_t *pages;
    const change *adapter;
} sequence;

typedef struct {
    double temperature, top_p, number; /* temperature 0: the likeliest token */
    int64_t top_k;                     /* 0: all */
} draw;

typedef struct {
    int64_t rows, sequences, outputs;
    const int32_t *tokens;
    const sequence *sequence;
    const int32_t *output_rows;
    const draw *draws;      /* of each output */
    float *logits;
    int32_t *chosen;
    half *keys, *values;
} pass;

typedef struct {
    float score;
    int32_t token;
} candidate;

typedef struct {
    const model *m;
    const pass *p;
    limits most;
    int64_t padded; /* width of a head as it is stored */
    int changed;    /* whether a row of this pass has an adapter */
    float *x, *qkv;
    act *h, *q, *y, *inner;
    half *no_page;
    float *weights;        /* [threads][vocabulary] */
    candidate *candidates; /* likewise */
    int32_t *sequence_of;
    float *sums;        /* [threads][rows][2 strips] */
    atomic_int task;
    gate inside, start;
    int threads, ending;
    pthread_t *handles;
} engine;

static const int64_t parts[LINEARS] = {3, 1, 2, 1};

size_t forward_size(int64_t which) {
    const size_t sizes[] = {sizeof(matrix), sizeof(layer),    sizeof(change_layer),
                            sizeof(change), sizeof(model),    sizeof(limits),
                            sizeof(sequence), sizeof(draw),   sizeof(pass)};
    return sizes[which];
}

/* Whether what is multiplied is rounded to bfloat16 first. */
int64_t forward_rounds(void) {
#ifdef ROUNDED
    return 1;
#else
    return 0;
#endif
}

/* ---- matrix products ---- */

INLINE int64_t strip_bytes(int64_t format, int64_t depth) {
    if (format == BFLOAT16) return depth * STRIP * 2;
    if (format == FLOAT32) return depth * STRIP * 4;
    if (format == INT8) return (depth + 63) / 64 * GROUP_BYTES(INT8);
    return (depth + 31) / 32 * GROUP_BYTES(INT4);
}

/* What a group of vector v of a strip has in common. */
typedef struct {
    vec scale, least;
} common;

INLINE common read_common(const int format, const char *group, int v) {
    common c = {{0}, {0}};
    const half *scales = (const half *)group + v * UNIT;
    if (format == INT8 || format == INT4) c.scale = widens(*(const halves *)scales);
    if (format == INT4) c.least = widens(*(const halves *)(scales + STRIP));
    return c;
}

/* The numbers of vector v of a strip at an even place k of a group, or with `odd` at the next. */
INLINE vec read_column(const int format, const char *group, int64_t k, int v, const int odd,
                       common c) {
    if (format == BFLOAT16) {
        words both = *(const words *)(group + (k * STRIP + v * UNIT * 2) * 2);
        return odd ? second_of(both) : first_of(both);
    }
    if (format == FLOAT32) return *(const vec *)(group + ((k + odd) * STRIP + v * UNIT) * 4);
    if (format == INT8) {
        ints n = read_bytes(group + 2 * STRIP + (k + odd) * STRIP + v * UNIT);
        return __builtin_convertvector(n, vec) * c.scale;
    }
    ints pair = read_bytes(group + 4 * STRIP + k / 2 * STRIP + v * UNIT);
    ints n = odd ? (pair >> 4) & 15 : pair & 15;
    return __builtin_convertvector(n, vec) * c.scale + c.least;
}

#ifdef ROUNDED
/* The same, of both places, as they are multiplied. */
INLINE words read_pair(const int format, const char *group, int64_t k, int v, common c) {
    if (format == BFLOAT16) return *(const words *)(group + (k * STRIP + v * UNIT * 2) * 2);
    words first = (words)read_column(format, group, k, v, 0, c);
    words second = (words)read_column(format, group, k, v, 1, c);
    first += 0x7fffu + ((first >> 16) & 1u);
    second += 0x7fffu + ((second >> 16) & 1u);
    return (first >> 16) | (second & 0xffff0000u);
}
#endif

/* sums += the products of R rows with N vectors of columns, for a pair of the depth. What is live at
 * once fits into the registers, and it is written in the order in which it is to be computed:
 * compilers that move the loads up run out of registers. */
#ifdef ROUNDED
#define PAIR(FORMAT, R, N)                                                                         \
    for (int j = 0; j < N; j++) {                                                                  \
        words both = read_pair(FORMAT, from[j / VECTORS], k, j % VECTORS, shared[j]);              \
        for (int i = 0; i < R; i++) sums[i][j] = pairs(sums[i][j], at + i * stride + k, both);     \
    }
#else
#define COLUMN(FORMAT, J, ODD)                                                                     \
    read_column(FORMAT, from[(J) / VECTORS], k, (J) % VECTORS, ODD, shared[J])
#define HALF_PAIR(FORMAT, R, N, ODD)                                                               \
    if (R < 4) {                                                                                   \
        vec number[R];                                                                             \
        for (int i = 0; i < R; i++) number[i] = all(at[i * stride + k + ODD]);                     \
        for (int j = 0; j < N; j++) {                                                              \
            vec column = COLUMN(FORMAT, j, ODD);                                                   \
            for (int i = 0; i < R; i++) sums[i][j] += number[i] * column;                          \
        }                                                                                          \
    } else {                                                                                       \
        vec column[N];                                                                             \
        for (int j = 0; j < N; j++) column[j] = held(COLUMN(FORMAT, j, ODD));                      \
        for (int i = 0; i < R; i++) {                                                              \
            vec number = all(at[i * stride + k + ODD]);                                            \
            for (int j = 0; j < N; j++) sums[i][j] += number * column[j];                          \
        }                                                                                          \
    }
#define PAIR(FORMAT, R, N) HALF_PAIR(FORMAT, R, N, 0) HALF_PAIR(FORMAT, R, N, 1)
#endif

/* out[R][S strips] = (or, with add, +=) the rows of x times the strips, over the depth in order. What
 * lies so many bytes ahead of the strips is fetched meanwhile: it is what comes next. */
#define TILE_OF(FORMAT, R, S)                                                                      \
    static void tile_##FORMAT##_##R##_##S(const act *x, int64_t stride, const char *const *strips, \
                                          int64_t depth, int64_t ahead, float *out, int64_t width, \
                                          int add) {                                               \
        vec sums[R][S * VECTORS];                                                                  \
        for (int i = 0; i < R; i++)                                                                \
            for (int j = 0; j < S * VECTORS; j++)                                                  \
                sums[i][j] = add ? *(vec *)(out + i * width + j * UNIT) : (vec){0};                \
        const char *from[S];                                                                       \
        for (int s = 0; s < S; s++) from[s] = strips[s];                                           \
        for (int64_t first = 0; first < depth; first += GROUP_OF(FORMAT)) {                        \
            const act *at = x + first;                                                             \
            int64_t end = depth - first < GROUP_OF(FORMAT) ? depth - first : GROUP_OF(FORMAT);     \
            common shared[S * VECTORS];                                                            \
            for (int j = 0; j < S * VECTORS; j++)                                                  \
                shared[j] = read_common(FORMAT, from[j / VECTORS], j % VECTORS);                   \
            if (FORMAT == INT8 || FORMAT == INT4)                                                  \
                for (int s = 0; s < S; s++)                                                        \
                    for (int b = 0; b < GROUP_BYTES(FORMAT); b += 64)                              \
                        __builtin_prefetch(from[s] + b + ahead, 0, 2);                             \
            for (int64_t k = 0; k < end; k += 2) {                                                 \
                if (FORMAT == BFLOAT16)                                                            \
                    for (int s = 0; s < S; s++)                                                    \
                        __builtin_prefetch(from[s] + k * STRIP * 2 + ahead, 0, 2);                 \
                PAIR(FORMAT, R, S * VECTORS)                                                       \
            }                                                                                      \
            for (int s = 0; s < S; s++) from[s] += GROUP_BYTES(FORMAT);                            \
        }                                                                                          \
        for (int i = 0; i < R; i++)                                                                \
            for (int j = 0; j < S * VECTORS; j++)                                                  \
                *(vec *)(out + i * width + j * UNIT) = sums[i][j];                                 \
    }
typedef void (*tile_function)(const act *, int64_t, const char *const *, int64_t, int64_t, float *,
                              int64_t, int);
#define FEW_OF(FORMAT)                                                                             \
    TILE_OF(FORMAT, 1, 1) TILE_OF(FORMAT, 1, 2) TILE_OF(FORMAT, 1, 3) TILE_OF(FORMAT, 1, 4)        \
    TILE_OF(FORMAT, 2, 1) TILE_OF(FORMAT, 2, 2) TILE_OF(FORMAT, 2, 3)                              \
    TILE_OF(FORMAT, 3, 1) TILE_OF(FORMAT, 3, 2)                                                    \
    TILE_OF(FORMAT, 4, 1) TILE_OF(FORMAT, 5, 1) TILE_OF(FORMAT, 6, 1)
FEW_OF(BFLOAT16) FEW_OF(FLOAT32) FEW_OF(INT8) FEW_OF(INT4)
#define NAMES_OF(F, R) {tile_##F##_##R##_1, tile_##F##_##R##_2, tile_##F##_##R##_3, tile_##F##_##R##_4}
#if UNIT == 16 /* 32 registers, one for a strip */
#define MORE_OF(FORMAT)                                                                            \
    TILE_OF(FORMAT, 2, 4) TILE_OF(FORMAT, 3, 3) TILE_OF(FORMAT, 3, 4) TILE_OF(FORMAT, 4, 2)        \
    TILE_OF(FORMAT, 4, 3) TILE_OF(FORMAT, 4, 4) TILE_OF(FORMAT, 5, 2) TILE_OF(FORMAT, 5, 3)        \
    TILE_OF(FORMAT, 5, 4) TILE_OF(FORMAT, 6, 2) TILE_OF(FORMAT, 6, 3) TILE_OF(FORMAT, 6, 4)
MORE_OF(BFLOAT16) MORE_OF(FLOAT32) MORE_OF(INT8) MORE_OF(INT4)
#define TILES_OF(F)                                                                                \
    {NAMES_OF(F, 1), NAMES_OF(F, 2), NAMES_OF(F, 3), NAMES_OF(F, 4), NAMES_OF(F, 5), NAMES_OF(F, 6)}
static const int most_strips[ROWS] = {4, 4, 4, 4, 4, 4};
#else
#define TILES_OF(F)                                                                                \
    {NAMES_OF(F, 1),                                                                               \
     {tile_##F##_2_1, tile_##F##_2_2, tile_##F##_2_3},                                             \
     {tile_##F##_3_1, tile_##F##_3_2},                                                             \
     {tile_##F##_4_1},                                                                             \
     {tile_##F##_5_1},                                                                             \
     {tile_##F##_6_1}}
static const int most_strips[ROWS] = {4, 3, 2, 1, 1, 1};
#endif
static const tile_function tile_of[FORMATS][ROWS][STRIPS] = {TILES_OF(BFLOAT16), TILES_OF(FLOAT32),
                                                             TILES_OF(INT8), TILES_OF(INT4)};

/* The same for any number of rows and strips. */
static void tiles(int64_t format, const act *x, int64_t stride, int64_t rows,
                  const char *const *strips, int64_t count, int64_t depth, int64_t ahead,
                  float *out, int64_t width, int add) {
    for (int64_t i = 0; i < rows; i += ROWS) {
        int64_t some = rows - i < ROWS ? rows - i : ROWS, most = most_strips[some - 1];
        for (int64_t s = 0; s < count; s += most)
            tile_of[format][some - 1][(count - s < most ? count - s : most) - 1](
                x + i * stride, stride, strips + s, depth, ahead, out + i * width + s * STRIP, width,
                add);
    }
}

/* A strip of few bits as one that is multiplied without more ado, to the same numbers. */
#ifdef ROUNDED
#define WIDENED BFLOAT16
#else
#define WIDENED FLOAT32
#endif
INLINE void widen_strip(const int format, const char *from, int64_t depth, char *to) {
    for (int64_t first = 0; first < depth; first += GROUP_OF(format)) {
        for (int v = 0; v < VECTORS; v++) {
            common c = read_common(format, from, v);
            for (int64_t k = 0; k < GROUP_OF(format) && first + k < depth; k += 2) {
#ifdef ROUNDED
                *(words *)(to + ((first + k) * STRIP + v * UNIT * 2) * 2) =
                    read_pair(format, from, k, v, c);
#else
                for (int odd = 0; odd < 2; odd++)
                    *(vec *)(to + ((first + k + odd) * STRIP + v * UNIT) * 4) =
                        read_column(format, from, k, v, odd, c);
#endif
            }
        }
        from += GROUP_BYTES(format);
    }
}

/* A group of one column, its numbers 16 bytes apart: scale, least and numbers of few bits. */
static void pack_group(int64_t format, const float *x, char *to, int64_t column) {
    const float to_integer = 12582912.0f; /* 1.5 * 2^23: adding it drops the fraction */
    int count = format == INT8 ? 64 : 32, steps = format == INT8 ? 127 : 15;
    float low = x[0], high = x[0], number[64];
    for (int k = 1; k < count; k++) {
        low = x[k] < low ? x[k] : low;
        high = x[k] > high ? x[k] : high;
    }
    half *shared = (half *)to + column;
    float least = 0, most = high > -low ? high : -low;
    if (format == INT4) {
        least = widen(shared[STRIP] = narrow(low));
        most = high - low;
    }
    shared[0] = narrow(most / (float)steps);
    float lowest = format == INT4 ? 0 : (float)-steps;
    float scale = widen(shared[0]), inverse = scale > 0 ? 1.0f / scale : 0;
    for (int k = 0; k < count; k++) {
        number[k] = (x[k] - least) * inverse + to_integer - to_integer;
        number[k] = number[k] > (float)steps ? (float)steps : number[k];
        number[k] = number[k] < lowest ? lowest : number[k];
    }
    if (format == INT8)
        for (int k = 0; k < 64; k++) to[2 * STRIP + k * STRIP + column] = (char)(int)number[k];
    else
        for (int k = 0; k < 32; k += 2)
            to[4 * STRIP + k / 2 * STRIP + column] =
                (char)((int)number[k] | (int)number[k + 1] << 4);
}

/* A matrix [columns][depth] in strips of few bits. */
void forward_pack(const float *x, int64_t columns, int64_t depth, int64_t format, char *to) {
    int64_t strips = (columns + STRIP - 1) / STRIP, group = format == INT8 ? 64 : 32;
    int64_t bytes = format == INT8 ? GROUP_BYTES(INT8) : GROUP_BYTES(INT4);
    for (int64_t c = 0; c < strips * STRIP; c++) {
        char *strip = to + c / STRIP * strip_bytes(format, depth);
        for (int64_t first = 0; first < depth; first += group, strip += bytes) {
            float part[64] = {0}; /* where columns lack */
            int64_t count = depth - first < group ? depth - first : group;
            if (c < columns) {
                memcpy(part, x + c * depth + first, (size_t)count * sizeof *part);
                for (int64_t k = count; k < group; k++) part[k] = part[count - 1];
            }
            pack_group(format, part, strip, c % STRIP);
        }
    }
}

enum { STORE, ADD, GATED };

typedef struct {
    int kind, linear, layer; /* linear: LINEARS where no adapter changes it */
    const act *x;
    matrix weights;
    int64_t rows, depth, columns;
    float *wide; /* STORE, ADD: [rows][columns] */
    act *acts;   /* GATED: [rows][columns / 2] */
} product;

/* Which part of an adapter's inner numbers changes a strip. */
static int64_t part_of(const model *m, int linear, int64_t strip) {
    int64_t queries = m->heads * m->head, keys = m->groups * m->head, column = strip * STRIP;
    if (linear == QKV) return column < queries ? 0 : column < queries + keys ? 1 : 2;
    return linear == GATE_UP ? strip % 2 : 0;
}

/* The sums of a row go on over its adapter's inner numbers: rounded once, as in training. */
static void add_changes(engine *e, const product *p, int64_t row, int64_t rows, int64_t strip,
                        int64_t count, float *out, int64_t width) {
    for (int64_t end; rows; row += end, out += end * width, rows -= end) {
        const change *adapter = e->p->sequence[e->sequence_of[row]].adapter;
        for (end = 1; end < rows; end++) /* rows of one adapter go together */
            if (e->p->sequence[e->sequence_of[row + end]].adapter != adapter) break;
        const half *b = adapter ? adapter->layers[p->layer].b[p->linear] : 0;
        if (!b) continue;
        for (int64_t s = 0; s < count; s++) {
            const char *from = (const char *)(b + (strip + s) * adapter->rank * STRIP);
            tiles(BFLOAT16, e->inner + row * e->most.changed +
                      adapter->rank * part_of(e->m, p->linear, strip + s),
                  e->most.changed, end, &from, 1, adapter->rank, 0, out + s * STRIP, width, 1);
        }
    }
}

/* What becomes of the sums of some rows and strips. */
static void finish(engine *e, const product *p, int64_t row, int64_t rows, int64_t strip,
                   int64_t count, float *sums, int64_t width) {
    if (p->linear != LINEARS && e->changed)
        add_changes(e, p, row, rows, strip, count, sums, width);
    int64_t column = strip * STRIP, used = count * STRIP;
    if (column + used > p->columns) used = p->columns - column;
    for (int64_t i = 0; i < rows; i++) {
        const float *from = sums + i * width;
        if (p->kind == GATED) { /* a strip of the gate, one of what it opens, in turn */
            act *to = p->acts + (row + i) * (p->columns / 2) + column / 2;
            for (int64_t c = 0; c < count / 2 * STRIP; c += UNIT) {
                const float *at = from + c + c / STRIP * STRIP;
                vec gate = *(const vec *)at, up = *(const vec *)(at + STRIP);
                vec below = exponentials(pick(gate < all(-88.0f), all(88.0f), -gate));
                put_acts(to + c, gate / (all(1.0f) + below) * up);
            }
            continue;
        }
        float *to = p->wide + (row + i) * p->columns + column;
        if (p->kind == STORE)
            memcpy(to, from, (size_t)used * sizeof *to);
        else
            for (int64_t c = 0; c < used; c++) to[c] += from[c];
    }
}

/* A thread's share of a product of few rows: as many strips at once as the registers hold. */
static void multiply_few(engine *e, const product *p, int index) {
    int64_t grain = p->kind == GATED ? 2 : 1, total = (p->columns + STRIP - 1) / STRIP / grain;
    int64_t format = p->weights.format, bytes = strip_bytes(format, p->depth);
    int64_t end = share(total, index + 1, e->threads) * grain;
    for (int64_t i = share(total, index, e->threads) * grain; i < end; i += STRIPS) {
        float sums[ROWS * STRIPS * STRIP] __attribute__((aligned(64)));
        const char *strips[STRIPS];
        int64_t count = end - i < STRIPS ? end - i : STRIPS;
        for (int64_t s = 0; s < count; s++) strips[s] = p->weights.data + (i + s) * bytes;
        tiles(format, p->x, p->depth, p->rows, strips, count, p->depth, count * bytes, sums,
              STRIPS * STRIP, 0);
        finish(e, p, 0, p->rows, i, count, sums, STRIPS * STRIP);
    }
}

/* A part of a strip's depth as it is multiplied; strips of few bits are widened for all rows. */
static const char *part_of_strip(int64_t format, int64_t multiplied, const char *strip,
                                 int64_t first, int64_t depth, char *widened) {
    const char *from = strip + strip_bytes(format, first);
    if (format == multiplied) return from;
    if (format == INT8)
        widen_strip(INT8, from, depth, widened);
    else
        widen_strip(INT4, from, depth, widened);
    return widened;
}

/* The same of many rows. A part of the depth of a strip goes over all rows while it is in the
 * innermost cache; then the sums go on over the next one. */
static void multiply_many(engine *e, const product *p, int index) {
    int64_t blocks = (p->rows + ROWS - 1) / ROWS, grain = p->kind == GATED ? 2 : 1;
    int64_t total = (p->columns + STRIP - 1) / STRIP / grain, width = grain * STRIP;
    int64_t format = p->weights.format, bytes = strip_bytes(format, p->depth);
    int64_t multiplied = (format == INT8 || format == INT4) && blocks > FUSED ? WIDENED : format;
    int64_t end = share(total * blocks, index + 1, e->threads);
    float *sums = e->sums + index * e->most.rows * 2 * STRIP;
    char widened[DEPTH * STRIP * 4] __attribute__((aligned(64)));
    for (int64_t i = share(total * blocks, index, e->threads), last; i < end; i = last) {
        int64_t strip = i / blocks * grain;
        last = (i / blocks + 1) * blocks;
        if (last > end) last = end;
        for (int64_t s = 0; s < grain; s++)
            for (int64_t first = 0; first < p->depth; first += DEPTH) {
                int64_t depth = p->depth - first < DEPTH ? p->depth - first : DEPTH;
                const char *from = part_of_strip(format, multiplied, p->weights.data + (strip + s) * bytes,
                                                 first, depth, widened);
                for (int64_t b = i; b < last; b++) {
                    int64_t row = share(p->rows, b % blocks, blocks);
                    tiles(multiplied, p->x + row * p->depth + first, p->depth,
                          share(p->rows, b % blocks + 1, blocks) - row, &from, 1, depth,
                          multiplied == format ? bytes * grain : 0, sums + row * width + s * STRIP,
                          width, first > 0);
                }
            }
        for (int64_t b = i; b < last; b++) {
            int64_t row = share(p->rows, b % blocks, blocks);
            finish(e, p, row, share(p->rows, b % blocks + 1, blocks) - row, strip, grain,
                   sums + row * width, width);
        }
    }
}

static void multiply(engine *e, const product *p, int index) {
    if (p->rows <= ROWS)
        multiply_few(e, p, index);
    else
        multiply_many(e, p, index);
}

/* The inner numbers, x A, of the rows whose adapter changes this linear layer; then all meet. */
static void prepare_change(engine *e, int number, int linear, const act *x, int64_t depth,
                           int index) {
    if (!e->changed) return;
    int any = 0;
    for (int64_t s = 0, task = 0; s < e->p->sequences; s++) {
        const sequence *q = &e->p->sequence[s];
        if (!q->adapter || !q->adapter->layers[number].a[linear]) continue;
        any = 1;
        int64_t strips = (q->adapter->rank * parts[linear] + STRIP - 1) / STRIP;
        int64_t groups = (strips + STRIPS - 1) / STRIPS, blocks = (q->rows + ROWS - 1) / ROWS;
        for (int64_t i = 0; i < groups * blocks; i++) {
            if (task++ % e->threads != index) continue;
            float sums[ROWS * STRIPS * STRIP] __attribute__((aligned(64)));
            const char *from[STRIPS];
            int64_t first = i / blocks * STRIPS, count = strips - first;
            if (count > STRIPS) count = STRIPS;
            for (int64_t j = 0; j < count; j++)
                from[j] = (const char *)(q->adapter->layers[number].a[linear] +
                                         (first + j) * depth * STRIP);
            int64_t row = q->first_row + share(q->rows, i % blocks, blocks);
            int64_t rows = q->first_row + share(q->rows, i % blocks + 1, blocks) - row;
            tiles(BFLOAT16, x + row * depth, depth, rows, from, count, depth, 0, sums, STRIPS * STRIP, 0);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t c = 0; c < count * STRIP; c += UNIT)
                    put_acts(e->inner + (row + r) * e->most.changed + first * STRIP + c,
                             *(vec *)(sums + r * STRIPS * STRIP + c));
        }
    }
    if (any) meet(&e->inside);
}

/* ---- norms, angles, pages ---- */

static float squares(const float *x, int64_t width) {
    float sums[16] = {0}, total = 0;
    int64_t i = 0;
    for (; i + 16 <= width; i += 16)
        for (int j = 0; j < 16; j++) sums[j] += x[i + j] * x[i + j];
    for (; i < width; i++) sums[0] += x[i] * x[i];
    for (int j = 0; j < 16; j++) total += sums[j];
    return total;
}

static void norm(const model *m, const float *x, const float *weight, act *out) {
    float scale = 1.0f / sqrtf(squares(x, m->width) / (float)m->width + (float)m->epsilon);
    for (int64_t i = 0; i < m->width; i++) out[i] = to_act(x[i] * scale * weight[i]);
}

static void norm_rows(engine *e, const float *weight, int index) {
    const model *m = e->m;
    int64_t end = share(e->p->rows, index + 1, e->threads);
    for (int64_t r = share(e->p->rows, index, e->threads); r < end; r++)
        norm(m, e->x + r * m->width, weight, e->h + r * m->width);
}

static void turn(const model *m, float *x, const float *weight, int64_t position) {
    int64_t middle = m->head / 2;
    const float *cosine = m->cosines + position * middle, *sine = m->sines + position * middle;
    if (weight) {
        float scale = 1.0f / sqrtf(squares(x, m->head) / (float)m->head + (float)m->epsilon);
        for (int64_t i = 0; i < m->head; i++) x[i] *= scale * weight[i];
    }
    for (int64_t i = 0; i < middle; i++) {
        float low = x[i], high = x[i + middle];
        x[i] = low * cosine[i] - high * sine[i];
        x[i + middle] = high * cosine[i] + low * sine[i];
    }
}

INLINE half *page_of(const engine *e, half *cache, int32_t page, int64_t number, int64_t group) {
    return cache + ((number * e->most.pages + page) * e->m->groups + group) * PAGE * e->padded;
}

/* Pages that begin in this pass are emptied: a value that is not there yet counts, times nought. */
static void empty_pages(engine *e, int index) {
    const model *m = e->m;
    size_t bytes = (size_t)(m->groups * PAGE * e->padded) * sizeof(half);
    for (int64_t s = 0, task = 0; s < e->p->sequences; s++) {
        const sequence *q = &e->p->sequence[s];
        int64_t page = (q->first_position + PAGE - 1) / PAGE;
        for (; page * PAGE < q->first_position + q->rows; page++)
            if (task++ % e->threads == index)
                for (int64_t n = 0; n < m->layers; n++) {
                    memset(page_of(e, e->p->keys, q->pages[page], n, 0), 0, bytes);
                    memset(page_of(e, e->p->values, q->pages[page], n, 0), 0, bytes);
                }
    }
}

/* Turns queries and keys by their positions and puts keys and values into their pages. */
static void place_rows(engine *e, int64_t number, int index) {
    const model *m = e->m;
    const layer *l = &m->layer[number];
    int64_t queries = m->heads * m->head, keys = m->groups * m->head, columns = queries + 2 * keys;
    int64_t end = share(e->p->rows, index + 1, e->threads);
    for (int64_t r = share(e->p->rows, index, e->threads); r < end; r++) {
        const sequence *s = &e->p->sequence[e->sequence_of[r]];
        int64_t position = s->first_position + r - s->first_row, place = position % PAGE;
        float *x = e->qkv + r * columns;
        if (l->qkv_bias)
            for (int64_t i = 0; i < columns; i++) x[i] += l->qkv_bias[i];
        for (int64_t h = 0; h < m->heads; h++) turn(m, x + h * m->head, l->query_norm, position);
        for (int64_t i = 0; i < queries; i++) e->q[r * queries + i] = to_act(x[i]);
        for (int64_t g = 0; g < m->groups; g++) {
            float *key = x + queries + g * m->head, *value = key + keys;
            half *k = page_of(e, e->p->keys, s->pages[position / PAGE], number, g);
            half *v = page_of(e, e->p->values, s->pages[position / PAGE], number, g);
            turn(m, key, l->key_norm, position);
            for (int64_t i = 0; i < m->head; i++) {
                k[i / 2 * PAGE * 2 + place * 2 + i % 2] = narrow(key[i]);
                v[(i / STRIP * PAGE + place / 2 * 2) * STRIP + i % STRIP * 2 + place % 2] = narrow(value[i]);
            }
        }
    }
}

/* ---- attention: softmax over tiles of 64 keys, from the first on ---- */

/* What a row of queries has seen so far. */
typedef struct {
    int64_t position;
    float most, total;
} seen;

/* Turns a row's scores into weights relative to the greatest so far, and corrects what it has. */
static void weigh_row(const engine *e, seen *row, int64_t first_key, float *scores, act *weights,
                      float *out) {
    int64_t visible = row->position - first_key + 1, hidden = 0;
    if (e->m->window) hidden = row->position - e->m->window + 1 - first_key;
    if (visible < TILE || hidden > 0)
        for (int64_t c = 0; c < TILE; c++)
            if (c >= visible || c < hidden) scores[c] = -INFINITY;
    vec tops = all(row->most), sums = {0};
    float most = row->most, total = 0;
    for (int c = 0; c < TILE; c += UNIT) tops = greater(*(vec *)(scores + c), tops);
    for (int j = 0; j < UNIT; j++) most = tops[j] > most ? tops[j] : most;
    if (most == -INFINITY) {
        memset(weights, 0, TILE * sizeof *weights);
        return;
    }
    vec scale = all((float)e->m->scale);
    for (int c = 0; c < TILE; c += UNIT) {
        vec score = *(vec *)(scores + c);
        vec weight = exponentials((score - all(most)) * scale);
        put_acts(weights + c, pick(score == all(-INFINITY), (vec){0}, weight));
        sums += take_acts(weights + c); /* what is really multiplied: all weights sum to 1 */
    }
    for (int j = 0; j < UNIT; j++) total += sums[j];
    if (most != row->most) {
        vec factor = exponentials(all((row->most - most)) * scale);
        if (row->most == -INFINITY) factor = (vec){0};
        row->total *= factor[0];
        for (int64_t c = 0; c < e->padded; c += UNIT) *(vec *)(out + c) *= factor;
        row->most = most;
    }
    row->total += total;
}

static void attend(engine *e, int64_t number, const sequence *s, int64_t group, int64_t first,
                   int64_t tokens) {
    const model *m = e->m;
    int64_t heads = m->heads / m->groups, rows = tokens * heads, width = m->heads * m->head;
    float out[QUERY_ROWS * MAX_HEAD] __attribute__((aligned(64)));
    float scores[QUERY_ROWS * TILE] __attribute__((aligned(64)));
    act weights[QUERY_ROWS * TILE] __attribute__((aligned(64)));
    act queries[QUERY_ROWS * MAX_HEAD];
    seen row[QUERY_ROWS];
    for (int64_t i = 0; i < rows; i++) {
        int64_t token = first + i / heads, head = group * heads + i % heads;
        memcpy(queries + i * m->head, e->q + (s->first_row + token) * width + head * m->head,
               (size_t)m->head * sizeof *queries);
        row[i] = (seen){s->first_position + token, -INFINITY, 0};
    }
    memset(out, 0, (size_t)(rows * e->padded) * sizeof *out);
    int64_t end = row[rows - 1].position + 1, key = 0, to_values = (e->p->values - e->p->keys) * 2;
    if (m->window && row[0].position >= m->window)
        key = (row[0].position - m->window + 1) / TILE * TILE;
    for (; key < end; key += TILE) {
        const char *keys[TILE / PAGE], *values[TILE / PAGE];
        for (int p = 0; p < TILE / PAGE; p++) {
            int there = key + p * PAGE < end;
            int32_t page = there ? s->pages[key / PAGE + p] : 0;
            half *none = e->no_page;
            keys[p] = (char *)(there ? page_of(e, e->p->keys, page, number, group) : none);
            values[p] = (char *)(there ? page_of(e, e->p->values, page, number, group) : none);
        }
        tiles(BFLOAT16, queries, m->head, rows, keys, TILE / PAGE, m->head, to_values, scores, TILE,
              0);
        for (int p = TILE / PAGE; p < 2 * TILE / PAGE && key + p * PAGE < end; p++) {
            const half *next = page_of(e, e->p->keys, s->pages[key / PAGE + p], number, group);
            for (int64_t k = 0; k < m->head; k += 2) __builtin_prefetch(next + k * PAGE, 0, 2);
        }
        for (int64_t i = 0; i < rows; i++)
            weigh_row(e, &row[i], key, scores + i * TILE, weights + i * TILE, out + i * e->padded);
        for (int p = 0; p < TILE / PAGE && key + p * PAGE < end; p++) {
            const char *from[MAX_HEAD / STRIP];
            for (int64_t c = 0; c < e->padded / STRIP; c++)
                from[c] = values[p] + c * strip_bytes(BFLOAT16, PAGE);
            tiles(BFLOAT16, weights + p * PAGE, TILE, rows, from, e->padded / STRIP, PAGE, 0, out,
                  e->padded, 1);
        }
    }
    for (int64_t i = 0; i < rows; i++) {
        int64_t token = first + i / heads, head = group * heads + i % heads;
        act *to = e->h + (s->first_row + token) * width + head * m->head;
        for (int64_t c = 0; c < m->head; c++)
            to[c] = to_act(out[i * e->padded + c] / row[i].total);
    }
}

/* Whoever is free takes the next task: long sequences take longer than short ones. */
static void attention(engine *e, int64_t number) {
    const model *m = e->m;
    int64_t most = QUERY_ROWS / (m->heads / m->groups), task = 0;
    if (most > QUERY_TOKENS) most = QUERY_TOKENS;
    int64_t mine = atomic_fetch_add(&e->task, 1);
    for (int64_t s = 0; s < e->p->sequences; s++) {
        const sequence *q = &e->p->sequence[s];
        for (int64_t first = 0; first < q->rows; first += most)
            for (int64_t g = 0; g < m->groups; g++) {
                if (task++ != mine) continue;
                attend(e, number, q, g, first, q->rows - first < most ? q->rows - first : most);
                mine = atomic_fetch_add(&e->task, 1);
            }
    }
}

/* ---- a pass ---- */

/* One number of a matrix. */
static float number_of(int64_t format, const char *strip, int64_t k, int64_t column) {
    int64_t group = format == INT8 ? k / 64 : format == INT4 ? k / 32 : 0;
    const char *from = strip + group * (format == INT8 ? GROUP_BYTES(INT8) : GROUP_BYTES(INT4));
    const half *shared = (const half *)from + column;
    if (format == BFLOAT16) return widen(((const half *)strip)[(k / 2 * STRIP + column) * 2 + k % 2]);
    if (format == FLOAT32) return ((const float *)strip)[k * STRIP + column];
    if (format == INT8)
        return (float)(int8_t)from[2 * STRIP + k % 64 * STRIP + column] * widen(shared[0]);
    int pair = (uint8_t)from[4 * STRIP + k % 32 / 2 * STRIP + column];
    return fmaf((float)(k % 2 ? pair >> 4 : pair & 15), widen(shared[0]), widen(shared[STRIP]));
}

static void embed(engine *e, int index) {
    const model *m = e->m;
    const matrix *table = m->embedding.data ? &m->embedding : &m->lm_head;
    int64_t end = share(e->p->rows, index + 1, e->threads);
    for (int64_t r = share(e->p->rows, index, e->threads); r < end; r++) {
        int64_t token = e->p->tokens[r];
        const char *strip = table->data + token / STRIP * strip_bytes(table->format, m->width);
        for (int64_t i = 0; i < m->width; i++)
            e->x[r * m->width + i] = number_of(table->format, strip, i, token % STRIP);
    }
}

INLINE int is_odd(float x) { /* infinite or not a number */
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (bits & 0x7f800000u) == 0x7f800000u;
}

static int compare(const void *left, const void *right) { /* likelier first, then by number */
    const candidate *a = left, *b = right;
    if (a->score != b->score) return a->score < b->score ? 1 : -1;
    return (a->token > b->token) - (a->token < b->token);
}

/* A token drawn by one number in [0, 1): temperature, then the k likeliest, then the nucleus of what
 * is left; tokens of equal score count in the order of their numbers. As sampler.py, which has the
 * same in torch. Only tokens that may be in the nucleus are sorted, because sorting is what costs. */
int32_t forward_draw(const float *x, int64_t words, float most, const draw *d, float *weights,
                     candidate *found) {
    int64_t w = 0, count = 0, kept = 0;
    double total = 0, mass = 0, sum = 0, target;
    float inverse = (float)(1.0 / (d->temperature > 1e-30 ? d->temperature : 1e-30));
    for (; w + UNIT <= words; w += UNIT) {
        vec score;
        memcpy(&score, x + w, sizeof score);
        score = (score - all(most)) * all(inverse);
        vec weight = pick(score < all(-87.0f), (vec){0}, exponentials(score));
        memcpy(weights + w, &weight, sizeof weight);
    }
    for (; w < words; w++) {
        vec score = all((x[w] - most) * inverse);
        weights[w] = score[0] < -87.0f ? 0.0f : exponentials(score)[0];
    }
    double sums[8] = {0};
    for (w = 0; w + 8 <= words; w += 8)
        for (int j = 0; j < 8; j++) sums[j] += weights[w + j];
    for (; w < words; w++) sums[0] += weights[w];
    for (int j = 0; j < 8; j++) total += sums[j];
    int64_t limit = d->top_k && d->top_k < words ? d->top_k : words;
    if (limit == words && d->top_p >= 1) { /* nothing is cut off */
        target = d->number * total;
        for (w = 0; w < words; w++) {
            sum += weights[w];
            if (weights[w] > 0) kept = w;
            if (sum > target) break;
        }
        return (int32_t)kept;
    }
    const double lowest = limit < words ? 0 : (1 - d->top_p) * total / (double)words * (1 - 1e-6);
    const double cuts[] = {1e-2, 1e-4, lowest};
    for (int i = 0; i < 3; i++) {
        if (i < 2 && cuts[i] <= lowest) continue;
        count = 0;
        mass = 0;
        for (w = 0; w < words; w++)
            if (weights[w] >= cuts[i]) {
                found[count++] = (candidate){x[w], (int32_t)w};
                mass += weights[w];
            }
        if (limit < words ? count >= limit : mass > d->top_p * total) break;
    }
    qsort(found, (size_t)count, sizeof *found, compare);
    if (count > limit) count = limit;
    if (limit < words) {
        total = 0;
        for (int64_t i = 0; i < count; i++) total += weights[found[i].token];
    }
    for (kept = 0, mass = 0; kept < count; kept++) {
        if (kept && mass >= (d->top_p - 1e-7) * total) break;
        mass += weights[found[kept].token];
    }
    target = d->number * mass;
    for (int64_t i = 0; i < kept; i++) {
        sum += weights[found[i].token];
        if (sum > target) return found[i].token;
    }
    return found[kept - 1].token;
}

/* The token of each row of scores, the first of equally likely ones; -1 if one is not finite. */
static void choose(engine *e, int index) {
    int64_t words = e->m->vocabulary;
    for (int64_t i = index; i < e->p->outputs; i += e->threads) {
        const float *x = e->p->logits + i * words;
        vec tops = all(-INFINITY);
        ints odd = {0};
        float most = -INFINITY;
        int64_t w = 0, place = 0;
        int any = 0;
        for (; w + UNIT <= words; w += UNIT) {
            vec score;
            memcpy(&score, x + w, sizeof score);
            tops = greater(score, tops);
            odd |= ((ints)score & 0x7f800000) == 0x7f800000;
        }
        for (int j = 0; j < UNIT; j++) {
            most = tops[j] > most ? tops[j] : most;
            any |= odd[j];
        }
        for (; w < words; w++) {
            most = x[w] > most ? x[w] : most;
            any |= is_odd(x[w]);
        }
        if (any) {
            e->p->chosen[i] = -1;
            continue;
        }
        if (e->p->draws[i].temperature > 0 && e->p->draws[i].top_k != 1) {
            e->p->chosen[i] = forward_draw(x, words, most, &e->p->draws[i],
                                           e->weights + index * words,
                                           e->candidates + index * words);
            continue;
        }
        while (x[place] != most) place++;
        e->p->chosen[i] = (int32_t)place;
    }
}

static void run_layer(engine *e, int number, int index) {
    const model *m = e->m;
    const layer *l = &m->layer[number];
    int64_t rows = e->p->rows, width = m->heads * m->head;
    int64_t columns = width + 2 * m->groups * m->head;
    product qkv = {STORE, QKV, number, e->h, l->matrices[QKV], rows, m->width, columns, e->qkv, 0};
    product out = {ADD, OUT, number, e->h, l->matrices[OUT], rows, width, m->width, e->x, 0};
    product gate_up = {GATED, GATE_UP,  number,       e->h, l->matrices[GATE_UP],
                       rows,  m->width, 2 * m->inner, 0,    e->y};
    product down = {ADD, DOWN, number, e->y, l->matrices[DOWN], rows, m->inner, m->width, e->x, 0};

    norm_rows(e, l->norms[0], index);
    if (index == 0) atomic_store(&e->task, 0);
    meet(&e->inside);
    prepare_change(e, number, QKV, e->h, m->width, index);
    multiply(e, &qkv, index);
    meet(&e->inside);
    place_rows(e, number, index);
    meet(&e->inside);
    attention(e, number);
    meet(&e->inside);
    prepare_change(e, number, OUT, e->h, width, index);
    multiply(e, &out, index);
    meet(&e->inside);
    norm_rows(e, l->norms[1], index);
    meet(&e->inside);
    prepare_change(e, number, GATE_UP, e->h, m->width, index);
    multiply(e, &gate_up, index);
    meet(&e->inside);
    prepare_change(e, number, DOWN, e->y, m->inner, index);
    multiply(e, &down, index);
    meet(&e->inside);
}

static void run(engine *e, int index) {
    const model *m = e->m;
    const pass *p = e->p;
    embed(e, index);
    empty_pages(e, index);
    meet(&e->inside);
    for (int number = 0; number < m->layers; number++) run_layer(e, number, index);
    for (int64_t i = index; i < p->outputs; i += e->threads)
        norm(m, e->x + p->output_rows[i] * m->width, m->final_norm, e->h + i * m->width);
    meet(&e->inside);
    product head = {STORE,    LINEARS,       0,         e->h, m->lm_head, p->outputs,
                    m->width, m->vocabulary, p->logits, 0};
    if (p->outputs) multiply(e, &head, index);
    meet(&e->inside);
    choose(e, index);
    meet(&e->inside);
}

typedef struct {
    engine *e;
    int index;
} worker;

static void *work(void *argument) {
    worker own = *(worker *)argument;
    free(argument);
    for (unsigned phase = 0;; phase++) {
        wait_while(&own.e->start, phase);
        if (own.e->ending) return 0;
        run(own.e, own.index);
    }
}

static void *room(int64_t bytes) {
    void *found = 0;
    if (posix_memalign(&found, 64, (size_t)(bytes + 63) / 64 * 64)) return 0;
    return found;
}

void forward_close(engine *e) {
    e->ending = 1;
    go_on(&e->start);
    for (int i = 1; i < e->threads; i++) pthread_join(e->handles[i], 0);
    close_gate(&e->inside);
    close_gate(&e->start);
    void *rooms[] = {e->x,       e->qkv,     e->h,          e->q,           e->y,      e->inner,
                     e->no_page, e->weights, e->candidates, e->sequence_of, e->sums, e->handles};
    for (size_t i = 0; i < sizeof rooms / sizeof *rooms; i++) free(rooms[i]);
    free(e);
}

/* Returns null where memory or a thread is refused. Models of the same shape may take turns. */
engine *forward_open(const model *m, const limits *most, int64_t threads, int64_t looks) {
    engine *e = calloc(1, sizeof *e);
    if (!e) return 0;
    int64_t width = m->heads * m->head, widest = width > m->width ? width : m->width;
    e->m = m;
    e->most = *most;
    e->padded = (m->head + STRIP - 1) / STRIP * STRIP;
    e->threads = 1;
    open_gate(&e->inside, (int)threads, (int)looks);
    open_gate(&e->start, (int)threads, (int)looks);
    e->x = room(most->rows * m->width * 4);
    e->qkv = room(most->rows * (width + 2 * m->groups * m->head) * 4);
    e->h = room(most->rows * widest * (int64_t)sizeof *e->h);
    e->q = room(most->rows * width * (int64_t)sizeof *e->q);
    e->y = room(most->rows * m->inner * (int64_t)sizeof *e->y);
    e->inner = room(most->rows * most->changed * (int64_t)sizeof *e->inner);
    e->no_page = room(PAGE * e->padded * 2);
    e->sequence_of = room(most->rows * 4);
    e->sums = room(threads * most->rows * 2 * STRIP * (int64_t)sizeof *e->sums);
    e->weights = room(threads * m->vocabulary * (int64_t)sizeof *e->weights);
    e->candidates = room(threads * m->vocabulary * (int64_t)sizeof *e->candidates);
    e->handles = calloc((size_t)threads, sizeof *e->handles);
    if (!e->x || !e->qkv || !e->h || !e->q || !e->y || !e->inner || !e->no_page ||
        !e->weights || !e->candidates || !e->sequence_of || !e->sums || !e->handles) {
        forward_close(e);
        return 0;
    }
    memset(e->no_page, 0, (size_t)(PAGE * e->padded) * 2);
    for (; e->threads < threads; e->threads++) {
        worker *w = malloc(sizeof *w);
        if (w) *w = (worker){e, e->threads};
        if (!w || pthread_create(&e->handles[e->threads], 0, work, w)) {
            free(w);
            forward_close(e);
            return 0;
        }
    }
    return e;
}

void forward_run(engine *e, const model *m, const pass *p) {
    e->m = m;
    e->p = p;
    e->changed = 0;
    for (int64_t s = 0; s < p->sequences; s++) {
        e->changed |= p->sequence[s].adapter != 0;
        for (int64_t r = 0; r < p->sequence[s].rows; r++)
            e->sequence_of[p->sequence[s].first_row + r] = (int32_t)s;
    }
    if (e->threads > 1) go_on(&e->start);
    run(e, 0);
}
