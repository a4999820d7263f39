/* What native.c and products.c share. */

#ifndef AUTOQUANT_NATIVE_H
#define AUTOQUANT_NATIVE_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* Into functions for any processor, whose instructions it is compiled to then. */
#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

INLINE ptrdiff_t smaller(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }

/* e^x for x from −87 to 88, within 2 units in the last place: 2^n by its bits, and the Taylor series
 * of the rest, which is at most ln(2)/2 in magnitude. It is written out so that it is vectorized.
 * NaN stays NaN, where it may be one. */
INLINE float power_of_e(float x, int may_be_nan) {
    const float n = rintf(x * 1.44269504f);
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f; /* ln(2) in two parts */
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    union {
        int32_t i;
        float f;
    } power = {((int32_t)(may_be_nan && n != n ? 0.0f : n) + 127) << 23};
    return p * power.f;
}

#endif
