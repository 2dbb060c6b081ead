// NVFP4 (NVIDIA 2025, arXiv:2509.25149, appendix B): E2M1 values, an E4M3 scale for each block, a float32 scale for the tensor.
//
// Operations and their order are those of TransformerEngine, with true divisions. A block of zeros, or one too small for the smallest
// E4M3 number, has scale 0. An infinite amax counts as a tensor scale of 1, one that is NaN as the largest float: what is dequantized
// is infinite or NaN either way, and no scale byte is ever NaN.

#pragma once

#include "minifloat.h"

namespace nvfp4 {

constexpr int BLOCK = 16;

// By what the tensor is multiplied, so that its largest scale and value meet 448 and 6.
HOST_DEVICE float tensor_scale(float amax) {
    const float scale = finite((448.0f * 6.0f) / amax);
    return amax == 0.0f || scale == 0.0f ? 1.0f : scale;
}

// The E4M3 code of a block whose largest magnitude is `block_amax`; never NaN.
template <typename Float>
HOST_DEVICE IntOf<Float> block_scale(Float block_amax, float tensor_scale) {
    return E4M3::encode_positive(finite(block_amax * (tensor_scale * (1.0f / 6.0f))));
}

// By what the values of a block are multiplied before they are rounded to E2M1.
template <typename Float>
HOST_DEVICE Float encoding_factor(IntOf<Float> block_scale, float tensor_scale) {
    return finite(1.0f / (E4M3::decode<Float>(block_scale) * (1.0f / tensor_scale)));
}

// By what E2M1 values are multiplied to get back.
HOST_DEVICE float decoding_factor(int32_t block_scale, float amax) { return decode_e4m3(block_scale) * amax * (1.0f / (448.0f * 6.0f)); }

}  // namespace nvfp4
