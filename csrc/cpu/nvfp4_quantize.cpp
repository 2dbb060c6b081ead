// NVFP4 from float32 or bfloat16: codes and scales of the rows, of the columns, or of both from one read.
//
// A unit is a tile of 128 rows, so that the codes of a column fill a cache line; it is treated in strips of 16 rows, one block high.
// Along rows a vector is a part of a block, across rows it holds values of neighbouring columns.

#include "nvfp4.h"

#include <new>

#include "e2m1.h"

namespace {

constexpr int STRIPS = 8, BLOCKS = WIDTH / nvfp4::BLOCK;

struct Output {
    uint8_t *codes, *scales;  // null if not wanted
    const float *amax, *signs;
};

struct Job {
    Matrix x;
    bool square, stochastic;
    uint64_t seed;
    int64_t first_row, first_column;  // of x in the whole matrix
    Output rows, columns;
};

int64_t blocks_of(int64_t values) { return (values + nvfp4::BLOCK - 1) / nvfp4::BLOCK; }

int64_t tiles_across(const Job& job) { return (job.x.columns + WIDTH - 1) / WIDTH; }

e2m1::Origin row_origin(const Job& job, int64_t row, int64_t column) {
    return {job.seed, e2m1::ROW_STREAM, job.first_row + row, (job.first_column + column) / nvfp4::BLOCK};
}

// Scale codes and encoding factors of `count` blocks.
template <typename Float>
INLINE void scales_of(const int32_t* magnitudes, int count, float tensor_scale, uint8_t* scales, float* factors) {
    for (int i = 0; i < count; i += LENGTH<Float>) {
        const IntOf<Float> scale = nvfp4::block_scale(load<Float>(magnitudes + i), tensor_scale);
        store(factors + i, nvfp4::encoding_factor<Float>(scale, tensor_scale));
        store_narrow(scales + i, scale);
    }
}

template <typename Float>
INLINE void quantize_rows(const Job& job, const Strip& strip, int64_t row, int64_t column) {
    alignas(64) int32_t magnitudes[HEIGHT * BLOCKS];
    alignas(64) float factors[HEIGHT * BLOCKS];
    uint8_t scales[HEIGHT * BLOCKS];
    block_magnitudes<nvfp4::BLOCK, Float>(strip, magnitudes);
    scales_of<Float>(magnitudes, HEIGHT * BLOCKS, nvfp4::tensor_scale(*job.rows.amax), scales, factors);
    const e2m1::Rounding rounding = e2m1::rounding_of<Float>(job.stochastic, magnitudes, factors, HEIGHT * BLOCKS);
    const int64_t across = blocks_of(job.x.columns), first = column / nvfp4::BLOCK, blocks = std::min<int64_t>(BLOCKS, across - first);
    for (int64_t r = 0; r < std::min<int64_t>(HEIGHT, job.x.rows - row); ++r) {
        const int64_t at = (row + r) * across + first;
        uint8_t line[WIDTH / 2], *to = job.rows.codes + at * nvfp4::BLOCK / 2;
        e2m1::encode_row<nvfp4::BLOCK, Float>(rounding, strip.values[r], factors + r * BLOCKS, row_origin(job, row + r, column), nullptr,
                                              blocks == BLOCKS ? to : line);
        if (blocks < BLOCKS) std::memcpy(to, line, blocks * nvfp4::BLOCK / 2);
        std::memcpy(job.rows.scales + at, scales + r * BLOCKS, blocks == BLOCKS ? BLOCKS : blocks);
    }
}

// The columns of a tile while it is treated.
struct Columns {
    e2m1::ColumnCodes codes;
    uint8_t scales[STRIPS][WIDTH];
};

template <typename Float>
INLINE void quantize_columns(const Job& job, const Strip& strip, int64_t row, int64_t column, Columns& tile, int s) {
    alignas(64) int32_t magnitudes[WIDTH];
    alignas(64) float factors[WIDTH];
    for (int c = 0; c < WIDTH; c += LENGTH<Float>) store(magnitudes + c, column_magnitudes<Float>(strip, c));
    scales_of<Float>(magnitudes, WIDTH, nvfp4::tensor_scale(*job.columns.amax), tile.scales[s], factors);
    const e2m1::Rounding rounding = e2m1::rounding_of<Float>(job.stochastic, magnitudes, factors, WIDTH);
    const e2m1::Origin origin{job.seed, e2m1::COLUMN_STREAM, job.first_column + column, (job.first_row + row) / nvfp4::BLOCK};
    e2m1::encode_columns<Float>(rounding, strip, factors, origin, tile.codes.words + 2 * s);
}

// Blocks of 16 x 16: rows and columns share the codes.
template <typename Float>
INLINE void quantize_squares(const Job& job, const Strip& strip, int64_t row, int64_t column, Columns& tile, int s) {
    using Unsigned = typename Lanes<Float>::Unsigned;
    constexpr int PADDED = std::max(BLOCKS, LENGTH<Float>);
    alignas(64) int32_t magnitudes[PADDED] = {}, codes[HEIGHT][WIDTH];
    alignas(64) float factors[PADDED];
    uint8_t scales[PADDED];
    square_magnitudes<nvfp4::BLOCK, Float>(&strip, magnitudes);
    scales_of<Float>(magnitudes, PADDED, nvfp4::tensor_scale(*job.rows.amax), scales, factors);
    const e2m1::Rounding rounding = e2m1::rounding_of<Float>(job.stochastic, magnitudes, factors, PADDED);
    const int64_t across = blocks_of(job.x.columns), first = column / nvfp4::BLOCK, blocks = std::min<int64_t>(BLOCKS, across - first);
    for (int r = 0; r < HEIGHT; ++r) {
        uint8_t line[WIDTH / 2];
        e2m1::encode_row<nvfp4::BLOCK, Float>(rounding, strip.values[r], factors, row_origin(job, row + r, column), codes[r], line);
        if (job.rows.codes == nullptr || row + r >= job.x.rows) continue;
        std::memcpy(job.rows.codes + ((row + r) * across + first) * nvfp4::BLOCK / 2, line, blocks * nvfp4::BLOCK / 2);
    }
    if (job.rows.codes != nullptr) std::memcpy(job.rows.scales + row / nvfp4::BLOCK * across + first, scales, blocks);
    if (job.columns.codes == nullptr) return;
    for (int c = 0; c < WIDTH; c += LENGTH<Float>) {
        for (int half = 0; half < 2; ++half) {
            Unsigned bits{};
            for (int r = 0; r < 8; ++r) bits |= load<Unsigned>(codes[half * 8 + r] + c) >> (28 - 4 * r);
            store(tile.codes.words[2 * s + half] + c, bits);
        }
    }
    for (int c = 0; c < WIDTH; ++c) tile.scales[s][c] = scales[c / nvfp4::BLOCK];
}

INLINE void store_columns(const Job& job, const Columns& tile, int64_t row, int64_t column) {
    const int64_t across = blocks_of(job.x.rows), first = row / nvfp4::BLOCK;
    const int64_t strips = std::min<int64_t>(STRIPS, across - first), width = std::min<int64_t>(WIDTH, job.x.columns - column);
    e2m1::store_columns(tile.codes, 2 * strips, width, job.columns.codes + (column * across + first) * 8, across * 8);
    const int64_t step = job.square ? nvfp4::BLOCK : 1;
    for (int64_t c = 0; c < width; c += step) {
        for (int64_t s = 0; s < strips; ++s) job.columns.scales[(column + c) / step * across + first + s] = tile.scales[s][c];
    }
}

template <typename Float>
INLINE void quantize_tile(const Job& job, int64_t unit) {
    const int64_t first = unit / tiles_across(job) * STRIPS * HEIGHT, column = unit % tiles_across(job) * WIDTH;
    const Type type = job.x.type;
    Columns tile;
    Strip strip, changed;
    for (int s = 0; s < STRIPS && first + s * HEIGHT < job.x.rows; ++s) {
        const int64_t row = first + s * HEIGHT;
        load_strip<Float>(job.x, row, column, strip);
        if (job.square) {
            quantize_squares<Float>(job, strip, row, column, tile, s);
            continue;
        }
        if (job.rows.codes != nullptr) {
            if (job.rows.signs != nullptr) transform_rows<nvfp4::BLOCK, Float>(type, job.rows.signs, strip, changed);
            quantize_rows<Float>(job, job.rows.signs != nullptr ? changed : strip, row, column);
        }
        if (job.columns.codes != nullptr) {
            if (job.columns.signs != nullptr) transform_columns<nvfp4::BLOCK, Float>(type, job.columns.signs, &strip, &changed);
            quantize_columns<Float>(job, job.columns.signs != nullptr ? changed : strip, row, column, tile, s);
        }
    }
    if (job.columns.codes != nullptr) store_columns(job, tile, first, column);
}

template <int LANES>
INLINE void quantize_unit(const Job& job, int64_t unit) {
    quantize_tile<typename Vector<LANES>::Float>(job, unit);
}

VARIANTS(quantize_unit, Job)

}  // namespace

// x [rows, columns] contiguous; type: 0 float32, 1 bfloat16. Of the rows and of the columns, either may be null:
//   codes [rows, 8 blocks] and scales [rows, blocks], where blocks = ceil(columns / 16); for columns the same of x transposed
//   square: blocks of 16 x 16, scales [ceil(rows / 16), ceil(columns / 16)]; rows_amax serves both, signs are null
//   signs [16] or null: for the Hadamard transform before the quantization
// stochastic rounding takes its bits from `seed` and the place in the whole matrix, of which x begins at first_row, first_column.
// instructions: "avx512", "avx2", "portable", or "" for the first of these that the CPU has. Returns a code of variants.h.
extern "C" int32_t nvfp4_quantize(const void* x, int32_t type, int64_t rows, int64_t columns, int32_t square, int32_t stochastic,
                                  int64_t seed, int64_t first_row, int64_t first_column,
                                  uint8_t* row_codes, uint8_t* row_scales, const float* row_amax, const float* row_signs,
                                  uint8_t* column_codes, uint8_t* column_scales, const float* column_amax, const float* column_signs,
                                  int64_t threads, const char* instructions) try {
    const Job job{{x, static_cast<Type>(type), rows, columns}, square != 0, stochastic != 0, static_cast<uint64_t>(seed),
                  first_row, first_column, {row_codes, row_scales, row_amax, row_signs},
                  {column_codes, column_scales, column_amax, column_signs}};
    const int64_t units = (rows + STRIPS * HEIGHT - 1) / (STRIPS * HEIGHT) * tiles_across(job);
    return run_variant(quantize_unit_variants(), instructions, job, units, threads);
} catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
}
