/* The parts of a decoding step that are not matrix products, each as one call.

   `native.py` compiles this file twice: activations are float, or bfloat16 with -DBF16. All arithmetic is in float32.
   Shape letters: B sequences, D width, F FFN width, H query heads, G key/value heads, K channels per head,
   S cached positions. Every row is computed for itself, in an order that does not depend on the others. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define TILE 64       /* positions whose scores are held at a time */
#define MAX_K 256
#define MAX_SHARED 64 /* query heads of one key/value head */
#define SMALL 8192    /* numbers that are not worth waking a second thread for */

/* Compilers split these into what the CPU has. Unaligned, and may alias anything. */
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t vec_bits __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#ifdef BF16
typedef uint16_t act;
typedef uint16_t act_vec __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

static inline float load(act x) {
    const uint32_t bits = (uint32_t)x << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

static inline act store(float x) { /* to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (act)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline vec load_vec(const act *from) {
    return (vec)(__builtin_convertvector(*(const act_vec *)from, vec_bits) << 16);
}
#else
typedef float act;
static inline float load(act x) { return x; }
static inline act store(float x) { return x; }
static inline vec load_vec(const act *from) { return *(const vec *)from; }
#endif

/* e to the x within 2e-7, vectorised by any compiler; 0 or infinity is never reached, NaN stays. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float whole = rintf(x * 1.44269504f);
    /* ln 2 in two parts, so that the rest is exact. */
    const float rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float series = 1.0f / 5040;
    series = series * rest + 1.0f / 720;
    series = series * rest + 1.0f / 120;
    series = series * rest + 1.0f / 24;
    series = series * rest + 1.0f / 6;
    series = series * rest + 0.5f;
    series = series * rest + 1.0f;
    series = series * rest + 1.0f;
    const int32_t power = ((int32_t)whole + 127) << 23;
    float scale;
    memcpy(&scale, &power, 4);
    return series * scale;
}

/* x += addend, then out = x / rms(x) * gain. x (B, D) float32, addend (B, D) or null, gain (D,), out (B, D). */
void add_rms_norm(float *x, const act *addend, const act *gain, act *out, int64_t B, int64_t D, float eps,
                  int threads) {
#pragma omp parallel for num_threads(threads) if (B * D > SMALL)
    for (int64_t b = 0; b < B; b++) {
        float *row = x + b * D;
        float squares = 0;
        if (addend) {
#pragma omp simd
            for (int64_t d = 0; d < D; d++) row[d] += load(addend[b * D + d]);
        }
#pragma omp simd reduction(+ : squares)
        for (int64_t d = 0; d < D; d++) squares += row[d] * row[d];
        const float scale = 1.0f / sqrtf(squares / (float)D + eps);
#pragma omp simd
        for (int64_t d = 0; d < D; d++) out[b * D + d] = store(row[d] * scale * load(gain[d]));
    }
}

/* silu(gate) * up. both (B, 2F): the gates of a row, then its ups; out (B, F). */
void silu_mul(const act *both, act *out, int64_t B, int64_t F, int threads) {
#pragma omp parallel for num_threads(threads) if (B * F > SMALL)
    for (int64_t b = 0; b < B; b++) {
        const act *gate = both + 2 * b * F, *up = gate + F;
#pragma omp simd
        for (int64_t f = 0; f < F; f++) {
            const float g = load(gate[f]);
            out[b * F + f] = store(g / (1.0f + exponential(-g)) * load(up[f]));
        }
    }
}

/* Rows as unsigned bytes: x = (code - 128) * largest / 127. x (B, D) float32, codes (B, D), largest (B,). */
void quantize_rows(const float *x, uint8_t *codes, float *largest, int64_t B, int64_t D, int threads) {
#pragma omp parallel for num_threads(threads) if (B * D > SMALL)
    for (int64_t b = 0; b < B; b++) {
        const float *row = x + b * D;
        float top = 1e-12f;
#pragma omp simd reduction(max : top)
        for (int64_t d = 0; d < D; d++) top = fabsf(row[d]) > top ? fabsf(row[d]) : top;
        const float scale = 127.0f / top;
#pragma omp simd
        for (int64_t d = 0; d < D; d++) codes[b * D + d] = (uint8_t)(int32_t)(row[d] * scale + 128.5f);
        largest[b] = top;
    }
}

/* Turn the pairs (j, j + K/2) of one head by its angles. */
static inline void rotate(const act *head, const float *cos, const float *sin, float *out, int64_t K) {
    const int64_t half = K / 2;
#pragma omp simd
    for (int64_t j = 0; j < half; j++) {
        const float first = load(head[j]), second = load(head[j + half]);
        out[j] = first * cos[j] - second * sin[j];
        out[j + half] = second * cos[j] + first * sin[j];
    }
}

static inline float add_up(vec x) {
    typedef float half __attribute__((vector_size(2 * LANES)));
    typedef float quarter __attribute__((vector_size(LANES)));
    union { vec whole; half halves[2]; } first = {.whole = x};
    union { half whole; quarter halves[2]; } second = {.whole = first.halves[0] + first.halves[1]};
    const quarter rest = second.halves[0] + second.halves[1];
    return (rest[0] + rest[1]) + (rest[2] + rest[3]);
}

/* Scores of R queries against n keys. queries (R, K) float32, keys (n, K) -> scores (R, TILE). `next` is what will be
   read after the keys, row by row. */
static inline __attribute__((always_inline)) void score(const float *queries, const act *keys, const act *next,
                                                        float *scores, int64_t n, int64_t R, int64_t K) {
    for (int64_t s = 0; s < n; s++) {
        vec key[MAX_K / LANES];
        for (int64_t j = 0; j < K / LANES; j++) key[j] = load_vec(keys + s * K + j * LANES);
        for (int64_t j = 0; j < K; j += 64 / sizeof(act)) __builtin_prefetch(next + s * K + j);
        for (int64_t r = 0; r < R; r++) {
            vec sums = {0};
            for (int64_t j = 0; j < K / LANES; j++) sums += *(const vec *)(queries + r * K + j * LANES) * key[j];
            scores[r * TILE + s] = add_up(sums);
        }
    }
}

/* mix = mix * shrink + the sum of n values in these shares. shares (n,), values (n, K), mix (K,) float32. */
static inline __attribute__((always_inline)) void add_values(const float *shares, const act *values, float *mix,
                                                             float shrink, int64_t n, int64_t K) {
    vec sums[MAX_K / LANES];
    for (int64_t j = 0; j < K / LANES; j++) sums[j] = *(vec *)(mix + j * LANES) * shrink;
    for (int64_t s = 0; s < n; s++)
        for (int64_t j = 0; j < K / LANES; j++) sums[j] += shares[s] * load_vec(values + s * K + j * LANES);
    for (int64_t j = 0; j < K / LANES; j++) *(vec *)(mix + j * LANES) = sums[j];
}

/* One key/value head of one sequence: store the new key and value, then mix all values for its R query heads.
   Softmax runs along: `most` is the largest score so far, and what is older shrinks when a larger one comes. */
static inline __attribute__((always_inline)) void attend_head(
    const act *q, const act *k, const act *v, const float *cos, const float *sin, act *keys, act *values,
    int64_t position, int64_t R, int64_t K, act *out) {
    float queries[MAX_SHARED * MAX_K], mixed[MAX_SHARED * MAX_K], scores[MAX_SHARED * TILE];
    float most[MAX_SHARED], total[MAX_SHARED], key[MAX_K];
    const float scale = 1.0f / sqrtf((float)K);
    rotate(k, cos, sin, key, K);
    for (int64_t j = 0; j < K; j++) keys[position * K + j] = store(key[j]);
    memcpy(values + position * K, v, K * sizeof(act));
    for (int64_t r = 0; r < R; r++) {
        rotate(q + r * K, cos, sin, queries + r * K, K);
        for (int64_t j = 0; j < K; j++) queries[r * K + j] *= scale, mixed[r * K + j] = 0;
        most[r] = -INFINITY, total[r] = 0;
    }
    for (int64_t start = 0; start <= position; start += TILE) {
        const int64_t n = position + 1 - start < TILE ? position + 1 - start : TILE;
        score(queries, keys + start * K, values + start * K, scores, n, R, K);
        for (int64_t r = 0; r < R; r++) {
            float *row = scores + r * TILE, top = most[r], sum = 0;
#pragma omp simd reduction(max : top)
            for (int64_t s = 0; s < n; s++) top = row[s] > top ? row[s] : top;
            const float shrink = start ? exponential(most[r] - top) : 1.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t s = 0; s < n; s++) sum += row[s] = exponential(row[s] - top);
            most[r] = top, total[r] = total[r] * shrink + sum;
            add_values(row, values + start * K, mixed + r * K, shrink, n, K);
        }
    }
    for (int64_t r = 0; r < R; r++)
        for (int64_t j = 0; j < K; j++) out[r * K + j] = store(mixed[r * K + j] / total[r]);
}

/* Attention of one new token for each of B sequences, which lie in the slots 0..B-1.
   qkv (B, H+2G, K); cos, sin (B, K/2); keys, values (slots, G, S, K); positions (B,): the new token's; out (B, H, K). */
void attend(const act *qkv, const float *cos, const float *sin, act *keys, act *values, const int64_t *positions,
            act *out, int64_t B, int64_t H, int64_t G, int64_t K, int64_t S, int threads) {
    const int64_t R = H / G;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t task = 0; task < B * G; task++) {
        const int64_t b = task / G, g = task % G;
        const act *row = qkv + b * (H + 2 * G) * K, *q = row + g * R * K;
        const act *k = row + (H + g) * K, *v = row + (H + G + g) * K;
        const float *c = cos + b * (K / 2), *s = sin + b * (K / 2);
        act *kept_keys = keys + task * S * K, *kept_values = values + task * S * K, *o = out + (b * H + g * R) * K;
        /* The usual widths as constants, so that a head stays in registers. */
        switch (K) {
            case 64: attend_head(q, k, v, c, s, kept_keys, kept_values, positions[b], R, 64, o); break;
            case 128: attend_head(q, k, v, c, s, kept_keys, kept_values, positions[b], R, 128, o); break;
            case 48: attend_head(q, k, v, c, s, kept_keys, kept_values, positions[b], R, 48, o); break;
            default: attend_head(q, k, v, c, s, kept_keys, kept_values, positions[b], R, K, o);
        }
    }
}
