// Scales of FP8 tensors: float32 for whole tensors, rows and tiles, powers of two (E8M0) for the 32-value blocks of MXFP8.

#pragma once

#include "minifloat.h"

namespace fp8 {

// Where the quantized rows of a matrix go, or its columns as rows of the transpose. Lines are rows or columns; blocks that share a scale
// are of `height` lines and `width` values of a line.
struct Output {
    uint8_t* codes;      // null if not wanted
    void* scales;        // float, of MXFP8 uint8_t
    float* amax;         // found here where none is given
    const float* given;  // null if none is
    int64_t height, width;
    int64_t lines, across;  // how many lines there are, and blocks along a line
};

// By what values are multiplied before they are rounded: `largest` of the format / amax, 1 for an amax that is 0, infinite or NaN.
template <typename Float>
HOST_DEVICE Float encoding_factor(Float amax, float largest, bool power_of_two) {
    const Float usable = (amax > 0.0f) & (amax <= LARGEST_FLOAT) ? amax : all<Float>(largest);
    const Float factor = finite(largest / usable);
    return power_of_two ? float_of<Float>(bits_of(factor) & INFINITE) : factor;
}

// By what codes are multiplied to get back; infinite or NaN for such an amax.
template <typename Float>
HOST_DEVICE Float decoding_scale(Float amax, Float encoding_factor) {
    return magnitude_of(amax) >= INFINITE ? amax : 1.0f / encoding_factor;
}

// The E8M0 code of a block: amax / `largest`, rounded up so that nothing saturates. NaN for an amax of NaN.
template <typename Float>
HOST_DEVICE IntOf<Float> block_scale(Float amax, float largest) {
    return encode_e8m0(amax * (1.0f / largest));
}

// 2^-(code - 127), which for every code is a float; code 255 (NaN) counts as 254.
template <typename Float>
HOST_DEVICE Float block_encoding_factor(IntOf<Float> block_scale) {
    const IntOf<Float> exponent = 254 - smaller(block_scale, all<IntOf<Float>>(254));
    return float_of<Float>(exponent > 0 ? exponent << 23 : all<IntOf<Float>>(0x00400000));
}

}  // namespace fp8
