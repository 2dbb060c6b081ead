// What NVFP4 and MXFP4 share: their job, and E2M1 codes of 16 values in registers.

#pragma once

#include "minifloat.h"
#include "philox.h"
#include "tile.h"

namespace e2m1 {

template <typename T, typename Output>
struct Job {
    Matrix<T> x;
    bool square;
    uint64_t seed;
    int64_t first_row, first_column;  // of x in the whole matrix
    Output rows, columns;
};

constexpr int PLACE = 16;  // values that take their random bits together

// The codes of 16 values, the first in the lowest bits. `row` and `place` say where in a whole matrix they lie.
template <bool STOCHASTIC>
DEVICE uint2 encode(const float* v, float factor, uint64_t seed, uint32_t stream, int64_t row, int64_t place) {
    Random4 random{};
    if (STOCHASTIC) random = block_random(seed, stream, row, place);
    uint32_t words[2] = {0, 0};
    UNROLL
    for (int i = 0; i < PLACE; ++i) {
        const float scaled = v[i] * factor;
        const int32_t code = STOCHASTIC ? E2M1::encode_stochastic(scaled, random_byte(random, i)) : E2M1::encode(scaled);
        words[i / 8] |= static_cast<uint32_t>(code) << (4 * (i % 8));
    }
    return {words[0], words[1]};
}

}  // namespace e2m1
