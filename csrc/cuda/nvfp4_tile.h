// Blocks of 16 values of a tile of 128 x 64 along and across rows, and their random Hadamard transform.

#pragma once

#include "butterflies.h"
#include "nvfp4.h"
#include "tile.h"

namespace nvfp4 {

constexpr int THREADS = 256, HEIGHT = 128, WIDTH = 64;
constexpr int STRIPS = HEIGHT / BLOCK, BLOCKS = WIDTH / BLOCK;

// y = H (signs * x) / 4 of 16 values, rounded to T. Nothing happens if `signs` is null.
template <typename T>
DEVICE void transform(const float* signs, float* v) {
    if (signs == nullptr) return;
    UNROLL
    for (int i = 0; i < BLOCK; ++i) v[i] *= signs[i];
    butterflies<BLOCK>(v);
    UNROLL
    for (int i = 0; i < BLOCK; ++i) v[i] = rounded_to<T>(v[i] * 0.25f);
}

template <typename T>
DEVICE void load_row_block(const Tile<T, HEIGHT, WIDTH>& tile, int row, int block, float* v) {
    constexpr int PER = Tile<T, HEIGHT, WIDTH>::PER;
    UNROLL
    for (int i = 0; i < BLOCK; i += PER) load_floats<PER>(&tile.values[row][block * BLOCK + i], v + i);
}

// Of two neighbouring columns.
template <typename T>
DEVICE void load_column_blocks(const Tile<T, HEIGHT, WIDTH>& tile, int strip, int column, float (*v)[BLOCK]) {
    UNROLL
    for (int i = 0; i < BLOCK; ++i) {
        float pair[2];
        load_floats<2>(&tile.values[strip * BLOCK + i][column], pair);
        v[0][i] = pair[0];
        v[1][i] = pair[1];
    }
}

DEVICE int32_t block_magnitude(const float* v) {
    int32_t largest = 0;
    UNROLL
    for (int i = 0; i < BLOCK; ++i) largest = larger(largest, magnitude_of(v[i]));
    return largest;
}

inline int64_t blocks_of(int64_t values, int64_t width) { return (values + width - 1) / width; }

}  // namespace nvfp4
