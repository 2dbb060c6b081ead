// Strips: 16 rows of a matrix as float32, filled up with zeros, and the 16-point Hadamard transform along and across them.

#pragma once

#include "lanes.h"

constexpr int HEIGHT = 16, WIDTH = 128;

struct Strip {
    alignas(64) float values[HEIGHT][WIDTH];
};

struct Matrix {
    const void* values;
    Type type;
    int64_t rows, columns;
};

// Asks for WIDTH values of the next strip: the hardware does not foresee 16 rows at once.
INLINE void prefetch(const Matrix& x, int64_t at) {
    const int64_t size = x.type == Type::BFLOAT16 ? 2 : 4;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(x.values) + at * size;
    for (int64_t line = 0; line < WIDTH * size; line += 64) __builtin_prefetch(reinterpret_cast<const void*>(begin + line));
}

template <typename Float>
INLINE void load_strip(const Matrix& x, int64_t row, int64_t column, Strip& strip) {
    const int64_t width = std::min<int64_t>(WIDTH, x.columns - column), whole = width / LENGTH<Float> * LENGTH<Float>;
    for (int r = 0; r < HEIGHT; ++r) {
        float* line = strip.values[r];
        if (row + r >= x.rows || width < WIDTH) std::fill(line, line + WIDTH, 0.0f);
        if (row + r >= x.rows) continue;
        const int64_t at = (row + r) * x.columns + column;
        prefetch(x, at + HEIGHT * x.columns);
        for (int64_t c = 0; c < whole; c += LENGTH<Float>) store(line + c, load_as<Float>(x.type, x.values, at + c));
        for (int64_t c = whole; c < width; ++c) {
            line[c] = x.type == Type::BFLOAT16 ? float_of_bfloat16(static_cast<const uint16_t*>(x.values)[at + c])
                                               : static_cast<const float*>(x.values)[at + c];
        }
    }
}

// y = H (signs * x) / 4 of every 16 neighbours x of a row, rounded to `type`, with Sylvester's H of order 16.
template <typename Float>
INLINE void transform_rows(Type type, const float* signs, const Strip& from, Strip& to) {
    constexpr int COUNT = 16 / LENGTH<Float>;
    for (int at = 0; at < HEIGHT * WIDTH; at += 16) {
        Float v[COUNT];
        for (int i = 0; i < COUNT; ++i) {
            v[i] = butterflies(load<Float>(&from.values[0][0] + at + i * LENGTH<Float>) * load<Float>(signs + i * LENGTH<Float>));
        }
        butterflies<COUNT>(v);
        for (int i = 0; i < COUNT; ++i) store(&to.values[0][0] + at + i * LENGTH<Float>, rounded_to(type, v[i] * 0.25f));
    }
}

// The same of every column.
template <typename Float>
INLINE void transform_columns(Type type, const float* signs, const Strip& from, Strip& to) {
    for (int c = 0; c < WIDTH; c += LENGTH<Float>) {
        Float v[HEIGHT];
        for (int r = 0; r < HEIGHT; ++r) v[r] = load<Float>(from.values[r] + c) * signs[r];
        butterflies<HEIGHT>(v);
        for (int r = 0; r < HEIGHT; ++r) store(to.values[r] + c, rounded_to(type, v[r] * 0.25f));
    }
}

template <typename Float>
INLINE int32_t row_magnitude(const float* v, int count) {
    IntOf<Float> largest{};
    for (int i = 0; i < count; i += LENGTH<Float>) largest = larger(largest, magnitude_of(load<Float>(v + i)));
    return largest_lane(largest);
}

template <typename Float>
INLINE IntOf<Float> column_magnitudes(const Strip& strip, int column) {
    IntOf<Float> largest{};
    for (int r = 0; r < HEIGHT; ++r) largest = larger(largest, magnitude_of(load<Float>(strip.values[r] + column)));
    return largest;
}
