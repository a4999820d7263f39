/* Products of integers that are exact for every byte, where oneDNN's are not or have no kernel.
 *
 * Bytes of an activation, less their zero point, and weights are multiplied as 16-bit integers,
 * two products at a time added in 32 bits (vpmaddwd). So a weight may be anything from −255 to 255.
 * On processors without VNNI this is as fast as bytes whose pairs are added in 16 bits.
 *
 * The activation is [batch, height, width, channels]; a linear layer is a convolution of 1 × 1.
 * Plain C, called through ctypes; see native.c.
 */

#include "native.h"

#include <float.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define SUPPORTED 1
#include <immintrin.h>
#else
#define SUPPORTED 0
#endif

/* Channels that this processor multiplies at a time, 16 or 8; 0 where it can't. */
static int channels_at_a_time(void) {
#if SUPPORTED
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    return __builtin_cpu_supports("avx512bw") ? 16 : 8;
#else
    return 0;
#endif
}

EXPORT int product_width(int32_t *width) {
    *width = channels_at_a_time();
    return 0;
}

#define PANEL 16    /* output channels whose weights lie together */
#define ROWS 6      /* outputs, of all channels of a panel, that registers hold at a time */
#define CACHED 98304 /* bytes of widened activations that one thread works on at a time */
#define SERIAL 65536 /* products that are not worth waking other threads for */

/* What is done with a sum of products. */
typedef struct {
    const float *scale, *bias; /* of each channel */
    float lo, hi;              /* ends of the output */
    int gelu;                  /* 0, or the one by the error function, or 2: by the hyperbolic tangent */
    float inverse, zero;       /* of the bytes that are made of it */
    float *real;               /* one of these two is written */
    uint8_t *bytes;
} Finish;

#if SUPPORTED

#define AVX2 __attribute__((target("avx2")))
#define FMA __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512bw,fma")))

static ptrdiff_t larger(ptrdiff_t a, ptrdiff_t b) { return a > b ? a : b; }

/* e^x for x up to 0. */
INLINE float exponential(float x) { return power_of_e(x < -87.0f ? -87.0f : x, 0); }

/* x·Φ(x), with the error function by Abramowitz & Stegun 7.1.26 (within 1.5e-7). */
INLINE float gelu_erf(float x) {
    const float size = fabsf(x) * 0.707106781f;
    const float t = 1.0f / (1.0f + 0.3275911f * size);
    float p = 1.061405429f;
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const float tail = 0.5f * p * t * exponential(-size * size); /* Φ(−|x|) */
    return x * (x < 0 ? tail : 1.0f - tail);
}

/* x/2 · (1 + tanh(√(2/π) · (x + .044715 x³))), Hendrycks & Gimpel 2016. */
INLINE float gelu_tanh(float x) {
    const float inner = 0.797884561f * (x + 0.044715f * x * x * x), size = fabsf(inner);
    const float e = exponential(-2.0f * size), tail = e / (1.0f + e);
    return x * (inner < 0 ? tail : 1.0f - tail);
}

/* How sums of one panel become outputs: sum · scale of the sample · slope + start, its GELU, its
 * ends. Where there is no GELU, all is in units of the bytes that are made of it. */
typedef struct {
    float slope[PANEL], start[PANEL];
    float lo, hi, inverse, zero;
    int gelu;
} Line;

AVX2 INLINE Line line_of(const Finish *f, ptrdiff_t from) {
    Line line = {.lo = f->lo, .hi = f->hi, .inverse = f->inverse, .zero = f->zero, .gelu = f->gelu};
    const int direct = f->bytes != NULL && !f->gelu;
    const float unit = direct ? f->inverse : 1.0f, zero = direct ? f->zero : 0.0f;
    for (int j = 0; j < PANEL; ++j) {
        line.slope[j] = f->scale[from + j] * unit;
        line.start[j] = f->bias[from + j] * unit + zero;
    }
    if (direct) {
        line.lo = line.lo * unit + zero;
        line.hi = line.hi * unit + zero;
        line.lo = line.lo > 0.0f ? line.lo : 0.0f;
        line.hi = line.hi < 255.0f ? line.hi : 255.0f;
    }
    return line;
}

/* Eight sums as outputs, all but their ends. */
FMA INLINE __m256 sloped(__m256 sum, float scale, const Line *line, int at) {
    return _mm256_fmadd_ps(_mm256_mul_ps(sum, _mm256_set1_ps(scale)),
                           _mm256_loadu_ps(line->slope + at), _mm256_loadu_ps(line->start + at));
}

/* Eight numbers within two ends; NaN, which is the second operand then, stays. */
AVX2 INLINE __m256 within(__m256 v, float lo, float hi) {
    return _mm256_min_ps(_mm256_set1_ps(hi), _mm256_max_ps(_mm256_set1_ps(lo), v));
}

/* Eight numbers, the GELU of an output each, in units of bytes. */
FMA INLINE __m256 gelu_bytes(__m256 v, const Line *line) {
    float x[8];
    _mm256_storeu_ps(x, v);
    if (line->gelu == 1)
        for (int j = 0; j < 8; ++j) x[j] = gelu_erf(x[j]);
    else
        for (int j = 0; j < 8; ++j) x[j] = gelu_tanh(x[j]);
    return within(_mm256_fmadd_ps(_mm256_loadu_ps(x), _mm256_set1_ps(line->inverse),
                                  _mm256_set1_ps(line->zero)),
                  0.0f, 255.0f);
}

/* Sums of n ≤ PANEL channels become outputs at y, or at q, where that is not NULL. */
FMA INLINE void finish(__m256 c0, __m256 c1, float scale, const Line *line, ptrdiff_t n, float *y,
                       uint8_t *q) {
    __m256 low = sloped(c0, scale, line, 0), high = sloped(c1, scale, line, 8);
    if (q == NULL) {
        float v[PANEL], *to = n == PANEL ? y : v;
        _mm256_storeu_ps(to, within(low, line->lo, line->hi));
        _mm256_storeu_ps(to + 8, within(high, line->lo, line->hi));
        if (n < PANEL) memcpy(y, v, (size_t)n * sizeof *v);
        return;
    }
    if (line->gelu) {
        low = gelu_bytes(low, line);
        high = gelu_bytes(high, line);
    } else {
        low = within(low, line->lo, line->hi);
        high = within(high, line->lo, line->hi);
    }
    const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(low), _mm256_cvtps_epi32(high));
    /* Lanes hold channels 0 … 3, 8 … 11, and 4 … 7, 12 … 15. */
    const __m128i mixed = _mm_packus_epi16(_mm256_castsi256_si128(words),
                                           _mm256_extracti128_si256(words, 1));
    const __m128i bytes = _mm_shuffle_epi32(mixed, _MM_SHUFFLE(3, 1, 2, 0));
    uint8_t v[PANEL], *to = n == PANEL ? q : v;
    _mm_storeu_si128((__m128i *)to, bytes);
    if (n < PANEL) memcpy(q, v, (size_t)n);
}

/* Where outputs of a panel go: n channels of it, rows ``step`` apart, as real numbers or bytes.
 * ``scale`` has one of each row, that of its sample. */
typedef struct {
    const Line *line;
    const float *scale;
    ptrdiff_t n, step;
    float *real;
    uint8_t *bytes;
} Place;

/* Sums of one row of a panel become outputs. */
FMA INLINE void put_real(__m256 c0, __m256 c1, const Place *to, ptrdiff_t row) {
    finish(c0, c1, to->scale[row], to->line, to->n, to->real ? to->real + row * to->step : NULL,
           to->bytes ? to->bytes + row * to->step : NULL);
}

FMA INLINE void put(__m256i c0, __m256i c1, const Place *to, ptrdiff_t row) {
    put_real(_mm256_cvtepi32_ps(c0), _mm256_cvtepi32_ps(c1), to, row);
}

/* Loops over registers: one that isn't unrolled keeps them in memory. */
#define UNROLL _Pragma("GCC unroll 6")

/* What rows read, ``step`` numbers apart: ``count`` runs of pairs, each at its place, and with the
 * scales of a panel's channels, where runs have their own. */
typedef struct {
    ptrdiff_t step, count, pairs;
    const ptrdiff_t *at;
    const float *scale;
} Runs;

/* s + a pair of numbers · pairs of 16 weights. In assembly, because compilers spill one of the 16
 * registers, and lose a half. */
#define MULTIPLY_PAIR(s, a, b0, b1)                                                                \
    do {                                                                                           \
        __m256i v, t;                                                                              \
        __asm__("vpbroadcastd %4, %0\n\tvpmaddwd %5, %0, %1\n\tvpmaddwd %6, %0, %0\n\t"            \
                "vpaddd %1, %2, %2\n\tvpaddd %0, %3, %3"                                           \
                : "=&x"(v), "=&x"(t), "+x"((s)[0]), "+x"((s)[1])                                   \
                : "m"(*(const int16_t(*)[2])(a)), "x"(b0), "x"(b1));                               \
    } while (0)

/* Sums of R rows of runs and of pairs of weights [runs, pairs, PANEL, 2] become outputs. Where they
 * are SCALED, runs have scales of their own [runs, PANEL]. */
#define MULTIPLY_AVX2(name, R, SCALED)                                                             \
    FMA static void name##R(const int16_t *x, const Runs *runs, const int16_t *b,                  \
                            const Place *to) {                                                     \
        const ptrdiff_t lda = runs->step, pairs = runs->pairs;                                     \
        __m256i s[R][2];                                                                           \
        float sums[R][PANEL];                                                                      \
        if (SCALED) memset(sums, 0, sizeof sums);                                                  \
        UNROLL for (int i = 0; i < R; ++i) s[i][0] = s[i][1] = _mm256_setzero_si256();             \
        for (ptrdiff_t run = 0; run < runs->count; ++run) {                                        \
            const int16_t *a = x + runs->at[run];                                                  \
            for (ptrdiff_t k = 0; k < pairs; ++k, a += 2, b += 2 * PANEL) {                        \
                const __m256i b0 = _mm256_loadu_si256((const __m256i *)b);                         \
                const __m256i b1 = _mm256_loadu_si256((const __m256i *)(b + PANEL));               \
                UNROLL for (int i = 0; i < R; ++i) MULTIPLY_PAIR(s[i], a + i * lda, b0, b1);       \
            }                                                                                      \
            if (!SCALED) continue;                                                                 \
            const float *scale = runs->scale + run * PANEL;                                        \
            UNROLL for (int i = 0; i < R; ++i) {                                                   \
                UNROLL for (int h = 0; h < 2; ++h) {                                               \
                    float *sum = sums[i] + 8 * h;                                                  \
                    _mm256_storeu_ps(sum, _mm256_fmadd_ps(_mm256_cvtepi32_ps(s[i][h]),             \
                                                          _mm256_loadu_ps(scale + 8 * h),          \
                                                          _mm256_loadu_ps(sum)));                  \
                    s[i][h] = _mm256_setzero_si256();                                              \
                }                                                                                  \
            }                                                                                      \
        }                                                                                          \
        UNROLL for (int i = 0; i < R; ++i) {                                                       \
            if (SCALED)                                                                            \
                put_real(_mm256_loadu_ps(sums[i]), _mm256_loadu_ps(sums[i] + 8), to, i);           \
            else                                                                                   \
                put(s[i][0], s[i][1], to, i);                                                      \
        }                                                                                          \
    }

/* The same of the first 8 channels of a panel, not scaled. */
#define MULTIPLY_HALF(name, R, ...)                                                                \
    FMA static void name##R(const int16_t *x, const Runs *runs, const int16_t *b,                  \
                            const Place *to) {                                                     \
        const ptrdiff_t lda = runs->step, pairs = runs->pairs;                                     \
        __m256i s[R];                                                                              \
        UNROLL for (int i = 0; i < R; ++i) s[i] = _mm256_setzero_si256();                          \
        for (ptrdiff_t run = 0; run < runs->count; ++run) {                                        \
            const int16_t *a = x + runs->at[run];                                                  \
            for (ptrdiff_t k = 0; k < pairs; ++k, a += 2, b += 2 * PANEL) {                        \
                const __m256i b0 = _mm256_loadu_si256((const __m256i *)b);                         \
                UNROLL for (int i = 0; i < R; ++i) {                                               \
                    int32_t v;                                                                     \
                    memcpy(&v, a + i * lda, sizeof v);                                             \
                    s[i] = _mm256_add_epi32(s[i], _mm256_madd_epi16(_mm256_set1_epi32(v), b0));    \
                }                                                                                  \
            }                                                                                      \
        }                                                                                          \
        UNROLL for (int i = 0; i < R; ++i) put(s[i], _mm256_setzero_si256(), to, i);               \
    }

/* The same by registers of 16 sums, for P panels that follow each other, each to its own place; for
 * one where they are SCALED. */
#define MULTIPLY_AVX512(name, R, P, SCALED)                                                        \
    AVX512 static void name##R(const int16_t *x, const Runs *runs, const int16_t *b,               \
                               const Place *to) {                                                  \
        const ptrdiff_t lda = runs->step, pairs = runs->pairs;                                     \
        const ptrdiff_t panel = runs->count * pairs * 2 * PANEL;                                   \
        __m512i s[R][P];                                                                           \
        __m512 sums[R];                                                                            \
        UNROLL for (int i = 0; i < R; ++i) {                                                       \
            sums[i] = _mm512_setzero_ps();                                                         \
            UNROLL for (int p = 0; p < P; ++p) s[i][p] = _mm512_setzero_si512();                   \
        }                                                                                          \
        for (ptrdiff_t run = 0; run < runs->count; ++run) {                                        \
            const int16_t *a = x + runs->at[run];                                                  \
            for (ptrdiff_t k = 0; k < pairs; ++k, a += 2, b += 2 * PANEL) {                        \
                __m512i w[P];                                                                      \
                UNROLL for (int p = 0; p < P; ++p) w[p] = _mm512_loadu_si512(b + p * panel);       \
                UNROLL for (int i = 0; i < R; ++i) {                                               \
                    int32_t v;                                                                     \
                    memcpy(&v, a + i * lda, sizeof v);                                             \
                    UNROLL for (int p = 0; p < P; ++p) s[i][p] = _mm512_add_epi32(                 \
                        s[i][p], _mm512_madd_epi16(_mm512_set1_epi32(v), w[p]));                   \
                }                                                                                  \
            }                                                                                      \
            if (!SCALED) continue;                                                                 \
            const __m512 scale = _mm512_loadu_ps(runs->scale + run * PANEL);                       \
            UNROLL for (int i = 0; i < R; ++i) {                                                   \
                sums[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(s[i][0]), scale, sums[i]);            \
                s[i][0] = _mm512_setzero_si512();                                                  \
            }                                                                                      \
        }                                                                                          \
        UNROLL for (int i = 0; i < R; ++i) {                                                       \
            float sum[PANEL];                                                                      \
            _mm512_storeu_ps(sum, sums[i]);                                                        \
            UNROLL for (int p = 0; p < P; ++p) {                                                   \
                if (SCALED)                                                                        \
                    put_real(_mm256_loadu_ps(sum), _mm256_loadu_ps(sum + 8), to, i);               \
                else                                                                               \
                    put(_mm512_castsi512_si256(s[i][p]), _mm512_extracti64x4_epi64(s[i][p], 1),    \
                        to + p, i);                                                                \
            }                                                                                      \
        }                                                                                          \
    }

/* Functions for 1 … ROWS rows, and the table of them. */
#define EACH(DEFINE, name, ...)                                                                    \
    DEFINE(name, 1, __VA_ARGS__)                                                                   \
    DEFINE(name, 2, __VA_ARGS__)                                                                   \
    DEFINE(name, 3, __VA_ARGS__)                                                                   \
    DEFINE(name, 4, __VA_ARGS__)                                                                   \
    DEFINE(name, 5, __VA_ARGS__)                                                                   \
    DEFINE(name, 6, __VA_ARGS__)                                                                   \
    static Multiply *const name[ROWS] = {name##1, name##2, name##3, name##4, name##5, name##6};
typedef void Multiply(const int16_t *, const Runs *, const int16_t *, const Place *);
EACH(MULTIPLY_AVX2, WHOLE, 0)
EACH(MULTIPLY_AVX2, GROUPS, 1)
EACH(MULTIPLY_HALF, HALF, 0)
EACH(MULTIPLY_AVX512, WIDE_1, 1, 0)
EACH(MULTIPLY_AVX512, WIDE_2, 2, 0)
EACH(MULTIPLY_AVX512, WIDE_GROUPS, 1, 1)

AVX2 static inline void widen(const uint8_t *restrict x, int16_t *restrict a, ptrdiff_t n,
                              int32_t zero) {
    const __m256i z = _mm256_set1_epi16((short)zero);
    ptrdiff_t i = 0;
    for (; i + 16 <= n; i += 16)
        _mm256_storeu_si256(
            (__m256i *)(a + i),
            _mm256_sub_epi16(
                _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(x + i))), z));
    if (i + 8 <= n) {
        _mm_storeu_si128((__m128i *)(a + i),
                         _mm_sub_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *)(x + i))),
                                       _mm256_castsi256_si128(z)));
        i += 8;
    }
    for (; i < n; ++i) a[i] = (int16_t)(x[i] - zero);
}

/* The form of a convolution. */
typedef struct {
    ptrdiff_t batch, height, width, channels, groups, kernel_h, kernel_w, stride_h, stride_w, pad_h,
        pad_w, dilation_h, dilation_w, out_h, out_w;
} Form;

/* One group's weights and outputs: panels from … to of its ``out`` channels, of ``all``. Where runs
 * have scales of their own, they are [panels, runs, PANEL]. */
typedef struct {
    const int16_t *weight;
    const float *of_runs;
    const Finish *finish;
    ptrdiff_t group, from, to, out, all;
    int wide;
} Part;

/* Rows of one panel, or of two where ``wide``: what is read at a + row · step, outputs from row
 * ``first`` on, ``count`` of them; scale has one of each. */
FMA static void multiply_rows(const int16_t *a, const Runs *given, const Part *part, ptrdiff_t p,
                              int two, const Line *lines, const float *scale, ptrdiff_t first,
                              ptrdiff_t count) {
    const Finish *f = part->finish;
    const ptrdiff_t panels = (part->out + PANEL - 1) / PANEL, left = part->out - p * PANEL;
    const ptrdiff_t whole = given->count * given->pairs * 2 * PANEL;
    const int16_t *b = part->weight + (part->group * panels + p) * whole;
    Runs runs = *given;
    Multiply *const *table =
        part->wide ? (two ? WIDE_2 : WIDE_1) : left <= PANEL / 2 ? HALF : WHOLE;
    if (part->of_runs != NULL) {
        runs.scale = part->of_runs + p * runs.count * PANEL;
        table = part->wide ? WIDE_GROUPS : GROUPS;
    }
    /* As many rows at a time as leave no small rest. */
    const ptrdiff_t times = (count + ROWS - 1) / ROWS, most = (count + times - 1) / times;
    for (ptrdiff_t i = 0, rows; i < count; i += rows) {
        const ptrdiff_t at = (first + i) * part->all + part->group * part->out + p * PANEL;
        Place places[2];
        rows = smaller(most, count - i);
        for (int t = 0; t <= two; ++t)
            places[t] = (Place){lines + t, scale + i, smaller(PANEL, left - t * PANEL), part->all,
                                f->real ? f->real + at + t * PANEL : NULL,
                                f->bytes ? f->bytes + at + t * PANEL : NULL};
        table[rows - 1](a + i * runs.step, &runs, b, places);
    }
}

/* Lines of outputs, ``width`` each, the first at row ``first`` and what it reads at a; what the
 * next one reads is ``step`` numbers further on. scale has one of each row of a line, that of all. */
FMA static void multiply_lines(const int16_t *a, ptrdiff_t step, const Runs *runs, const Part *part,
                               const float *scale, ptrdiff_t first, ptrdiff_t lines,
                               ptrdiff_t width) {
    const ptrdiff_t panels = (part->out + PANEL - 1) / PANEL;
    for (ptrdiff_t p = part->from; p < part->to;) {
        const int two = part->wide && part->of_runs == NULL && p + 1 < part->to;
        Line made[2];
        for (int t = 0; t <= two; ++t)
            made[t] = line_of(part->finish, (part->group * panels + p + t) * PANEL);
        for (ptrdiff_t line = 0; line < lines; ++line)
            multiply_rows(a + line * step, runs, part, p, two, made, scale, first + line * width,
                          width);
        p += 1 + two;
    }
}

/* The input's rows from iy on, ``count`` of them, of one group's channels → a [count, padded,
 * channels], widened, with zeros for what lies outside. */
AVX2 static void widen_rows(const uint8_t *x, int16_t *a, const Form *f, ptrdiff_t iy,
                            ptrdiff_t count, ptrdiff_t first, ptrdiff_t channels, int32_t zero) {
    const ptrdiff_t edge = f->pad_w * channels, inner = f->width * channels;
    for (ptrdiff_t r = 0; r < count; ++r, ++iy, a += inner + 2 * edge) {
        if (iy < 0 || iy >= f->height) {
            memset(a, 0, (size_t)(inner + 2 * edge) * sizeof *a);
            continue;
        }
        const uint8_t *row = x + iy * f->width * f->channels + first;
        memset(a, 0, (size_t)edge * sizeof *a);
        if (channels == f->channels)
            widen(row, a + edge, inner, zero);
        else
            for (ptrdiff_t ix = 0; ix < f->width; ++ix)
                widen(row + ix * f->channels, a + edge + ix * channels, channels, zero);
        memset(a + edge + inner, 0, (size_t)edge * sizeof *a);
    }
}

#define TASKS 8 /* pieces of work, at least, where there are as many: for threads to share */

/* How much one thread does at a time: lines of outputs, and a share of the panels. */
typedef struct {
    ptrdiff_t lines, blocks, splits, share;
} Work;

static Work divide(ptrdiff_t lines, ptrdiff_t most, ptrdiff_t samples, ptrdiff_t groups,
                   ptrdiff_t panels) {
    Work w;
    w.lines = larger(1, smaller(most, lines));
    w.blocks = (lines + w.lines - 1) / w.lines;
    const ptrdiff_t tasks = larger(1, samples * w.blocks * groups);
    w.splits = larger(1, smaller((panels + 1) / 2, TASKS / tasks));
    w.share = (panels + w.splits - 1) / w.splits;
    return w;
}

/* Which panels of which group are one task's. */
static Part part_of(Part whole, const Work *work, ptrdiff_t groups, ptrdiff_t task) {
    whole.from = task % work->splits * work->share;
    whole.to = smaller((whole.out + PANEL - 1) / PANEL, whole.from + work->share);
    whole.group = task / work->splits % groups;
    return whole;
}

/* Every row of the input [rows, channels] by itself: linear layers, convolutions of 1 × 1. */
FMA static int multiply_each(const uint8_t *x, const int32_t *zero, const float *scale, Part whole,
                             const Form *form, ptrdiff_t count_of_runs) {
    const ptrdiff_t channels = form->channels / form->groups, run = channels / count_of_runs;
    const ptrdiff_t lda = channels + run % 2; /* an odd run ends with another's number, times 0 */
    const ptrdiff_t pixels = form->height * form->width, rows = form->batch * pixels;
    const ptrdiff_t most = larger(ROWS, smaller(CACHED / (lda * 2) / ROWS * ROWS, 96));
    const Work work = divide(rows, most, 1, form->groups, (whole.out + PANEL - 1) / PANEL);
    const ptrdiff_t tasks = work.blocks * form->groups * work.splits;
    ptrdiff_t *at = malloc((size_t)count_of_runs * sizeof *at);
    if (at == NULL) return 1;
    for (ptrdiff_t r = 0; r < count_of_runs; ++r) at[r] = r * run;
    const Runs runs = {lda, count_of_runs, (run + 1) / 2, at, NULL};
    int failed = 0;
#pragma omp parallel reduction(| : failed) if (rows * form->channels * whole.out > SERIAL)
    {
        int16_t *a = malloc((size_t)(work.lines * lda) * sizeof *a);
        float *of_row = malloc((size_t)work.lines * sizeof *of_row);
        failed = a == NULL || of_row == NULL;
#pragma omp for schedule(dynamic)
        for (ptrdiff_t task = 0; task < tasks; ++task) {
            if (failed) continue;
            const Part part = part_of(whole, &work, form->groups, task);
            const ptrdiff_t m = task / work.splits / form->groups * work.lines;
            const ptrdiff_t count = smaller(work.lines, rows - m);
            ptrdiff_t b = m / pixels, rest = pixels - m % pixels; /* rows of it that follow */
            for (ptrdiff_t i = 0; i < count; ++i) {
                int16_t *row = a + i * lda;
                widen(x + (m + i) * form->channels + part.group * channels, row, channels, zero[b]);
                if (channels < lda) row[channels] = 0;
                of_row[i] = scale[b];
                if (--rest == 0) {
                    ++b;
                    rest = pixels;
                }
            }
            multiply_lines(a, 0, &runs, &part, of_row, m, 1, count);
        }
        free(a);
        free(of_row);
    }
    free(at);
    return failed;
}

/* Convolutions: the input's rows are widened once for some lines of outputs, which read them where
 * they lie. */
FMA static int multiply_windows(const uint8_t *x, const int32_t *zero, const float *scale,
                                Part whole, const Form *form) {
    const ptrdiff_t channels = form->channels / form->groups;
    const ptrdiff_t padded = (form->width + 2 * form->pad_w) * channels;
    const int merged = form->dilation_w == 1; /* taps of a row lie side by side */
    const ptrdiff_t count = form->kernel_h * (merged ? 1 : form->kernel_w);
    const ptrdiff_t run = (merged ? form->kernel_w : 1) * channels;
    const ptrdiff_t reach = form->dilation_h * (form->kernel_h - 1) + 1;
    /* Lines at a time: so that weights are used for many rows, and their input stays in a cache. */
    const ptrdiff_t fit = (2 * CACHED / (padded * 2) - reach) / form->stride_h + 1;
    const ptrdiff_t most = larger(1, smaller(fit, (47 + form->out_w) / form->out_w));
    const ptrdiff_t panels = (whole.out + PANEL - 1) / PANEL;
    const Work work = divide(form->out_h, most, form->batch, form->groups, panels);
    const ptrdiff_t tasks = form->batch * work.blocks * form->groups * work.splits;
    const ptrdiff_t held = ((work.lines - 1) * form->stride_h + reach) * padded;
    const ptrdiff_t products =
        form->batch * form->out_h * form->out_w * count * run * whole.all;
    int failed = 0;
#pragma omp parallel reduction(| : failed) if (products > SERIAL)
    {
        int16_t *a = malloc((size_t)(held + 1) * sizeof *a); /* an odd run ends with another's */
        ptrdiff_t *at = malloc((size_t)count * sizeof *at);
        float *of_row = malloc((size_t)form->out_w * sizeof *of_row);
        failed = a == NULL || at == NULL || of_row == NULL;
        for (ptrdiff_t r = 0; r < count && !failed; ++r) {
            const ptrdiff_t ky = merged ? r : r / form->kernel_w;
            const ptrdiff_t kx = merged ? 0 : r % form->kernel_w;
            at[r] = ky * form->dilation_h * padded + kx * form->dilation_w * channels;
        }
        if (!failed) a[held] = 0;
        const Runs runs = {form->stride_w * channels, count, (run + 1) / 2, at, NULL};
#pragma omp for schedule(dynamic)
        for (ptrdiff_t task = 0; task < tasks; ++task) {
            if (failed) continue;
            const Part part = part_of(whole, &work, form->groups, task);
            const ptrdiff_t block = task / work.splits / form->groups;
            const ptrdiff_t b = block / work.blocks, oy = block % work.blocks * work.lines;
            const ptrdiff_t lines = smaller(work.lines, form->out_h - oy);
            widen_rows(x + b * form->height * form->width * form->channels, a, form,
                       oy * form->stride_h - form->pad_h, (lines - 1) * form->stride_h + reach,
                       part.group * channels, channels, zero[b]);
            for (ptrdiff_t ox = 0; ox < form->out_w; ++ox) of_row[ox] = scale[b];
            multiply_lines(a, form->stride_h * padded, &runs, &part, of_row,
                           (b * form->out_h + oy) * form->out_w, lines, form->out_w);
        }
        free(a);
        free(at);
        free(of_row);
    }
    return failed;
}

/* One line of outputs of 16 channels, each over its own taps, at x + at[tap], ``step`` further on
 * for the next. Pairs of bytes are laid side by side, with the weights of both. */
FMA INLINE void multiply_line(const uint8_t *x, const ptrdiff_t *at, ptrdiff_t step,
                              const int16_t *weight, const int32_t *sums, ptrdiff_t pairs,
                              ptrdiff_t channels, const Form *form, const Finish *f, int32_t zero,
                              float scale, ptrdiff_t o, ptrdiff_t to) {
    const Line line = line_of(f, o);
    float *const real = f->real;
    uint8_t *const bytes = f->bytes;
    const __m256i z = _mm256_set1_epi32(-zero);
    const __m256i z0 = _mm256_mullo_epi32(z, _mm256_loadu_si256((const __m256i *)(sums + o)));
    const __m256i z1 = _mm256_mullo_epi32(z, _mm256_loadu_si256((const __m256i *)(sums + o + 8)));
    for (ptrdiff_t ox = 0; ox < form->out_w; ++ox, x += step, to += channels) {
        __m256i s0 = z0, s1 = z1;
#pragma GCC unroll 13
        for (ptrdiff_t p = 0; p < pairs; ++p) {
            const int16_t *w = weight + (p * channels + o) * 2;
            const __m128i a = _mm_loadu_si128((const __m128i *)(x + at[2 * p]));
            const __m128i b = _mm_loadu_si128((const __m128i *)(x + at[2 * p + 1]));
            const __m256i lo = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(a, b));
            const __m256i hi = _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(a, b));
            s0 = _mm256_add_epi32(
                s0, _mm256_madd_epi16(lo, _mm256_loadu_si256((const __m256i *)w)));
            s1 = _mm256_add_epi32(
                s1, _mm256_madd_epi16(hi, _mm256_loadu_si256((const __m256i *)(w + 16))));
        }
        finish(_mm256_cvtepi32_ps(s0), _mm256_cvtepi32_ps(s1), scale, &line, PANEL, real ? real + to : NULL, bytes ? bytes + to : NULL);
    }
}

#define LINE(pairs)                                                                                \
    multiply_line(read + o, at, step, weight, sums, pairs, channels, form, f, zero[b], scale[b],   \
                  o, first + o)

FMA static int multiply_depthwise(const uint8_t *x, const int32_t *zero, const float *scale,
                                  const int16_t *weight, const int32_t *sums, const Finish *f,
                                  const Form *form) {
    const ptrdiff_t channels = form->channels, taps = form->kernel_h * form->kernel_w;
    const ptrdiff_t pairs = (taps + 1) / 2, lines = form->batch * form->out_h;
    const ptrdiff_t row = form->width * channels, edge = form->pad_w * channels;
    const ptrdiff_t padded = row + 2 * edge, step = form->stride_w * channels;
    int failed = 0;
#pragma omp parallel reduction(| : failed) if (lines * form->out_w * channels * taps > SERIAL)
    {
        ptrdiff_t *at = malloc((size_t)(2 * pairs) * sizeof *at);
        uint8_t *read = malloc((size_t)(form->kernel_h * padded)); /* what a line reads, padded */
        failed = at == NULL || read == NULL;
        for (ptrdiff_t t = 0; t < 2 * pairs && !failed; ++t) {
            const ptrdiff_t tap = smaller(t, taps - 1); /* the weight of one too many is 0 */
            at[t] = tap / form->kernel_w * padded +
                    tap % form->kernel_w * form->dilation_w * channels;
        }
#pragma omp for schedule(dynamic)
        for (ptrdiff_t line = 0; line < lines; ++line) {
            if (failed) continue;
            const ptrdiff_t b = line / form->out_h, oy = line % form->out_h;
            for (ptrdiff_t ky = 0; ky < form->kernel_h; ++ky) {
                const ptrdiff_t iy = oy * form->stride_h - form->pad_h + ky * form->dilation_h;
                uint8_t *to = read + ky * padded;
                if (iy < 0 || iy >= form->height) {
                    memset(to, zero[b], (size_t)padded);
                    continue;
                }
                memset(to, zero[b], (size_t)edge);
                memcpy(to + edge, x + (b * form->height + iy) * row, (size_t)row);
                memset(to + edge + row, zero[b], (size_t)edge);
            }
            const ptrdiff_t first = line * form->out_w * channels;
            for (ptrdiff_t block = 0; block < channels; block += PANEL) {
                /* The last channels are computed with some before them, once more. */
                const ptrdiff_t o = smaller(block, channels - PANEL);
                if (pairs == 5) /* 3 × 3 */
                    LINE(5);
                else if (pairs == 13) /* 5 × 5 */
                    LINE(13);
                else
                    LINE(pairs);
            }
        }
        free(at);
        free(read);
    }
    return failed;
}

#endif

/* A convolution's form, and what becomes of its sums: real numbers y, within lo … hi, or (after 1)
 * the bytes round(y · inverse + byte), or those of y's GELU by the error function (2) or by the
 * hyperbolic tangent (3). */
#define FORM                                                                                       \
    ptrdiff_t batch, ptrdiff_t height, ptrdiff_t width, ptrdiff_t channels, ptrdiff_t kernel_h,    \
        ptrdiff_t kernel_w, ptrdiff_t stride_h, ptrdiff_t stride_w, ptrdiff_t pad_h,               \
        ptrdiff_t pad_w, ptrdiff_t dilation_h, ptrdiff_t dilation_w
#define END float lo, float hi, int after, float inverse, int byte
#define SIDE(size, axis)                                                                           \
    ((size + 2 * pad_##axis - dilation_##axis * (kernel_##axis - 1) - 1) / stride_##axis + 1)
#define GIVEN(groups)                                                                              \
    {batch,    height,   width, channels, groups,     kernel_h,   kernel_w,        stride_h,       \
     stride_w, pad_h,    pad_w, dilation_h, dilation_w, SIDE(height, h), SIDE(width, w)}
#define FINISH                                                                                     \
    {scale, bias, lo <= -FLT_MAX ? -INFINITY : lo, hi >= FLT_MAX ? INFINITY : hi,                  \
     after > 1 ? after - 1 : 0, inverse, (float)byte, after ? NULL : y, after ? y : NULL}
#define LACKS_MEMORY 1
#define LACKS_INSTRUCTIONS 2
#define IS_NO_ROW 3

/* x [batch, height, width, channels] by weight [groups, panels, runs, pairs, PANEL, 2] → y [batch,
 * out_h, out_w, groups · out]: sum · scale of the sample · scale of the channel + bias. A run is
 * what a row of taps reads, or one tap where they are dilated, its pairs filled up with 0. zero and
 * sample_scale are [batch]; scale and bias [groups, panels, PANEL].
 *
 * Where ``runs`` is not 1, each pixel is by itself, and its channels are so many runs with scales of
 * their own, run_scale [panels, runs, PANEL]: groups of columns of a linear layer. */
EXPORT int multiply_panels(const uint8_t *x, const int32_t *zero, const float *sample_scale,
                           const int16_t *weight, const float *run_scale, const float *scale,
                           const float *bias, void *y, FORM, ptrdiff_t out, ptrdiff_t groups,
                           ptrdiff_t runs, int wide, END) {
#if SUPPORTED
    const int at_a_time = channels_at_a_time();
    if (!at_a_time) return LACKS_INSTRUCTIONS;
    const Form form = GIVEN(groups);
    const Finish f = FINISH;
    const Part whole = {weight, runs > 1 ? run_scale : NULL, &f, 0, 0, 0, out, out * groups,
                        wide && at_a_time == 16};
    const int each = kernel_h == 1 && kernel_w == 1 && stride_h == 1 && stride_w == 1 &&
                     pad_h == 0 && pad_w == 0;
    if (runs > 1 && !(each && groups == 1)) return IS_NO_ROW;
    return each ? multiply_each(x, zero, sample_scale, whole, &form, runs)
                : multiply_windows(x, zero, sample_scale, whole, &form);
#else
    return LACKS_INSTRUCTIONS;
#endif
}

/* Every channel, of 16 or more, by its own taps: weight [pairs of taps, channels, 2], sums of it,
 * scale and bias [channels] → y [batch, out_h, out_w, channels]. */
EXPORT int multiply_channels(const uint8_t *x, const int32_t *zero, const float *sample_scale,
                             const int16_t *weight, const int32_t *sums, const float *scale,
                             const float *bias, void *y, FORM, END) {
#if SUPPORTED
    if (!channels_at_a_time() || channels < PANEL) return LACKS_INSTRUCTIONS;
    const Form form = GIVEN(channels);
    const Finish f = FINISH;
    return multiply_depthwise(x, zero, sample_scale, weight, sums, &f, &form);
#else
    return LACKS_INSTRUCTIONS;
#endif
}
