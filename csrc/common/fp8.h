// Scales of FP8 tensors: float32 for whole tensors, rows and tiles, powers of two (E8M0) for the 32-value blocks of MXFP8.

#pragma once

#include "minifloat.h"

namespace fp8 {

// By what values are multiplied before they are rounded: `largest` of the format / amax, 1 for an amax that is 0, infinite or NaN.
HOST_DEVICE float encoding_factor(float amax, float largest, bool power_of_two) {
    const bool usable = amax > 0.0f && amax <= LARGEST_FLOAT;
    const float factor = finite(largest / (usable ? amax : largest));
    return power_of_two ? float_of<float>(bits_of(factor) & INFINITE) : factor;
}

// The E8M0 code of a block: amax / `largest`, rounded up so that nothing saturates. NaN for an amax of NaN.
HOST_DEVICE int32_t block_scale(float amax, float largest) { return encode_e8m0(amax * (1.0f / largest)); }

// 2^-(code - 127), which for every code is a float; code 255 (NaN) counts as 254.
HOST_DEVICE float encoding_factor(int32_t block_scale) {
    const int32_t exponent = 254 - smaller(block_scale, 254);
    return float_of<float>(exponent ? exponent << 23 : 0x00400000);
}

}  // namespace fp8
