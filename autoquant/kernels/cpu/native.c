/* Quantization of activations in one pass over memory.
 *
 * Each function computes what autoquant.quant.affine defines, bit for bit: a true division by the
 * scale, a clamp to the grid, rounding half to even. Eager operators take five passes for it.
 * Functions return 1 where they met NaN, which no integer stands for; their output is void then.
 *
 * Plain C, called through ctypes: it depends neither on the ABI of torch nor on that of Python.
 * OpenMP is the one that torch has loaded, so both share its threads.
 */

#include "native.h"

#include <stdlib.h>

/* One version for each generation of vector registers; the loader picks the machine's. */
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__)
#define VECTORS __attribute__((target_clones("avx512f", "avx2", "default"), noinline))
#else
#define VECTORS
#endif

#define GRAIN 32768 /* numbers that one thread takes at least */

/* Integers are stored as unsigned bytes, 128 above what they are: oneDNN's kernels want it so. */
#define OFFSET 128

/* A quotient as the byte that stands for it; NaN becomes lo, so that it can be converted. */
INLINE uint8_t byte_of(float v, float lo, float hi, int32_t shift) {
    v = v > lo ? v : lo;
    v = v > hi ? hi : v;
    return (uint8_t)((int32_t)rintf(v) + shift);
}

VECTORS static int quantize_span(const float *restrict x, uint8_t *restrict q, ptrdiff_t n,
                                 float scale, float lo, float hi, int32_t shift) {
    int bad = 0;
    for (ptrdiff_t i = 0; i < n; ++i) {
        const float v = x[i] / scale;
        bad |= v != v;
        q[i] = byte_of(v, lo, hi, shift);
    }
    return bad;
}

VECTORS static void fake_span(const float *restrict x, float *restrict y, ptrdiff_t n, float scale,
                              float lo, float hi) {
    for (ptrdiff_t i = 0; i < n; ++i) {
        float v = x[i] / scale;
        v = v < lo ? lo : v;
        v = v > hi ? hi : v;
        y[i] = rintf(v) * scale;
    }
}

#define LANES 16

VECTORS static int range_span(const float *restrict x, ptrdiff_t n, float *lowest, float *highest) {
    float lo[LANES] = {0}, hi[LANES] = {0};
    int32_t bad[LANES] = {0};
    ptrdiff_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; ++j) {
            const float v = x[i + j];
            bad[j] |= v != v;
            lo[j] = v < lo[j] ? v : lo[j];
            hi[j] = v > hi[j] ? v : hi[j];
        }
    for (; i < n; ++i) {
        bad[0] |= x[i] != x[i];
        lo[0] = x[i] < lo[0] ? x[i] : lo[0];
        hi[0] = x[i] > hi[0] ? x[i] : hi[0];
    }
    for (int j = 1; j < LANES; ++j) {
        bad[0] |= bad[j];
        lo[0] = lo[j] < lo[0] ? lo[j] : lo[0];
        hi[0] = hi[j] > hi[0] ? hi[j] : hi[0];
    }
    *lowest = lo[0];
    *highest = hi[0];
    return bad[0];
}

VECTORS static void finish_span(float *restrict y, const float *restrict sums,
                                const float *restrict bias, ptrdiff_t n, float scale, float zero) {
    for (ptrdiff_t i = 0; i < n; ++i) y[i] = (y[i] - zero * sums[i]) * scale + bias[i];
}

/* Scale and zero point of numbers by their own range, and the ends of the grid less that; see
 * autoquant.quant.affine.choose_qparams. */
static int choose(const float *x, ptrdiff_t n, int bits, int symmetric, float *scale, float *zero,
                  float *least, float *most) {
    const float huge = 1.70141173e38f, tiny = 1.17549435e-38f; /* HUGE and TINY there */
    const float qmax = (float)((1 << (bits - 1)) - 1), qmin = -qmax - 1;
    float lo, hi;
    const int bad = range_span(x, n, &lo, &hi);
    lo = lo < -huge ? -huge : lo;
    hi = hi > huge ? huge : hi;
    float s = symmetric ? (-lo > hi ? -lo : hi) / qmax : (hi - lo) / (qmax - qmin);
    s = s > 0 ? (s < tiny ? tiny : s) : 1;
    float z = symmetric ? 0 : qmin - rintf(lo / s);
    z = z < qmin ? qmin : z;
    *zero = z > qmax ? qmax : z;
    *scale = s;
    *least = qmin - *zero;
    *most = qmax - *zero;
    return bad;
}

/* x [n] → q [n], by one scale; lo and hi are the ends of the grid less the zero point. */
EXPORT int quantize(const float *x, uint8_t *q, ptrdiff_t n, float scale, float lo, float hi,
                    int32_t zero_point) {
    int bad = 0;
    const ptrdiff_t parts = (n + GRAIN - 1) / GRAIN;
#pragma omp parallel for reduction(| : bad) schedule(static) if (parts > 1)
    for (ptrdiff_t p = 0; p < parts; ++p) {
        const ptrdiff_t start = p * GRAIN, size = smaller(GRAIN, n - start);
        bad |= quantize_span(x + start, q + start, size, scale, lo, hi, zero_point + OFFSET);
    }
    return bad;
}

VECTORS static int quantize_channels(const float *restrict x, uint8_t *restrict q,
                                     const float *restrict scale, ptrdiff_t n, float lo, float hi,
                                     int32_t shift) {
    int bad = 0;
    for (ptrdiff_t i = 0; i < n; ++i) {
        const float v = x[i] / scale[i];
        bad |= v != v;
        q[i] = byte_of(v, lo, hi, shift);
    }
    return bad;
}

/* x [outer, channels, inner] → q of that shape, by a scale [channels] for each channel. */
EXPORT int quantize_smoothed(const float *x, uint8_t *q, const float *scale, ptrdiff_t outer,
                             ptrdiff_t channels, ptrdiff_t inner, float lo, float hi,
                             int32_t zero_point) {
    int bad = 0;
    const ptrdiff_t size = channels * inner, shift = zero_point + OFFSET;
#pragma omp parallel for reduction(| : bad) schedule(static) if (outer > 1 && outer * size > GRAIN)
    for (ptrdiff_t o = 0; o < outer; ++o) {
        const float *from = x + o * size;
        uint8_t *to = q + o * size;
        if (inner == 1) {
            bad |= quantize_channels(from, to, scale, channels, lo, hi, (int32_t)shift);
            continue;
        }
        for (ptrdiff_t c = 0; c < channels; ++c)
            bad |= quantize_span(from + c * inner, to + c * inner, inner, scale[c], lo, hi,
                                 (int32_t)shift);
    }
    return bad;
}

/* Bytes y [outer, channels] become no larger than limit [channels]. */
EXPORT int limit_bytes(uint8_t *y, const uint8_t *limit, ptrdiff_t outer, ptrdiff_t channels) {
#pragma omp parallel for schedule(static) if (outer * channels > GRAIN)
    for (ptrdiff_t o = 0; o < outer; ++o) {
        uint8_t *row = y + o * channels;
        for (ptrdiff_t c = 0; c < channels; ++c) row[c] = row[c] < limit[c] ? row[c] : limit[c];
    }
    return 0;
}

#define WIDTH 16 /* numbers that the innermost step of a rotation takes together */

/* Sign of the entry of Sylvester's matrix: the parity of what both indices have in common. */
static float sign_of(int row, int column) {
    int common = row & column, odd = 0;
    for (; common; common &= common - 1) odd ^= 1;
    return odd ? -1.0f : 1.0f;
}

/* Numbers [n], whole blocks, times Sylvester's matrix over √block, a power of two from WIDTH on:
 * within WIDTH by its columns, beyond by sums and differences. */
VECTORS static void rotate_span(const float *restrict x, float *restrict y,
                                const float *restrict columns, ptrdiff_t n, ptrdiff_t block,
                                float norm) {
    for (ptrdiff_t b = 0; b < n; b += WIDTH) {
#pragma omp simd
        for (int i = 0; i < WIDTH; ++i) {
            float sum = 0;
#pragma GCC unroll 16 /* or sums are not kept in registers: 25 times slower */
            for (int k = 0; k < WIDTH; ++k) sum += x[b + k] * columns[k * WIDTH + i];
            y[b + i] = sum * norm;
        }
    }
    for (ptrdiff_t half = WIDTH; half < block; half *= 2)
        for (ptrdiff_t b = 0; b < n; b += 2 * half)
            for (ptrdiff_t i = b; i < b + half; i += WIDTH) {
                float p[WIDTH], m[WIDTH];
#pragma omp simd
                for (int j = 0; j < WIDTH; ++j) {
                    p[j] = y[i + j] + y[i + half + j];
                    m[j] = y[i + j] - y[i + half + j];
                }
#pragma omp simd
                for (int j = 0; j < WIDTH; ++j) {
                    y[i + j] = p[j];
                    y[i + half + j] = m[j];
                }
            }
}

static void sylvester(float *columns) {
    for (int k = 0; k < WIDTH; ++k)
        for (int i = 0; i < WIDTH; ++i) columns[k * WIDTH + i] = sign_of(k, i);
}

#define BLOCKS 4096 /* numbers of whole blocks that stay in the first cache */

/* x [blocks, block] → y of that shape, each block rotated. */
EXPORT int rotate(const float *x, float *y, ptrdiff_t blocks, ptrdiff_t block, float norm) {
    float columns[WIDTH * WIDTH];
    const ptrdiff_t n = blocks * block, part = BLOCKS / block * block, parts = (n + part - 1) / part;
    sylvester(columns);
#pragma omp parallel for schedule(static) if (n > GRAIN)
    for (ptrdiff_t p = 0; p < parts; ++p) {
        const ptrdiff_t start = p * part;
        rotate_span(x + start, y + start, columns, smaller(part, n - start), block, norm);
    }
    return 0;
}

/* x [blocks, block] → q of that shape: each block rotated, then quantized by one scale. */
EXPORT int quantize_rotated(const float *x, uint8_t *q, ptrdiff_t blocks, ptrdiff_t block,
                            float norm, float scale, float lo, float hi, int32_t zero_point) {
    int bad = 0;
    float columns[WIDTH * WIDTH];
    const ptrdiff_t n = blocks * block, part = BLOCKS / block * block, parts = (n + part - 1) / part;
    sylvester(columns);
#pragma omp parallel for reduction(| : bad) schedule(static) if (n > GRAIN)
    for (ptrdiff_t p = 0; p < parts; ++p) {
        float y[BLOCKS];
        const ptrdiff_t start = p * part, size = smaller(part, n - start);
        rotate_span(x + start, y, columns, size, block, norm);
        bad |= quantize_span(y, q + start, size, scale, lo, hi, zero_point + OFFSET);
    }
    return bad;
}

/* x [n] → y [n], quantized and dequantized; NaN stays NaN. */
EXPORT int fake_quantize(const float *x, float *y, ptrdiff_t n, float scale, float lo, float hi) {
    const ptrdiff_t parts = (n + GRAIN - 1) / GRAIN;
#pragma omp parallel for schedule(static) if (parts > 1)
    for (ptrdiff_t p = 0; p < parts; ++p) {
        const ptrdiff_t start = p * GRAIN, size = smaller(GRAIN, n - start);
        fake_span(x + start, y + start, size, scale, lo, hi);
    }
    return 0;
}

/* x [rows, columns] → q of that shape, scale [rows] and zero_point [rows], each from its row. */
EXPORT int quantize_rows(const float *x, uint8_t *q, float *scale, float *zero_point,
                         ptrdiff_t rows, ptrdiff_t columns, int bits, int symmetric) {
    int bad = 0;
#pragma omp parallel for reduction(| : bad) schedule(static) if (rows > 1 && rows * columns > GRAIN)
    for (ptrdiff_t r = 0; r < rows; ++r) {
        const float *row = x + r * columns;
        float lo, hi;
        bad |= choose(row, columns, bits, symmetric, scale + r, zero_point + r, &lo, &hi);
        bad |= quantize_span(row, q + r * columns, columns, scale[r], lo, hi,
                             (int32_t)zero_point[r] + OFFSET);
    }
    return bad;
}

/* x [rows, columns] → y of that shape, quantized and dequantized by a scale of each row's own. */
EXPORT int fake_quantize_rows(const float *x, float *y, ptrdiff_t rows, ptrdiff_t columns, int bits,
                              int symmetric) {
    int bad = 0;
#pragma omp parallel for reduction(| : bad) schedule(static) if (rows > 1 && rows * columns > GRAIN)
    for (ptrdiff_t r = 0; r < rows; ++r) {
        const float *row = x + r * columns;
        float lo, hi, scale, zero;
        bad |= choose(row, columns, bits, symmetric, &scale, &zero, &lo, &hi);
        fake_span(row, y + r * columns, columns, scale, lo, hi);
    }
    return bad;
}

/* y [rows, columns], products of integers and the weight's scales, become the layer's output:
 * (y − zero_point · sums) · scale + bias, with sums [columns] those of each channel's weights. */
EXPORT int finish_rows(float *y, const float *scale, const float *zero_point, const float *sums,
                       const float *bias, ptrdiff_t rows, ptrdiff_t columns) {
#pragma omp parallel for schedule(static) if (rows > 1 && rows * columns > GRAIN)
    for (ptrdiff_t r = 0; r < rows; ++r)
        finish_span(y + r * columns, sums, bias, columns, scale[r], zero_point[r]);
    return 0;
}

/* Q(x) − x. Products with the inverse are twice as fast as quotients, and sums of what they give
 * are the same but for ties. */
INLINE float change(float x, float inverse, float scale, float lo, float hi) {
    float v = x * inverse;
    v = v < lo ? lo : v;
    v = v > hi ? hi : v;
    return rintf(v) * scale - x;
}

#define GROUP 128 /* numbers between two looks at the limit */

/* Squared error of quantizing one span by one scale, Σ (x − Q(x))²; it is cut short beyond limit. */
VECTORS static double error_span(const float *restrict x, ptrdiff_t n, float scale, float lo,
                                 float hi, double limit) {
    const float inverse = 1 / scale;
    double sum[LANES] = {0}, total = 0;
    ptrdiff_t i = 0;
    while (i + LANES <= n && total <= limit) {
        const ptrdiff_t end = smaller(i + GROUP, n - n % LANES);
        for (; i + LANES <= end; i += LANES)
            for (int j = 0; j < LANES; ++j) {
                const float d = change(x[i + j], inverse, scale, lo, hi);
                sum[j] += (double)d * (double)d;
            }
        total = 0;
        for (int j = 0; j < LANES; ++j) total += sum[j];
    }
    if (total > limit) return total;
    for (; i < n; ++i) {
        const float d = change(x[i], inverse, scale, lo, hi);
        total += (double)d * (double)d;
    }
    return total;
}

#define SPAN 8192 /* numbers that stay in the first cache while every scale is tried on them */

/* x [blocks, columns], scale and zero_point [tried, blocks] → errors [tried, blocks, spans], those
 * of SPAN columns each. In a block of one span, whatever is beyond the least error so far is cut
 * short: it can't be the least. */
EXPORT int squared_errors(const float *x, const float *scale, const float *zero_point,
                          double *errors, ptrdiff_t blocks, ptrdiff_t columns, ptrdiff_t tried,
                          int bits) {
    const float qmax = (float)((1 << (bits - 1)) - 1), qmin = -qmax - 1;
    const ptrdiff_t spans = (columns + SPAN - 1) / SPAN, all = blocks * spans;
#pragma omp parallel for schedule(static) if (all > 1 && blocks * columns * tried > GRAIN)
    for (ptrdiff_t p = 0; p < all; ++p) {
        const ptrdiff_t b = p / spans, start = (p % spans) * SPAN;
        const ptrdiff_t size = smaller(SPAN, columns - start);
        double limit = INFINITY;
        for (ptrdiff_t t = 0; t < tried; ++t) {
            const float s = scale[t * blocks + b], z = zero_point[t * blocks + b];
            const double e =
                error_span(x + b * columns + start, size, s, qmin - z, qmax - z, limit);
            errors[t * all + p] = e;
            if (spans == 1 && e < limit) limit = e;
        }
    }
    return 0;
}

VECTORS static float change_span(const float *restrict x, const float *restrict g, ptrdiff_t n,
                                 float scale, float lo, float hi) {
    const float inverse = 1 / scale;
    float sum[LANES] = {0}, total = 0;
    ptrdiff_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; ++j)
            sum[j] += change(x[i + j], inverse, scale, lo, hi) * g[i + j];
    for (; i < n; ++i) total += change(x[i], inverse, scale, lo, hi) * g[i];
    for (int j = 0; j < LANES; ++j) total += sum[j];
    return total;
}

#define SHORT 2048 /* numbers of x and of g that stay in the first cache, and that floats can sum */

/* x and g [rows, columns] → products [rows, tried], Σ (Q(x) − x) · g of each row under each scale;
 * lo and hi [tried] are the ends of the grid less the zero point. */
EXPORT int change_products(const float *x, const float *g, const float *scale, const float *lo,
                           const float *hi, double *products, ptrdiff_t rows, ptrdiff_t columns,
                           ptrdiff_t tried) {
    const ptrdiff_t spans = (columns + SHORT - 1) / SHORT;
#pragma omp parallel for schedule(static) if (rows > 1 && rows * columns * tried > GRAIN)
    for (ptrdiff_t r = 0; r < rows; ++r) {
        for (ptrdiff_t t = 0; t < tried; ++t) products[r * tried + t] = 0;
        for (ptrdiff_t p = 0; p < spans; ++p) {
            const ptrdiff_t start = r * columns + p * SHORT;
            const ptrdiff_t size = smaller(SHORT, columns - p * SHORT);
            for (ptrdiff_t t = 0; t < tried; ++t)
                products[r * tried + t] +=
                    (double)change_span(x + start, g + start, size, scale[t], lo[t], hi[t]);
        }
    }
    return 0;
}

VECTORS static float round_span(const float *restrict x, const float *restrict weight,
                                float *restrict delta, ptrdiff_t n, float scale, float lo,
                                float hi) {
    const float inverse = 1 / scale;
    float sum[LANES] = {0}, total = 0;
    ptrdiff_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; ++j) {
            const float d = change(x[i + j], inverse, scale, lo, hi);
            delta[i + j] = d;
            sum[j] += d * d * weight[i + j];
        }
    for (; i < n; ++i) {
        const float d = change(x[i], inverse, scale, lo, hi);
        delta[i] = d;
        total += d * d * weight[i];
    }
    for (int j = 0; j < LANES; ++j) total += sum[j];
    return total;
}

/* x [rows, parts, columns] and weights [groups, parts, columns] of its squares; scale and
 * zero_point [tried, rows, parts] (or [tried] where shared) → what rounding changes, delta
 * [tried, rows, parts, columns], and sums [tried, rows, parts] of weight · delta². */
EXPORT int round_weights(const float *x, const float *weight, const float *scale,
                         const float *zero_point, float *delta, float *sums, ptrdiff_t rows,
                         ptrdiff_t parts, ptrdiff_t columns, ptrdiff_t groups, ptrdiff_t tried,
                         int bits, int shared) {
    const float qmax = (float)((1 << (bits - 1)) - 1), qmin = -qmax - 1;
    const ptrdiff_t blocks = rows * parts, all = tried * blocks;
#pragma omp parallel for schedule(static) if (all * columns > GRAIN)
    for (ptrdiff_t p = 0; p < all; ++p) {
        const ptrdiff_t b = p % blocks, group = (b / parts) / (rows / groups);
        const ptrdiff_t q = shared ? p / blocks : p;
        const float zero = zero_point[q];
        sums[p] = round_span(x + b * columns, weight + (group * parts + b % parts) * columns,
                             delta + p * columns, columns, scale[q], qmin - zero, qmax - zero);
    }
    return 0;
}

#define COUNTERS 4 /* so that equal numbers in a row do not wait for each other's count */
#define PIECE 4096

VECTORS static int bin_piece(const float *restrict x, int32_t *restrict bin, ptrdiff_t n,
                             float inverse, int32_t half, double *restrict sums,
                             int64_t *restrict zeros) {
    double total[LANES] = {0}, square[LANES] = {0};
    int32_t none[LANES] = {0}, bad[LANES] = {0};
    const float most = (float)half;
    int outside = 0;
    for (ptrdiff_t i = 0; i < n; i += LANES) {
        const ptrdiff_t end = smaller(LANES, n - i);
        for (ptrdiff_t j = 0; j < end; ++j) {
            const float v = x[i + j], y = v * inverse;
            total[j] += (double)y;
            square[j] += (double)y * (double)y;
            none[j] += v == 0.0f;
            /* A tiny negative number may have become −0, which is no bin below 0. */
            const int inside = y >= -most && y < most;
            bad[j] |= !inside;
            bin[i + j] = (int32_t)floorf(inside ? y : 0.0f) - (y == 0.0f && v < 0.0f) + half;
        }
    }
    for (int j = 0; j < LANES; ++j) {
        outside |= bad[j];
        sums[0] += total[j];
        sums[1] += square[j];
        *zeros += none[j];
    }
    return outside;
}

/* Counts of x [n] in bins [2 half] that are 1 / inverse wide, from −half of them on; sums of x and
 * of x² in units of a bin [parts, 2], PART numbers each; how many are 0. Returns 1 without memory,
 * and where a number lies outside of all bins; counts are void then. */
#define PART 65536
EXPORT int histogram(const float *x, ptrdiff_t n, float inverse, int32_t half, int64_t *counts,
                     double *sums, int64_t *zeros) {
    const ptrdiff_t parts = (n + PART - 1) / PART, bins = 2 * (ptrdiff_t)half;
    int failed = 0;
    int64_t none = 0;
#pragma omp parallel reduction(| : failed) reduction(+ : none) if (parts > 1)
    {
        int32_t *local = calloc((size_t)(COUNTERS * bins), sizeof *local);
        int32_t *bin = malloc(PIECE * sizeof *bin);
        failed = local == NULL || bin == NULL;
#pragma omp for schedule(static)
        for (ptrdiff_t p = 0; p < parts; ++p) {
            sums[2 * p] = sums[2 * p + 1] = 0;
            const ptrdiff_t stop = smaller((p + 1) * PART, n);
            for (ptrdiff_t i = p * PART; i < stop && !failed; i += PIECE) {
                const ptrdiff_t size = smaller(PIECE, stop - i);
                failed |= bin_piece(x + i, bin, size, inverse, half, sums + 2 * p, &none);
                for (ptrdiff_t j = 0; j < size; ++j) ++local[(j % COUNTERS) * bins + bin[j]];
            }
        }
        if (!failed) {
#pragma omp critical
            for (ptrdiff_t b = 0; b < bins; ++b)
                for (int c = 0; c < COUNTERS; ++c) counts[b] += local[c * bins + b];
        }
        free(local);
        free(bin);
    }
    *zeros = none;
    return failed;
}

/* e^x within its ends; NaN stays NaN. */
INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    return power_of_e(x, 1);
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

static inline float hyperbolic_tangent(float x) {
    return 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f);
}

VECTORS static void gru_row(const float *restrict x, const float *restrict y,
                            const float *restrict h, float *restrict out, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; ++i) {
        const float reset = sigmoid(x[i] + y[i]);
        const float update = sigmoid(x[n + i] + y[n + i]);
        const float fresh = hyperbolic_tangent(x[2 * n + i] + reset * y[2 * n + i]);
        out[i] = fresh + update * (h[i] - fresh);
    }
}

VECTORS static void lstm_row(const float *restrict x, const float *restrict y,
                             const float *restrict c, float *restrict h, float *restrict cell,
                             ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; ++i) {
        const float in = sigmoid(x[i] + y[i]);
        const float forget = sigmoid(x[n + i] + y[n + i]);
        const float fresh = hyperbolic_tangent(x[2 * n + i] + y[2 * n + i]);
        const float out = sigmoid(x[3 * n + i] + y[3 * n + i]);
        cell[i] = forget * c[i] + in * fresh;
        h[i] = out * hyperbolic_tangent(cell[i]);
    }
}

/* One step of a GRU: projections x and y [rows, 3 n] of its input (a row every stride numbers) and
 * of its state h [rows, n] → the next state. Gates are reset, update, new, as torch has them. */
EXPORT int gru_gates(const float *x, const float *y, const float *h, float *out, ptrdiff_t rows,
                     ptrdiff_t n, ptrdiff_t stride) {
#pragma omp parallel for schedule(static) if (rows * n > GRAIN / 4)
    for (ptrdiff_t r = 0; r < rows; ++r)
        gru_row(x + r * stride, y + r * 3 * n, h + r * n, out + r * n, n);
    return 0;
}

/* One step of an LSTM, the same way: gates in, forget, new, out; c [rows, n] → state and cell. */
EXPORT int lstm_gates(const float *x, const float *y, const float *c, float *h, float *cell,
                      ptrdiff_t rows, ptrdiff_t n, ptrdiff_t stride) {
#pragma omp parallel for schedule(static) if (rows * n > GRAIN / 4)
    for (ptrdiff_t r = 0; r < rows; ++r)
        lstm_row(x + r * stride, y + r * 4 * n, c + r * n, h + r * n, cell + r * n, n);
    return 0;
}

/* Whoever imports this as a Python module gets an error, not a crash. */
EXPORT void *PyInit__native(void) { return NULL; }
