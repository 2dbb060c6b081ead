// MXFP4 from float32 or bfloat16: codes and scales of the rows, of the columns, or of both from one read.
//
// A block of threads takes a tile of 128 x 64. Each thread treats one block of 32 values along rows, then one of a column; codes of columns
// are gathered in shared memory, so that whole sectors are written.

#include "block.h"
#include "e2m1.h"
#include "mxfp4.h"

namespace {

constexpr int BLOCK = mxfp4::BLOCK, THREADS = 256, HEIGHT = 128, WIDTH = 64, PANELS = HEIGHT / BLOCK, BLOCKS = WIDTH / BLOCK;
constexpr float NORM = 0.17677669529663687f;  // 1 / sqrt(32)
static_assert(HEIGHT * BLOCKS == THREADS && PANELS * WIDTH == THREADS, "a block along rows and one of a column for every thread");

struct Output {
    uint8_t *codes, *scales;  // null if not wanted
    const float* signs;
    uint32_t stream;
    int64_t across;  // blocks of a row, or of a column
};

template <typename T>
using Job = e2m1::Job<T, Output>;

template <typename T>
struct Shared {
    Tile<T, HEIGHT, WIDTH> tile;
    uint4 codes[WIDTH][PANELS + 1];  // of columns
    uint8_t scales[WIDTH][PANELS];
    int32_t magnitudes[PANELS][BLOCKS];  // of squares
};

template <bool STOCHASTIC>
DEVICE uint4 encode(const float* v, int32_t scale, uint64_t seed, uint32_t stream, int64_t row, int64_t place) {
    const float factor = mxfp4::encoding_factor<float>(scale);
    const uint2 lower = e2m1::encode<STOCHASTIC>(v, factor, seed, stream, row, place);
    const uint2 upper = e2m1::encode<STOCHASTIC>(v + e2m1::PLACE, factor, seed, stream, row, place + 1);
    return {lower.x, lower.y, upper.x, upper.y};
}

template <typename T>
DEVICE void find_squares(Shared<T>& shared) {
    if (threadIdx.x < PANELS * BLOCKS) shared.magnitudes[threadIdx.x / BLOCKS][threadIdx.x % BLOCKS] = 0;
    __syncthreads();
    float v[BLOCK];
    load_row<BLOCK>(shared.tile, threadIdx.x / BLOCKS, threadIdx.x % BLOCKS * BLOCK, v);
    atomicMax(&shared.magnitudes[threadIdx.x / BLOCKS / BLOCK][threadIdx.x % BLOCKS], block_magnitude(v));
    __syncthreads();
}

template <bool STOCHASTIC, typename T>
DEVICE void quantize_rows(const Job<T>& job, const Place& place, Shared<T>& shared) {
    const int r = threadIdx.x / BLOCKS, b = threadIdx.x % BLOCKS;
    const int64_t row = place.row + r, column = place.column + b * BLOCK, at = row * job.rows.across + column / BLOCK;
    if (row >= job.x.rows || column >= job.x.columns) return;
    float v[BLOCK];
    load_row<BLOCK>(shared.tile, r, b * BLOCK, v);
    signed_transform<T>(job.rows.signs, NORM, v);
    const int32_t magnitude = job.square ? shared.magnitudes[r / BLOCK][b] : block_magnitude(v);
    const int32_t scale = mxfp4::block_scale(float_of<float>(magnitude));
    reinterpret_cast<uint4*>(job.rows.codes)[at] = encode<STOCHASTIC>(v, scale, job.seed, job.rows.stream, job.first_row + row,
                                                                      (job.first_column + column) / e2m1::PLACE);
    if (!job.square) job.rows.scales[at] = static_cast<uint8_t>(scale);
    if (job.square && r % BLOCK == 0) job.rows.scales[row / BLOCK * job.rows.across + column / BLOCK] = static_cast<uint8_t>(scale);
}

template <bool STOCHASTIC, typename T>
DEVICE void quantize_columns(const Job<T>& job, const Place& place, Shared<T>& shared) {
    const int p = threadIdx.x / WIDTH, c = threadIdx.x % WIDTH;
    float v[BLOCK];
    UNROLL
    for (int i = 0; i < BLOCK; ++i) v[i] = value_of(shared.tile.values[p * BLOCK + i][c]);
    signed_transform<T>(job.columns.signs, NORM, v);
    const int32_t magnitude = job.square ? shared.magnitudes[p][c / BLOCK] : block_magnitude(v);
    const int32_t scale = mxfp4::block_scale(float_of<float>(magnitude));
    shared.codes[c][p] = encode<STOCHASTIC>(v, scale, job.seed, job.columns.stream, job.first_column + place.column + c,
                                            (job.first_row + place.row + p * BLOCK) / e2m1::PLACE);
    shared.scales[c][p] = static_cast<uint8_t>(scale);
}

template <typename T>
DEVICE void store_columns(const Job<T>& job, const Place& place, const Shared<T>& shared) {
    const int c = threadIdx.x / PANELS, p = threadIdx.x % PANELS, step = job.square ? BLOCK : 1;
    const int64_t column = place.column + c, at = place.row / BLOCK + p;
    if (column >= job.x.columns || at >= job.columns.across) return;
    reinterpret_cast<uint4*>(job.columns.codes)[column * job.columns.across + at] = shared.codes[c][p];
    if (c % step == 0) job.columns.scales[column / step * job.columns.across + at] = shared.scales[c][p];
}

// Two blocks of threads a multiprocessor: left to itself, the compiler takes fewer registers than it needs.
template <typename T, bool STOCHASTIC>
__global__ void __launch_bounds__(THREADS, 2) quantize(const Job<T> job) {
    Shared<T>& shared = shared_as<Shared<T>>();
    const int64_t tiles = (job.x.columns + WIDTH - 1) / WIDTH;
    const Place place{blockIdx.x / tiles * HEIGHT, blockIdx.x % tiles * WIDTH};
    load_tile<THREADS>(job.x, place.row, place.column, shared.tile);
    __syncthreads();
    if (job.square) find_squares(shared);
    if (job.rows.codes != nullptr) quantize_rows<STOCHASTIC>(job, place, shared);
    if (job.columns.codes == nullptr) return;
    quantize_columns<STOCHASTIC>(job, place, shared);
    __syncthreads();
    store_columns(job, place, shared);
}

}  // namespace

// Arguments as of csrc/cpu/mxfp4_quantize.cpp, with a stream. Returns an error code of CUDA.
extern "C" int32_t mxfp4_quantize(const void* x, int32_t type, int64_t rows, int64_t columns, int32_t square, int32_t stochastic,
                                  int64_t seed, int64_t first_row, int64_t first_column, int64_t row_stream, int64_t column_stream,
                                  uint8_t* row_codes, uint8_t* row_scales, const float* row_signs,
                                  uint8_t* column_codes, uint8_t* column_scales, const float* column_signs, void* stream) {
    return with_type(type, [&](auto number) {
        using T = decltype(number);
        const Job<T> job{matrix_of<T>(x, rows, columns), square != 0, static_cast<uint64_t>(seed), first_row, first_column,
                         {row_codes, row_scales, row_signs, static_cast<uint32_t>(row_stream), blocks_of(columns, BLOCK)},
                         {column_codes, column_scales, column_signs, static_cast<uint32_t>(column_stream), blocks_of(rows, BLOCK)}};
        const int64_t tiles = blocks_of(rows, HEIGHT) * blocks_of(columns, WIDTH);
        return launch(stochastic ? quantize<T, true> : quantize<T, false>, tiles, THREADS, sizeof(Shared<T>), stream, job);
    });
}
