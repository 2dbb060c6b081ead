// FP8 from float32 or bfloat16: codes and scales of the rows, of the columns, or of both from one read; and back.
//
// A block of threads takes a tile of 128 x 128, which holds whole blocks of every scaling but those of tensors and rows, whose amaxes are
// given. "Lines" are rows for the output of rows and columns for that of columns; a line of a tile has four parts of 32 values. Along rows
// a warp treats a row, across them a thread treats a part of two neighbouring columns.

#include "block.h"
#include "fp8.h"
#include "tile.h"

namespace {

using fp8::Output;

constexpr int THREADS = 256, WARP = 32, WARPS = THREADS / WARP, SIDE = 128, PART = 32, PARTS = SIDE / PART;
constexpr int PER = SIDE / WARP;  // values of a row that a thread has
constexpr unsigned EVERYONE = 0xffffffff;

template <typename T>
struct Job {
    Matrix<T> x;
    bool e5m2, power_of_two, mx;
    Output rows, columns;
};

template <typename T>
struct Shared {
    Tile<T, SIDE, SIDE> tile;
    int32_t magnitudes[PARTS][SIDE];  // of lines by part
    float factors[PARTS][SIDE];       // those of blocks of 128 in part 0
    uint32_t words[SIDE][SIDE / 4 + 1];  // four codes each, of columns
    int32_t square;                      // largest magnitude
};

template <typename T>
DEVICE void find_rows(Shared<T>& shared) {
    const int lane = threadIdx.x % WARP;
    for (int r = threadIdx.x / WARP; r < SIDE; r += WARPS) {
        float v[PER];
        load_floats<PER>(&shared.tile.values[r][lane * PER], v);
        int32_t largest = larger(larger(magnitude_of(v[0]), magnitude_of(v[1])), larger(magnitude_of(v[2]), magnitude_of(v[3])));
        UNROLL
        for (int distance = 1; distance < PART / PER; distance *= 2) {
            largest = larger(largest, __shfl_xor_sync(EVERYONE, largest, distance));
        }
        if (lane % (PART / PER) == 0) shared.magnitudes[lane * PER / PART][r] = largest;
    }
}

template <typename T>
DEVICE void find_columns(Shared<T>& shared) {
    const int c = threadIdx.x % (SIDE / 2) * 2, p = threadIdx.x / (SIDE / 2);
    int32_t largest[2] = {0, 0};
    UNROLL
    for (int i = 0; i < PART; ++i) {
        float pair[2];
        load_floats<2>(&shared.tile.values[p * PART + i][c], pair);
        largest[0] = larger(largest[0], magnitude_of(pair[0]));
        largest[1] = larger(largest[1], magnitude_of(pair[1]));
    }
    shared.magnitudes[p][c] = largest[0];
    shared.magnitudes[p][c + 1] = largest[1];
}

template <typename T>
DEVICE int32_t line_magnitude(const Shared<T>& shared, int line) {
    const int32_t halves[2] = {larger(shared.magnitudes[0][line], shared.magnitudes[1][line]),
                               larger(shared.magnitudes[2][line], shared.magnitudes[3][line])};
    return larger(halves[0], halves[1]);
}

// Scales and encoding factors of the lines of a tile, the first of which is `first`, from value `along` on.
template <typename T>
DEVICE void make_factors(const Job<T>& job, const Output& output, int64_t first, int64_t along, Shared<T>& shared) {
    const float largest = job.e5m2 ? 57344.0f : 448.0f;
    if (output.given == nullptr && output.height > 1) {
        if (threadIdx.x == 0) shared.square = 0;
        __syncthreads();
        if (threadIdx.x < SIDE) atomicMax(&shared.square, line_magnitude(shared, threadIdx.x));
        __syncthreads();
    }
    for (int item = threadIdx.x; item < (output.width == PART ? PARTS : 1) * SIDE; item += THREADS) {
        const int p = item / SIDE, i = item % SIDE;
        const int64_t line = first + i, block = along / output.width + p, at = line / output.height * output.across + block;
        const bool present = line < output.lines && block < output.across;
        int32_t magnitude = output.width == PART ? shared.magnitudes[p][i] : output.height == 1 ? line_magnitude(shared, i) : shared.square;
        if (output.given != nullptr) magnitude = present ? bits_of(output.given[at]) : 0;
        const float amax = float_of<float>(magnitude);
        const int32_t code = fp8::block_scale(amax, largest);
        const float factor = job.mx ? fp8::block_encoding_factor<float>(code) : fp8::encoding_factor(amax, largest, job.power_of_two);
        shared.factors[p][i] = factor;
        if (!present || line % output.height || along % output.width) continue;
        if (job.mx) {
            static_cast<uint8_t*>(output.scales)[at] = static_cast<uint8_t>(code);
        } else {
            static_cast<float*>(output.scales)[at] = fp8::decoding_scale(amax, factor);
        }
        if (output.given == nullptr) output.amax[at] = amax;
    }
}

// Four codes, or as many as there are, to `to`.
DEVICE void store_codes(uint8_t* to, uint32_t word, int64_t count, bool aligned) {
    if (aligned && count >= 4) {
        *reinterpret_cast<uint32_t*>(to) = word;
        return;
    }
    for (int k = 0; k < 4 && k < count; ++k) to[k] = static_cast<uint8_t>(word >> (8 * k));
}

template <typename Format, typename T>
DEVICE void encode_rows(const Job<T>& job, const Place& place, const Shared<T>& shared) {
    const int lane = threadIdx.x % WARP, part = job.rows.width == PART ? lane * PER / PART : 0;
    const bool aligned = job.x.columns % 4 == 0;
    for (int r = threadIdx.x / WARP; r < SIDE && place.row + r < job.x.rows; r += WARPS) {
        float v[PER];
        load_floats<PER>(&shared.tile.values[r][lane * PER], v);
        uint32_t word = 0;
        UNROLL
        for (int k = 0; k < PER; ++k) word |= static_cast<uint32_t>(Format::encode(v[k] * shared.factors[part][r])) << (8 * k);
        const int64_t column = place.column + lane * PER;
        store_codes(job.rows.codes + (place.row + r) * job.x.columns + column, word, job.x.columns - column, aligned);
    }
}

template <typename Format, typename T>
DEVICE void encode_columns(const Job<T>& job, Shared<T>& shared) {
    const int c = threadIdx.x % (SIDE / 2) * 2, p = threadIdx.x / (SIDE / 2), part = job.columns.width == PART ? p : 0;
    const float factors[2] = {shared.factors[part][c], shared.factors[part][c + 1]};
    UNROLL
    for (int i = 0; i < PART; i += 4) {
        uint32_t words[2] = {0, 0};
        UNROLL
        for (int k = 0; k < 4; ++k) {
            float pair[2];
            load_floats<2>(&shared.tile.values[p * PART + i + k][c], pair);
            words[0] |= static_cast<uint32_t>(Format::encode(pair[0] * factors[0])) << (8 * k);
            words[1] |= static_cast<uint32_t>(Format::encode(pair[1] * factors[1])) << (8 * k);
        }
        shared.words[c][(p * PART + i) / 4] = words[0];
        shared.words[c + 1][(p * PART + i) / 4] = words[1];
    }
}

template <typename T>
DEVICE void store_columns(const Job<T>& job, const Place& place, const Shared<T>& shared) {
    const int lane = threadIdx.x % WARP;
    const int64_t row = place.row + lane * 4;
    const bool aligned = job.x.rows % 4 == 0;
    for (int c = threadIdx.x / WARP; c < SIDE && place.column + c < job.x.columns; c += WARPS) {
        store_codes(job.columns.codes + (place.column + c) * job.x.rows + row, shared.words[c][lane], job.x.rows - row, aligned);
    }
}

template <typename T, typename Format>
__global__ void __launch_bounds__(THREADS) quantize(const Job<T> job) {
    Shared<T>& shared = shared_as<Shared<T>>();
    const int64_t tiles = (job.x.columns + SIDE - 1) / SIDE;
    const Place place{blockIdx.x / tiles * SIDE, blockIdx.x % tiles * SIDE};
    load_tile<THREADS>(job.x, place.row, place.column, shared.tile);
    __syncthreads();
    if (job.rows.codes != nullptr) {
        if (job.rows.given == nullptr) find_rows(shared);
        __syncthreads();
        make_factors(job, job.rows, place.row, place.column, shared);
        __syncthreads();
        encode_rows<Format>(job, place, shared);
        __syncthreads();
    }
    if (job.columns.codes == nullptr) return;
    if (job.columns.given == nullptr) find_columns(shared);
    __syncthreads();
    make_factors(job, job.columns, place.column, place.row, shared);
    __syncthreads();
    encode_columns<Format>(job, shared);
    __syncthreads();
    store_columns(job, place, shared);
}

// Two blocks of threads a multiprocessor: left to itself, the compiler takes fewer registers than it needs.
template <typename T>
__global__ void __launch_bounds__(THREADS, 2) find(const Matrix<T> x, int32_t* of_rows, int32_t* of_columns) {
    Shared<T>& shared = shared_as<Shared<T>>();
    const int64_t tiles = (x.columns + SIDE - 1) / SIDE;
    const Place place{blockIdx.x / tiles * SIDE, blockIdx.x % tiles * SIDE};
    const int line = threadIdx.x;
    load_tile<THREADS>(x, place.row, place.column, shared.tile);
    __syncthreads();
    if (of_rows != nullptr) {
        find_rows(shared);
        __syncthreads();
        if (line < SIDE && place.row + line < x.rows) atomicMax(of_rows + place.row + line, line_magnitude(shared, line));
        __syncthreads();
    }
    if (of_columns == nullptr) return;
    find_columns(shared);
    __syncthreads();
    if (line < SIDE && place.column + line < x.columns) atomicMax(of_columns + place.column + line, line_magnitude(shared, line));
}

struct DequantizeJob {
    const uint8_t* codes;
    const void* scales;
    bool mx, e5m2;
    int64_t rows, columns, height, width;
};

// Four values a thread; blocks of fewer columns than a row are of a multiple of four.
template <typename T>
__global__ void __launch_bounds__(THREADS) dequantize(const DequantizeJob job, T* out) {
    const int64_t units = (job.columns + 4 * THREADS - 1) / (4 * THREADS), across = (job.columns + job.width - 1) / job.width;
    const int64_t row = blockIdx.x / units, column = (blockIdx.x % units * THREADS + threadIdx.x) * 4, at = row * job.columns + column;
    if (column >= job.columns) return;
    const int64_t place = row / job.height * across + column / job.width;
    const float scale = job.mx ? decode_e8m0(static_cast<const uint8_t*>(job.scales)[place]) : static_cast<const float*>(job.scales)[place];
    const bool whole = job.columns % 4 == 0;
    uint32_t word = 0;
    if (whole) {
        word = *reinterpret_cast<const uint32_t*>(job.codes + at);
    } else {
        for (int k = 0; k < 4 && column + k < job.columns; ++k) word |= static_cast<uint32_t>(job.codes[at + k]) << (8 * k);
    }
    float v[4];
    UNROLL
    for (int k = 0; k < 4; ++k) {
        const int32_t code = static_cast<int32_t>(word >> (8 * k) & 255);
        v[k] = (job.e5m2 ? decode_e5m2<float>(code) : decode_e4m3<float>(code)) * scale;
    }
    if (whole) {
        store_floats<4>(out + at, v);
        return;
    }
    UNROLL
    for (int k = 0; k < 4; ++k) {
        if (column + k < job.columns) out[at + k] = as<T>(v[k]);
    }
}

}  // namespace

// Arguments as of csrc/cpu/fp8_quantize.cpp, with a stream. Returns an error code of CUDA.
extern "C" int32_t fp8_quantize(const void* x, int32_t type, int64_t rows, int64_t columns, int32_t e5m2, int32_t power_of_two, int32_t mx,
                                uint8_t* row_codes, void* row_scales, float* row_amax, const float* row_given, int64_t row_height,
                                int64_t row_width, uint8_t* column_codes, void* column_scales, float* column_amax,
                                const float* column_given, int64_t column_height, int64_t column_width, void* stream) {
    return with_type(type, [&](auto number) {
        using T = decltype(number);
        const Job<T> job{matrix_of<T>(x, rows, columns), e5m2 != 0, power_of_two != 0, mx != 0,
                         {row_codes, row_scales, row_amax, row_given, row_height, row_width, rows, blocks_of(columns, row_width)},
                         {column_codes, column_scales, column_amax, column_given, column_height, column_width, columns,
                          blocks_of(rows, column_width)}};
        const int64_t tiles = blocks_of(rows, SIDE) * blocks_of(columns, SIDE);
        return launch(e5m2 ? quantize<T, E5M2> : quantize<T, E4M3>, tiles, THREADS, sizeof(Shared<T>), stream, job);
    });
}

extern "C" int32_t fp8_amax(const void* x, int32_t type, int64_t rows, int64_t columns, float* of_rows, float* of_columns, void* stream) {
    return with_type(type, [&](auto number) {
        using T = decltype(number);
        // Floats of one sign order as their bits do.
        return launch(find<T>, blocks_of(rows, SIDE) * blocks_of(columns, SIDE), THREADS, sizeof(Shared<T>), stream,
                      matrix_of<T>(x, rows, columns), reinterpret_cast<int32_t*>(of_rows), reinterpret_cast<int32_t*>(of_columns));
    });
}

extern "C" int32_t fp8_dequantize(const uint8_t* codes, const void* scales, int32_t mx, int64_t rows, int64_t columns, int64_t height,
                                  int64_t width, int32_t e5m2, int32_t type, void* out, void* stream) {
    return with_type(type, [&](auto number) {
        using T = decltype(number);
        const DequantizeJob job{codes, scales, mx != 0, e5m2 != 0, rows, columns, height, width};
        return launch(dequantize<T>, rows * blocks_of(columns, 4 * THREADS), THREADS, 0, stream, job, static_cast<T*>(out));
    });
}
