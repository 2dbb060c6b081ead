// Blocks of values in registers, which share a scale.

#pragma once

#include "butterflies.h"
#include "launch.h"

// y = scale * H (signs * x), rounded to T. Nothing happens if `signs` is null.
template <typename T, int COUNT>
DEVICE void signed_transform(const float* signs, float scale, float (&v)[COUNT]) {
    if (signs == nullptr) return;
    UNROLL
    for (int i = 0; i < COUNT; ++i) v[i] *= signs[i];
    butterflies<COUNT>(v);
    UNROLL
    for (int i = 0; i < COUNT; ++i) v[i] = rounded_to<T>(v[i] * scale);
}

template <int COUNT>
DEVICE int32_t block_magnitude(const float (&v)[COUNT]) {
    int32_t largest = 0;
    UNROLL
    for (int i = 0; i < COUNT; ++i) largest = larger(largest, magnitude_of(v[i]));
    return largest;
}

// Of `width` values each, the last perhaps fewer.
inline int64_t blocks_of(int64_t values, int64_t width) { return (values + width - 1) / width; }
