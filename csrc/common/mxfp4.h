// MXFP4 (OCP Microscaling Formats 1.0): E2M1 values, a power of two (E8M0) for each block of 32.
//
// The scale of a block is the power of two at or above amax / 6, so that nothing saturates but infinity; that of zeros is 2^-127. A block
// with a NaN has scale NaN, and the code of +6 throughout.

#pragma once

#include "minifloat.h"

namespace mxfp4 {

constexpr int BLOCK = 32;

// The E8M0 code of a block, by a true division.
template <typename Float>
HOST_DEVICE IntOf<Float> block_scale(Float amax) {
    return encode_e8m0(amax / 6.0f);
}

// 2^-(code - 127), which for every code but that of NaN is a float.
template <typename Float>
HOST_DEVICE Float encoding_factor(IntOf<Float> block_scale) {
    using Int = IntOf<Float>;
    const Int number = block_scale < 254 ? (254 - block_scale) << 23 : all<Int>(0x00400000);
    return float_of<Float>(block_scale > 254 ? all<Int>(0x7fc00000) : number);
}

}  // namespace mxfp4
