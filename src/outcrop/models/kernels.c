/* The operations between the matrix products of a decoder, each in one pass over memory.
 *
 * Compiled on the machine it runs on (kernels.py), once for each type that matrices are held in:
 * -DBFLOAT16 or float32. The residual stream, sums and normalizers are float32 in both. Every
 * function has the same mathematics as its namesake in kernels.py; tests compare them. Rows are
 * independent of each other, so the number of threads does not change a result.
 *
 * Plain C without headers of torch: it compiles in about a second. Loops are written for the
 * compiler's vectorizer, so nothing here knows a processor.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef BFLOAT16
typedef uint16_t number; /* the upper half of a float32 */

static inline float load(number value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

static inline number store(float value) { /* rounds to nearest, ties to even, as torch does */
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (number)(value != value ? 0x7fc0u : rounded);
}
#else
typedef float number;

static inline float load(number value) { return value; }
static inline number store(float value) { return value; }
#endif

/* So many elements are worth waking a second thread for. */
#define WORTH_THREADS 32768
#define LANES 16

/* exp(x) with a relative error below 2e-7; below -87 it is as at -87 (2e-38), above 88 as at 88.
 * The argument is reduced to +-ln(2)/2; there a polynomial of degree 6, the first terms of the
 * series with Cephes' coefficients, does. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = rintf(x * 1.44269504088896341f);
    float r = fmaf(n, -0.693359375f, x);
    r = fmaf(n, 2.12194440e-4f, r);
    float p = 1.9875691500e-4f;
    p = fmaf(p, r, 1.3981999507e-3f);
    p = fmaf(p, r, 8.3334519073e-3f);
    p = fmaf(p, r, 4.1665795894e-2f);
    p = fmaf(p, r, 1.6666665459e-1f);
    p = fmaf(p, r, 5.0000001201e-1f);
    float value = fmaf(p, r * r, r + 1.0f);
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return value * power;
}

/* The greatest of at least one number; one that is not a number may be passed over. */
static inline float greatest(const number *x, long count) {
    float most[LANES], result;
    for (long lane = 0; lane < LANES; lane++) most[lane] = load(x[0]);
    long i = 0;
    for (; i + LANES <= count; i += LANES)
        for (long lane = 0; lane < LANES; lane++) {
            float value = load(x[i + lane]);
            most[lane] = value > most[lane] ? value : most[lane];
        }
    for (; i < count; i++) {
        float value = load(x[i]);
        most[0] = value > most[0] ? value : most[0];
    }
    result = most[0];
    for (long lane = 1; lane < LANES; lane++) result = most[lane] > result ? most[lane] : result;
    return result;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

/* sum = x + y (just x where y is NULL); out = sum / rms(sum) * weight. */
void norm_forward(long rows, long width, const float *x, const number *y, float *sum,
                  const float *weight, float epsilon, number *out, float *scale) {
#pragma omp parallel for if (rows * width > WORTH_THREADS)
    for (long row = 0; row < rows; row++) {
        const float *from = x + row * width;
        if (y) {
            const number *change = y + row * width;
            float *to = sum + row * width;
            for (long i = 0; i < width; i++) to[i] = from[i] + load(change[i]);
            from = to;
        }
        float squares = 0.0f;
        for (long i = 0; i < width; i++) squares += from[i] * from[i];
        float factor = 1.0f / sqrtf(squares / (float)width + epsilon);
        scale[row] = factor;
        number *normed = out + row * width;
        for (long i = 0; i < width; i++) normed[i] = store(from[i] * factor * weight[i]);
    }
}

/* Adds the gradient through the norm to dx, and gives the sum in the matrices' type too. */
void norm_backward(long rows, long width, const number *dy, const float *x, const float *weight,
                   const float *scale, float *dx, number *out) {
#pragma omp parallel for if (rows * width > WORTH_THREADS)
    for (long row = 0; row < rows; row++) {
        const number *dy_row = dy + row * width;
        const float *x_row = x + row * width;
        float *dx_row = dx + row * width;
        number *out_row = out + row * width;
        float factor = scale[row], product = 0.0f;
        for (long i = 0; i < width; i++) product += load(dy_row[i]) * weight[i] * x_row[i];
        float along = product * factor * factor * factor / (float)width;
        for (long i = 0; i < width; i++) {
            float value = dx_row[i] + factor * load(dy_row[i]) * weight[i] - along * x_row[i];
            dx_row[i] = value;
            out_row[i] = store(value);
        }
    }
}

/* gate_up holds gate and up side by side in each row; out = silu(gate) * up. */
void gated_forward(long rows, long width, const number *gate_up, number *out) {
#pragma omp parallel for if (rows * width > WORTH_THREADS)
    for (long row = 0; row < rows; row++) {
        const number *gate = gate_up + 2 * row * width, *up = gate + width;
        number *to = out + row * width;
        for (long i = 0; i < width; i++) {
            float g = load(gate[i]);
            to[i] = store(g * sigmoid(g) * load(up[i]));
        }
    }
}

/* Gives the gradient of gate_up, and what gated_forward gave, once more. */
void gated_backward(long rows, long width, const number *dout, const number *gate_up,
                    number *dgate_up, number *out) {
#pragma omp parallel for if (rows * width > WORTH_THREADS)
    for (long row = 0; row < rows; row++) {
        const number *gate = gate_up + 2 * row * width, *up = gate + width;
        number *dgate = dgate_up + 2 * row * width, *dup = dgate + width;
        const number *d_row = dout + row * width;
        number *to = out + row * width;
#pragma omp simd /* three results: too many for the compiler to see that none is an argument */
        for (long i = 0; i < width; i++) {
            float g = load(gate[i]), u = load(up[i]), d = load(d_row[i]);
            float s = sigmoid(g), silu = g * s;
            to[i] = store(silu * u);
            dgate[i] = store(d * u * (s + silu * (1.0f - s)));
            dup[i] = store(d * silu);
        }
    }
}

static inline void rotate(const number *from, const float *cosine, const float *sine, long half,
                          float sign, number *to) {
    for (long i = 0; i < half; i++) {
        float low = load(from[i]), high = load(from[i + half]);
        float c = cosine[i], s = sign * sine[i];
        to[i] = store(low * c - high * s);
        to[i + half] = store(high * c + low * s);
    }
}

/* From rows (queries, keys and values of all heads side by side) to the layout of attention.
 *
 * Queries: for each block of rows, (group, head of the group, row of the block, 2 * half).
 * Keys and values: for each segment, (group, row, 2 * half), the rows of the shared prefix (the
 * first of all rows) before its own. Queries and keys are rotated by their position.
 */
void split_heads(long num_blocks, const int64_t *block_starts, const int64_t *block_lengths,
                 long num_segments, const int64_t *starts, const int64_t *lengths,
                 const int64_t *prefixes, long groups, long heads_a_group, long half,
                 const number *rows, const float *cosines, const float *sines, number *query,
                 number *key, number *value) {
    long width = 2 * half, heads = groups * heads_a_group;
    long stride = (heads + 2 * groups) * width;
    for (long b = 0; b < num_blocks; b++) {
        long start = block_starts[b], length = block_lengths[b];
        number *block = query + start * heads * width;
#pragma omp parallel for if (length * heads * width > WORTH_THREADS)
        for (long i = 0; i < length; i++)
            for (long h = 0; h < heads; h++)
                rotate(rows + (start + i) * stride + h * width, cosines + (start + i) * half,
                       sines + (start + i) * half, half, 1.0f, block + (h * length + i) * width);
    }
    long before = 0;
    for (long s = 0; s < num_segments; s++) {
        long prefix = prefixes[s], total = prefix + lengths[s], shift = starts[s] - prefix;
        number *keys = key + before * groups * width, *values = value + before * groups * width;
#pragma omp parallel for if (total * groups * width > WORTH_THREADS)
        for (long i = 0; i < total; i++) {
            long row = i < prefix ? i : i + shift;
            const number *from = rows + row * stride + heads * width;
            for (long g = 0; g < groups; g++) {
                rotate(from + g * width, cosines + row * half, sines + row * half, half, 1.0f,
                       keys + (g * total + i) * width);
                memcpy(values + (g * total + i) * width, from + (groups + g) * width,
                       sizeof(number) * (size_t)width);
            }
        }
        before += total;
    }
}

/* The way back, of gradients: a row of the prefix gets the sum over the segments that used it. */
void merge_heads(long num_blocks, const int64_t *block_starts, const int64_t *block_lengths,
                 long num_segments, const int64_t *starts, const int64_t *lengths,
                 const int64_t *prefixes, long groups, long heads_a_group, long half,
                 const number *query, const number *key, const number *value,
                 const float *cosines, const float *sines, number *rows) {
    long width = 2 * half, heads = groups * heads_a_group;
    long stride = (heads + 2 * groups) * width;
    for (long b = 0; b < num_blocks; b++) {
        long start = block_starts[b], length = block_lengths[b];
        const number *block = query + start * heads * width;
#pragma omp parallel for if (length * heads * width > WORTH_THREADS)
        for (long i = 0; i < length; i++)
            for (long h = 0; h < heads; h++)
                rotate(block + (h * length + i) * width, cosines + (start + i) * half,
                       sines + (start + i) * half, half, -1.0f,
                       rows + (start + i) * stride + h * width);
    }
    long before = 0;
    for (long s = 0; s < num_segments; s++) {
        long prefix = prefixes[s], total = prefix + lengths[s], shift = starts[s] - prefix;
        const number *keys = key + before * groups * width, *values = value + before * groups * width;
        /* The first segment is the prefix itself where there is one; it sums up all the others. */
        long shared = s == 0 && num_segments > 1 && prefixes[1] > 0 ? total : 0;
#pragma omp parallel for if (total * groups * width > WORTH_THREADS)
        for (long i = prefix; i < total; i++) {
            long row = i + shift;
            number *to = rows + row * stride + heads * width;
            for (long g = 0; g < groups; g++) {
                const number *dk = keys + (g * total + i) * width;
                const number *dv = values + (g * total + i) * width;
                if (!shared) {
                    rotate(dk, cosines + row * half, sines + row * half, half, -1.0f,
                           to + g * width);
                    memcpy(to + (groups + g) * width, dv, sizeof(number) * (size_t)width);
                    continue;
                }
                float summed_key[1024], summed_value[1024];
                for (long j = 0; j < width; j++) {
                    summed_key[j] = load(dk[j]);
                    summed_value[j] = load(dv[j]);
                }
                long offset = total;
                for (long other = 1; other < num_segments; other++) {
                    long all = prefixes[other] + lengths[other];
                    const number *ok = key + (offset * groups + g * all + i) * width;
                    const number *ov = value + (offset * groups + g * all + i) * width;
                    for (long j = 0; j < width; j++) {
                        summed_key[j] += load(ok[j]);
                        summed_value[j] += load(ov[j]);
                    }
                    offset += all;
                }
                const float *c = cosines + row * half, *n = sines + row * half;
                number *key_to = to + g * width, *value_to = to + (groups + g) * width;
                for (long j = 0; j < half; j++) {
                    float low = summed_key[j], high = summed_key[j + half];
                    key_to[j] = store(low * c[j] + high * n[j]);
                    key_to[j + half] = store(high * c[j] - low * n[j]);
                }
                for (long j = 0; j < width; j++) value_to[j] = store(summed_value[j]);
            }
        }
        before += total;
    }
}

/* Moves the heads of each block into rows, or back where `to_rows` is 0. */
void move_heads(long num_blocks, const int64_t *block_starts, const int64_t *block_lengths,
                long heads, long width, number *blocks, number *rows, long to_rows) {
    for (long b = 0; b < num_blocks; b++) {
        long start = block_starts[b], length = block_lengths[b];
        number *block = blocks + start * heads * width;
#pragma omp parallel for if (length * heads * width > WORTH_THREADS)
        for (long i = 0; i < length; i++)
            for (long h = 0; h < heads; h++) {
                number *in_row = rows + ((start + i) * heads + h) * width;
                number *in_block = block + (h * length + i) * width;
                if (to_rows)
                    memcpy(in_row, in_block, sizeof(number) * (size_t)width);
                else
                    memcpy(in_block, in_row, sizeof(number) * (size_t)width);
            }
    }
}

/* scores: (matrices, length, keys); query i may see the keys after `i + keys - length - window` up
 * to `i + keys - length`. Becomes the softmax of scale * scores, in place. */
void softmax_forward(long matrices, long length, long keys, long window, float scale,
                     number *scores) {
#pragma omp parallel for if (matrices * length * keys > WORTH_THREADS)
    for (long row = 0; row < matrices * length; row++) {
        number *p = scores + row * keys;
        long end = row % length + keys - length + 1;
        long first = window > 0 && end > window ? end - window : 0;
        float total = 0.0f, shift = -scale * greatest(p + first, end - first);
        for (long i = first; i < end; i++)
            total += exponential(fmaf(scale, load(p[i]), shift));
        float factor = 1.0f / total;
        for (long i = first; i < end; i++)
            p[i] = store(exponential(fmaf(scale, load(p[i]), shift)) * factor);
        memset(p, 0, sizeof(number) * (size_t)first);
        memset(p + end, 0, sizeof(number) * (size_t)(keys - end));
    }
}

/* From the gradient of the softmax to that of the scores, in place. */
void softmax_backward(long rows, long keys, float scale, const number *weights,
                      number *gradient) {
#pragma omp parallel for if (rows * keys > WORTH_THREADS)
    for (long row = 0; row < rows; row++) {
        const number *p = weights + row * keys;
        number *d = gradient + row * keys;
        float product = 0.0f;
        for (long i = 0; i < keys; i++) product += load(p[i]) * load(d[i]);
        for (long i = 0; i < keys; i++)
            d[i] = store(scale * load(p[i]) * (load(d[i]) - product));
    }
}

/* losses = logsumexp(logits) - logits[label]. Where `scale` is not 0, logits become the gradient of
 * scale * sum(losses). */
void cross_entropy(long rows, long words, number *logits, const int64_t *labels, float scale,
                   float *losses) {
#pragma omp parallel for if (rows * words > WORTH_THREADS)
    for (long row = 0; row < rows; row++) {
        number *x = logits + row * words;
        float most = greatest(x, words), total = 0.0f, wanted = load(x[labels[row]]);
        for (long i = 0; i < words; i++) total += exponential(load(x[i]) - most);
        losses[row] = logf(total) + most - wanted;
        if (scale == 0.0f) continue;
        float factor = scale / total;
        for (long i = 0; i < words; i++)
            x[i] = store(exponential(load(x[i]) - most) * factor);
        x[labels[row]] = store(exponential(wanted - most) * factor - scale);
    }
}
