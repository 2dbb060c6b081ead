// What a row is normalized with, and its normalized values block by block: for kernels that store them, and for those that quantize them.

#pragma once

#include <cmath>
#include <memory>

#include "blocks.h"

struct NormInput {
    Rows x, residual;
    void* sum;  // [rows, width], x + residual, rounded; null without residual
    Type type;
    int64_t rows, width;
    const float* weight;  // [1], or by lanes
    bool one_gain;
    float eps;
};

// The weights by lanes, filled up with zeros to whole blocks; a single gain stays as it is.
inline std::unique_ptr<float[]> arranged(const float* weight, bool one_gain, Type type, int64_t width) {
    std::unique_ptr<float[]> lanes(new float[one_gain ? 1 : lanes_of(width)]());
    for (int64_t i = 0; i < (one_gain ? 1 : width); ++i) lanes[lane_of(type, i)] = weight[i];
    return lanes;
}

template <bool ONE_GAIN, typename Float>
INLINE void load_weights(const NormInput& in, int64_t at, Float* weights) {
    UNROLL
    for (int i = 0; i < PARTS<Float>; ++i) weights[i] = ONE_GAIN ? all<Float>(*in.weight) : load<Float>(in.weight + at + i * LENGTH<Float>);
}

// Where the values of a row are that is normalized: adds the residual first, if there is one.
template <Type TYPE, typename Float>
INLINE const void* prepared_row(const NormInput& in, int64_t row) {
    const void *x = row_of<TYPE>(in.x, row), *residual = row_of<TYPE>(in.residual, row);
    if (residual == nullptr) return x;
    char* const sum = static_cast<char*>(in.sum) + row * in.width * SIZE_OF<TYPE>;
    for (int64_t at = 0; at < in.width; at += BLOCK) {
        const int64_t count = std::min<int64_t>(BLOCK, in.width - at);
        Float values[PARTS<Float>], added[PARTS<Float>];
        load_block<TYPE>(x, at, count, values);
        load_block<TYPE>(residual, at, count, added);
        UNROLL
        for (int i = 0; i < PARTS<Float>; ++i) values[i] += added[i];
        store_block<TYPE>(sum, at, count, values);
    }
    return sum;
}

// 1 / sqrt(mean(x^2) + eps)
template <Type TYPE, typename Float>
INLINE float inverse_rms_of(const NormInput& in, const void* row) {
    Float squares[PARTS<Float>] = {};
    for (int64_t at = 0; at < in.width; at += BLOCK) {
        Float values[PARTS<Float>];
        load_block<TYPE>(row, at, std::min<int64_t>(BLOCK, in.width - at), values);
        UNROLL
        for (int i = 0; i < PARTS<Float>; ++i) squares[i] += values[i] * values[i];
    }
    return static_cast<float>(1 / std::sqrt(total(squares) / in.width + in.eps));
}

// Values of a row: normalized, rounded, and times the weights.
template <Type TYPE, bool ONE_GAIN, typename Float>
INLINE void normalized_block(const NormInput& in, const void* row, float inverse_rms, int64_t at, int64_t count, Float* parts) {
    Float weights[PARTS<Float>];
    load_block<TYPE>(row, at, count, parts);
    load_weights<ONE_GAIN>(in, at, weights);
    UNROLL
    for (int i = 0; i < PARTS<Float>; ++i) parts[i] = rounded_to(TYPE, parts[i] * inverse_rms) * weights[i];
}
