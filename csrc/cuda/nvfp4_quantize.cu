// NVFP4 from float32 or bfloat16: codes and scales of the rows, of the columns, or of both from one read.
//
// A block of threads takes a tile of 128 x 64. Each thread treats two blocks of 16 values along rows, then the blocks of two neighbouring
// columns; codes of columns are gathered in shared memory, so that whole sectors are written.

#include "e2m1.h"
#include "nvfp4_tile.h"

namespace {

using namespace nvfp4;

constexpr uint32_t ROW_STREAM = 0, COLUMN_STREAM = 1;

struct Output {
    uint8_t *codes, *scales;  // null if not wanted
    const float *amax, *signs;
    int64_t across;  // blocks of a row, or of a column
};

template <typename T>
using Job = e2m1::Job<T, Output>;

template <typename T>
struct Shared {
    Tile<T, HEIGHT, WIDTH> tile;
    uint2 codes[WIDTH][STRIPS + 1];  // of columns
    uint8_t scales[WIDTH][STRIPS];
    uint8_t squares[HEIGHT][WIDTH / 2 + 4];  // codes of rows, where columns share them
    int32_t magnitudes[STRIPS][BLOCKS];      // of squares
};

template <typename T>
DEVICE void find_squares(Shared<T>& shared) {
    if (threadIdx.x < STRIPS * BLOCKS) shared.magnitudes[threadIdx.x / BLOCKS][threadIdx.x % BLOCKS] = 0;
    __syncthreads();
    for (int item = threadIdx.x; item < HEIGHT * BLOCKS; item += THREADS) {
        float v[BLOCK];
        load_row<BLOCK>(shared.tile, item / BLOCKS, item % BLOCKS * BLOCK, v);
        atomicMax(&shared.magnitudes[item / BLOCKS / BLOCK][item % BLOCKS], block_magnitude(v));
    }
    __syncthreads();
}

template <bool STOCHASTIC, typename T>
DEVICE void quantize_rows(const Job<T>& job, const Place& place, Shared<T>& shared) {
    const float scale_of_tensor = tensor_scale(*job.rows.amax);
    const int64_t first = place.column / BLOCK;
#pragma unroll 1
    for (int item = threadIdx.x; item < HEIGHT * BLOCKS; item += THREADS) {
        const int r = item / BLOCKS, b = item % BLOCKS;
        const int64_t row = place.row + r;
        float v[BLOCK];
        load_row<BLOCK>(shared.tile, r, b * BLOCK, v);
        signed_transform<T>(job.rows.signs, NORM, v);
        const int32_t magnitude = job.square ? shared.magnitudes[r / BLOCK][b] : block_magnitude(v);
        const int32_t scale = block_scale(float_of<float>(magnitude), scale_of_tensor);
        const float factor = encoding_factor<float>(scale, scale_of_tensor);
        const int64_t block = job.first_column / BLOCK + first + b;
        const uint2 codes = e2m1::encode<STOCHASTIC>(v, factor, job.seed, ROW_STREAM, job.first_row + row, block);
        if (job.square) memcpy(shared.squares[r] + b * 8, &codes, sizeof codes);
        if (row >= job.x.rows || first + b >= job.rows.across || job.rows.codes == nullptr) continue;
        reinterpret_cast<uint2*>(job.rows.codes)[row * job.rows.across + first + b] = codes;
        if (!job.square) job.rows.scales[row * job.rows.across + first + b] = static_cast<uint8_t>(scale);
        if (job.square && r % BLOCK == 0) job.rows.scales[row / BLOCK * job.rows.across + first + b] = static_cast<uint8_t>(scale);
    }
}

template <bool STOCHASTIC, typename T>
DEVICE void quantize_columns(const Job<T>& job, const Place& place, Shared<T>& shared) {
    const float scale_of_tensor = tensor_scale(*job.columns.amax);
    const int s = threadIdx.x / (WIDTH / 2), c = threadIdx.x % (WIDTH / 2) * 2;
    float v[2][BLOCK];
    load_column_blocks(shared.tile, s, c, v);
    UNROLL
    for (int k = 0; k < 2; ++k) {
        signed_transform<T>(job.columns.signs, NORM, v[k]);
        const int32_t scale = block_scale(float_of<float>(block_magnitude(v[k])), scale_of_tensor);
        const float factor = encoding_factor<float>(scale, scale_of_tensor);
        shared.codes[c + k][s] = e2m1::encode<STOCHASTIC>(v[k], factor, job.seed, COLUMN_STREAM, job.first_column + place.column + c + k,
                                                    (job.first_row + place.row) / BLOCK + s);
        shared.scales[c + k][s] = static_cast<uint8_t>(scale);
    }
}

// Columns of squares have the codes of the rows.
template <typename T>
DEVICE void turn_squares(const Job<T>& job, Shared<T>& shared) {
    const float scale_of_tensor = tensor_scale(*job.columns.amax);
    const int s = threadIdx.x / (WIDTH / 2), c = threadIdx.x % (WIDTH / 2) * 2;
    uint32_t words[2][2] = {};
    UNROLL
    for (int i = 0; i < BLOCK; ++i) {
        const uint32_t pair = shared.squares[s * BLOCK + i][c / 2];
        words[0][i / 8] |= (pair & 15) << (4 * (i % 8));
        words[1][i / 8] |= (pair >> 4) << (4 * (i % 8));
    }
    const int32_t scale = block_scale(float_of<float>(shared.magnitudes[s][c / BLOCK]), scale_of_tensor);
    UNROLL
    for (int k = 0; k < 2; ++k) {
        shared.codes[c + k][s] = {words[k][0], words[k][1]};
        shared.scales[c + k][s] = static_cast<uint8_t>(scale);
    }
}

template <typename T>
DEVICE void store_columns(const Job<T>& job, const Place& place, const Shared<T>& shared) {
    const int64_t first = place.row / BLOCK, step = job.square ? BLOCK : 1;
    for (int item = threadIdx.x; item < WIDTH * STRIPS; item += THREADS) {
        const int c = item / STRIPS, s = item % STRIPS;
        const int64_t column = place.column + c, at = first + s;
        if (column >= job.x.columns || at >= job.columns.across) continue;
        reinterpret_cast<uint2*>(job.columns.codes)[column * job.columns.across + at] = shared.codes[c][s];
        if (c % step == 0) job.columns.scales[column / step * job.columns.across + at] = shared.scales[c][s];
    }
}

// Three blocks of threads a multiprocessor: left to itself, the compiler takes fewer registers than it needs.
template <typename T, bool STOCHASTIC>
__global__ void __launch_bounds__(THREADS, 3) quantize(const Job<T> job) {
    Shared<T>& shared = shared_as<Shared<T>>();
    const int64_t tiles = (job.x.columns + WIDTH - 1) / WIDTH;
    const Place place{blockIdx.x / tiles * HEIGHT, blockIdx.x % tiles * WIDTH};
    load_tile<THREADS>(job.x, place.row, place.column, shared.tile);
    __syncthreads();
    if (job.square) find_squares(shared);
    if (job.square || job.rows.codes != nullptr) quantize_rows<STOCHASTIC>(job, place, shared);
    if (job.columns.codes == nullptr) return;
    if (job.square) {
        __syncthreads();
        turn_squares(job, shared);
    } else {
        quantize_columns<STOCHASTIC>(job, place, shared);
    }
    __syncthreads();
    store_columns(job, place, shared);
}

}  // namespace

// Arguments as of csrc/cpu/nvfp4_quantize.cpp, with a stream. Returns an error code of CUDA.
extern "C" int32_t nvfp4_quantize(const void* x, int32_t type, int64_t rows, int64_t columns, int32_t square, int32_t stochastic,
                                  int64_t seed, int64_t first_row, int64_t first_column,
                                  uint8_t* row_codes, uint8_t* row_scales, const float* row_amax, const float* row_signs,
                                  uint8_t* column_codes, uint8_t* column_scales, const float* column_amax, const float* column_signs,
                                  void* stream) {
    return with_type(type, [&](auto number) {
        using T = decltype(number);
        const Job<T> job{matrix_of<T>(x, rows, columns), square != 0, static_cast<uint64_t>(seed), first_row, first_column,
                         {row_codes, row_scales, row_amax, row_signs, blocks_of(columns, BLOCK)},
                         {column_codes, column_scales, column_amax, column_signs, blocks_of(rows, BLOCK)}};
        const int64_t tiles = blocks_of(rows, HEIGHT) * blocks_of(columns, WIDTH);
        return launch(stochastic ? quantize<T, true> : quantize<T, false>, tiles, THREADS, sizeof(Shared<T>), stream, job);
    });
}
