// Blocks of 16 values of a tile of 128 x 64 along and across rows.

#pragma once

#include "block.h"
#include "nvfp4.h"
#include "tile.h"

namespace nvfp4 {

constexpr int THREADS = 256, HEIGHT = 128, WIDTH = 64;
constexpr float NORM = 0.25f;  // 1 / sqrt(16)
constexpr int STRIPS = HEIGHT / BLOCK, BLOCKS = WIDTH / BLOCK;

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

}  // namespace nvfp4
