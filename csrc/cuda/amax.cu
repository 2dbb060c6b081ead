// Largest magnitude of a matrix, and of its 16-point Hadamard transforms along and across rows, from one read.

#include "nvfp4_tile.h"

namespace {

using namespace nvfp4;

template <typename T>
struct Job {
    Matrix<T> x;
    const float *row_signs, *column_signs;
    int32_t *row_amax, *column_amax;  // bits of a float; null if not wanted
};

template <typename T>
struct Shared {
    Tile<T, HEIGHT, WIDTH> tile;
    int32_t of_rows, of_columns;
};

template <typename T>
__global__ void __launch_bounds__(THREADS) find(const Job<T> job) {
    Shared<T>& shared = shared_as<Shared<T>>();
    const int64_t tiles = (job.x.columns + WIDTH - 1) / WIDTH;
    load_tile<THREADS>(job.x, blockIdx.x / tiles * HEIGHT, blockIdx.x % tiles * WIDTH, shared.tile);
    if (threadIdx.x == 0) shared.of_rows = shared.of_columns = 0;
    __syncthreads();
    if (job.row_amax != nullptr) {
        int32_t largest = 0;
        for (int item = threadIdx.x; item < HEIGHT * BLOCKS; item += THREADS) {
            float v[BLOCK];
            load_row<BLOCK>(shared.tile, item / BLOCKS, item % BLOCKS * BLOCK, v);
            signed_transform<T>(job.row_signs, NORM, v);
            largest = larger(largest, block_magnitude(v));
        }
        atomicMax(&shared.of_rows, largest);
    }
    if (job.column_amax != nullptr) {
        float v[2][BLOCK];
        load_column_blocks(shared.tile, threadIdx.x / (WIDTH / 2), threadIdx.x % (WIDTH / 2) * 2, v);
        signed_transform<T>(job.column_signs, NORM, v[0]);
        signed_transform<T>(job.column_signs, NORM, v[1]);
        atomicMax(&shared.of_columns, larger(block_magnitude(v[0]), block_magnitude(v[1])));
    }
    __syncthreads();
    if (threadIdx.x > 0) return;
    if (job.row_amax != nullptr) atomicMax(job.row_amax, shared.of_rows);
    if (job.column_amax != nullptr) atomicMax(job.column_amax, shared.of_columns);
}

}  // namespace

// Arguments as of csrc/cpu/amax.cpp, with a stream; the amaxes have to be 0 before. Returns an error code of CUDA.
extern "C" int32_t amax(const void* x, int32_t type, int64_t rows, int64_t columns, const float* row_signs, const float* column_signs,
                        float* row_amax, float* column_amax, void* stream) {
    return with_type(type, [&](auto number) {
        using T = decltype(number);
        // Floats of one sign order as their bits do.
        const Job<T> job{matrix_of<T>(x, rows, columns), row_signs, column_signs, reinterpret_cast<int32_t*>(row_amax),
                         reinterpret_cast<int32_t*>(column_amax)};
        return launch(find<T>, blocks_of(rows, HEIGHT) * blocks_of(columns, WIDTH), THREADS, sizeof(Shared<T>), stream, job);
    });
}
