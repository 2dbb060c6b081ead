// Rows in blocks of 32 values, which are summed in 32 lanes whatever the instruction set, so that a sum has one order.
//
// Of bfloat16, the first 16 lanes hold the values at even places and the last 16 those at odd ones: these are the halves of 16 words, which
// take no shuffles to get apart and together. What goes with the values, as weights, is arranged in the same way.

#pragma once

#include "lanes.h"

constexpr int BLOCK = 32;

// The vectors of a block.
template <typename Float>
constexpr int PARTS = BLOCK / LENGTH<Float>;

template <Type TYPE>
constexpr int64_t SIZE_OF = TYPE == Type::BFLOAT16 ? 2 : 4;

// Rows of equal length, `stride` values apart. Null values: they are not there.
struct Rows {
    const void* values;
    int64_t stride;
};

template <Type TYPE>
INLINE const void* row_of(const Rows& rows, int64_t row) {
    return rows.values == nullptr ? nullptr : static_cast<const char*>(rows.values) + row * rows.stride * SIZE_OF<TYPE>;
}

// The lane of a value of a row, counted over all blocks.
INLINE int64_t lane_of(Type type, int64_t place) {
    return type == Type::BFLOAT16 ? place / BLOCK * BLOCK + place % 2 * (BLOCK / 2) + place % BLOCK / 2 : place;
}

INLINE int64_t lanes_of(int64_t width) { return (width + BLOCK - 1) / BLOCK * BLOCK; }

// `count` of the values from `at` on, followed by zeros.
template <Type TYPE, typename Float>
INLINE void load_block(const void* values, int64_t at, int64_t count, Float* parts) {
    constexpr int HALF = PARTS<Float> / 2;
    const char* from = static_cast<const char*>(values) + at * SIZE_OF<TYPE>;
    alignas(64) char line[BLOCK * SIZE_OF<TYPE>];
    if (count < BLOCK) {
        std::memset(line, 0, sizeof line);
        std::memcpy(line, from, count * SIZE_OF<TYPE>);
        from = line;
    }
    if constexpr (TYPE == Type::FLOAT32) {
        UNROLL
        for (int i = 0; i < PARTS<Float>; ++i) parts[i] = load<Float>(from + i * sizeof(Float));
    } else {
        UNROLL
        for (int i = 0; i < HALF; ++i) {
            const auto words = load<IntOf<Float>>(from + i * sizeof(Float));
            parts[i] = float_of<Float>(words << 16);
            parts[i + HALF] = float_of<Float>(words & static_cast<int32_t>(0xffff0000));
        }
    }
}

template <Type TYPE, typename Float>
INLINE void store_block(void* values, int64_t at, int64_t count, const Float* parts) {
    constexpr int HALF = PARTS<Float> / 2;
    char* const into = static_cast<char*>(values) + at * SIZE_OF<TYPE>;
    alignas(64) char line[BLOCK * SIZE_OF<TYPE>];
    char* const to = count < BLOCK ? line : into;
    if constexpr (TYPE == Type::FLOAT32) {
        UNROLL
        for (int i = 0; i < PARTS<Float>; ++i) store(to + i * sizeof(Float), parts[i]);
    } else {
        UNROLL
        for (int i = 0; i < HALF; ++i) store(to + i * sizeof(Float), bfloat16_of(parts[i]) | bfloat16_of(parts[i + HALF]) << 16);
    }
    if (count < BLOCK) std::memcpy(into, line, count * SIZE_OF<TYPE>);
}

// The sum of the lanes: of those 16 apart in float32, of these sums in float64, in the order of a tree.
template <typename Float>
INLINE double total(const Float* parts) {
    constexpr int HALF = PARTS<Float> / 2;
    alignas(64) float line[BLOCK / 2];
    UNROLL
    for (int i = 0; i < HALF; ++i) store(line + i * LENGTH<Float>, parts[i] + parts[i + HALF]);
    double sums[BLOCK / 2];
    for (int lane = 0; lane < BLOCK / 2; ++lane) sums[lane] = line[lane];
    for (int width = BLOCK / 4; width > 0; width /= 2) {
        for (int lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
    }
    return sums[0];
}
