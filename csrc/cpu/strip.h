// Strips: 16 rows of a matrix as float32, filled up with zeros, and Hadamard transforms and magnitudes along and across them.

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
    for (int64_t line = 0; line < WIDTH * size; line += 64) __builtin_prefetch(reinterpret_cast<const void*>(begin + line), 0, 2);
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

// y = H (signs * x) / sqrt(ORDER) of every ORDER neighbours x of a row, rounded to `type`, with Sylvester's H.
template <int ORDER>
constexpr float TRANSFORM_SCALE = ORDER == 16 ? 0.25f : 0.17677669529663687f;

template <int ORDER, typename Float>
INLINE void transform_rows(Type type, const float* signs, const Strip& from, Strip& to) {
    constexpr int COUNT = ORDER / LENGTH<Float>;
    for (int at = 0; at < HEIGHT * WIDTH; at += ORDER) {
        Float v[COUNT];
        for (int i = 0; i < COUNT; ++i) {
            v[i] = butterflies(load<Float>(&from.values[0][0] + at + i * LENGTH<Float>) * load<Float>(signs + i * LENGTH<Float>));
        }
        butterflies<COUNT>(v);
        for (int i = 0; i < COUNT; ++i) {
            store(&to.values[0][0] + at + i * LENGTH<Float>, rounded_to(type, v[i] * TRANSFORM_SCALE<ORDER>));
        }
    }
}

// The same of every column of ORDER rows, which ORDER / HEIGHT strips hold.
template <int ORDER, typename Float>
INLINE void transform_columns(Type type, const float* signs, const Strip* from, Strip* to) {
    for (int c = 0; c < WIDTH; c += LENGTH<Float>) {
        Float v[ORDER];
        for (int r = 0; r < ORDER; ++r) v[r] = load<Float>(from[r / HEIGHT].values[r % HEIGHT] + c) * signs[r];
        butterflies<ORDER>(v);
        for (int r = 0; r < ORDER; ++r) store(to[r / HEIGHT].values[r % HEIGHT] + c, rounded_to(type, v[r] * TRANSFORM_SCALE<ORDER>));
    }
}

template <typename Float>
INLINE IntOf<Float> magnitudes_of(const void* v, int count) {
    IntOf<Float> largest{};
    for (int i = 0; i < count; i += LENGTH<Float>) {
        largest = larger(largest, magnitude_of(load<Float>(static_cast<const float*>(v) + i)));
    }
    return largest;
}

template <typename Float>
INLINE int32_t row_magnitude(const void* v, int count) {
    return largest_lane(magnitudes_of<Float>(v, count));
}

// Of every BLOCK neighbours of a row, row by row.
template <int BLOCK, typename Float>
INLINE void block_magnitudes(const Strip& strip, int32_t* magnitudes) {
    constexpr int LANES = LENGTH<Float>;
    for (int i = 0; i < HEIGHT * WIDTH / BLOCK; i += LANES) {
        IntOf<Float> largest[LANES];
        for (int k = 0; k < LANES; ++k) largest[k] = magnitudes_of<Float>(&strip.values[0][0] + (i + k) * BLOCK, BLOCK);
        store(magnitudes + i, largest_lanes<LANES / 2>(largest));
    }
}

template <typename Float>
INLINE IntOf<Float> column_magnitudes(const Strip& strip, int column) {
    IntOf<Float> largest{};
    for (int r = 0; r < HEIGHT; ++r) largest = larger(largest, magnitude_of(load<Float>(strip.values[r] + column)));
    return largest;
}

// Of every BLOCK columns of BLOCK rows, which BLOCK / HEIGHT strips hold.
template <int BLOCK, typename Float>
INLINE void square_magnitudes(const Strip* strips, int32_t* magnitudes) {
    alignas(64) int32_t of_columns[WIDTH];
    for (int c = 0; c < WIDTH; c += LENGTH<Float>) {
        IntOf<Float> largest{};
        for (int s = 0; s < BLOCK / HEIGHT; ++s) largest = larger(largest, column_magnitudes<Float>(strips[s], c));
        store(of_columns + c, largest);
    }
    for (int b = 0; b < WIDTH / BLOCK; ++b) magnitudes[b] = row_magnitude<Float>(of_columns + b * BLOCK, BLOCK);
}
