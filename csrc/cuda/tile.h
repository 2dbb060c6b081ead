// Tiles of a matrix in shared memory.

#pragma once

#include "launch.h"

template <typename T>
struct Matrix {
    const T* values;
    int64_t rows, columns;
    bool aligned;  // whether every row begins at a multiple of 16 bytes
};

template <typename T>
Matrix<T> matrix_of(const void* values, int64_t rows, int64_t columns) {
    const bool aligned = (reinterpret_cast<uintptr_t>(values) | (columns * sizeof(T))) % 16 == 0;
    return {static_cast<const T*>(values), rows, columns, aligned};
}

// Rows are 16 bytes longer than they are wide, so that threads of neighbouring rows use different banks.
template <typename T, int ROWS, int COLUMNS>
struct Tile {
    static constexpr int HEIGHT = ROWS, WIDTH = COLUMNS, PER = 16 / sizeof(T);
    alignas(16) T values[ROWS][COLUMNS + PER];
};

// Where a tile begins.
struct Place {
    int64_t row, column;
};

// COUNT neighbouring values of a row.
template <int COUNT, typename T, int ROWS, int COLUMNS>
DEVICE void load_row(const Tile<T, ROWS, COLUMNS>& tile, int row, int column, float* v) {
    constexpr int PER = Tile<T, ROWS, COLUMNS>::PER;
    UNROLL
    for (int i = 0; i < COUNT; i += PER) load_floats<PER>(&tile.values[row][column + i], v + i);
}

// Loads the tile that begins at `row`, `column`, filled up with zeros. All threads of a block of THREADS take part.
template <int THREADS, typename T, int ROWS, int COLUMNS>
DEVICE void load_tile(const Matrix<T>& x, int64_t row, int64_t column, Tile<T, ROWS, COLUMNS>& tile) {
    constexpr int PER = Tile<T, ROWS, COLUMNS>::PER, ACROSS = COLUMNS / PER, COUNT = ROWS * ACROSS / THREADS;
    static_assert(ROWS * ACROSS % THREADS == 0, "threads have equal shares");
    uint4 parts[COUNT];  // all loads are under way before the first is waited for
    UNROLL
    for (int i = 0; i < COUNT; ++i) {
        const int item = i * THREADS + threadIdx.x;
        const int64_t r = row + item / ACROSS, c = column + item % ACROSS * PER;
        parts[i] = {0, 0, 0, 0};
        if (r < x.rows && c + PER <= x.columns && x.aligned) {
            parts[i] = *reinterpret_cast<const uint4*>(x.values + r * x.columns + c);
        } else if (r < x.rows && c < x.columns) {
            Pack<PER, T> pack{};
            UNROLL
            for (int k = 0; k < PER; ++k) {
                if (c + k < x.columns) pack.values[k] = x.values[r * x.columns + c + k];
            }
            memcpy(&parts[i], &pack, sizeof pack);
        }
    }
    UNROLL
    for (int i = 0; i < COUNT; ++i) {
        const int item = i * THREADS + threadIdx.x;
        *reinterpret_cast<uint4*>(&tile.values[item / ACROSS][item % ACROSS * PER]) = parts[i];
    }
}
