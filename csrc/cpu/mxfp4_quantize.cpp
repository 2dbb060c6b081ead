// MXFP4 from float32 or bfloat16: codes and scales of the rows, of the columns, or of both from one read.
//
// A unit is a tile of 128 rows, so that the codes of a column fill a cache line; it is treated in panels of 32 rows, one block high.

#include "mxfp4.h"

#include <new>

#include "e2m1.h"

namespace {

constexpr int BLOCK = mxfp4::BLOCK, BLOCKS = WIDTH / BLOCK, PANELS = e2m1::ColumnCodes::ROWS / BLOCK, STRIPS = BLOCK / HEIGHT;

struct Output {
    uint8_t *codes, *scales;  // null if not wanted
    const float* signs;
};

struct Job {
    Matrix x;
    bool square, stochastic;
    e2m1::Origin row_origin, column_origin;  // of the first row and of the first column
    Output rows, columns;
};

struct Panel {
    Strip strips[STRIPS];
};

// The columns of a tile while it is treated.
struct Columns {
    e2m1::ColumnCodes codes;
    uint8_t scales[PANELS][WIDTH];
};

int64_t blocks_of(int64_t values) { return (values + BLOCK - 1) / BLOCK; }

int64_t tiles_across(const Job& job) { return (job.x.columns + WIDTH - 1) / WIDTH; }

e2m1::Origin moved(const e2m1::Origin& origin, int64_t rows, int64_t values) {
    return {origin.seed, origin.stream, origin.row + rows, origin.place + values / e2m1::PLACE};
}

template <typename Float>
INLINE void load_panel(const Matrix& x, int64_t row, int64_t column, Panel& panel) {
    for (int s = 0; s < STRIPS; ++s) load_strip<Float>(x, row + s * HEIGHT, column, panel.strips[s]);
}

// Scale codes and encoding factors of `count` blocks.
template <typename Float>
INLINE void scales_of(const int32_t* magnitudes, int count, uint8_t* scales, float* factors) {
    for (int i = 0; i < count; i += LENGTH<Float>) {
        const IntOf<Float> scale = mxfp4::block_scale(load<Float>(magnitudes + i));
        store(factors + i, mxfp4::encoding_factor<Float>(scale));
        store_narrow(scales + i, scale);
    }
}

// Of the squares of a panel, as of its rows.
template <typename Float>
INLINE void repeat_squares(const Panel& panel, int32_t* magnitudes) {
    int32_t squares[BLOCKS];
    square_magnitudes<BLOCK, Float>(panel.strips, squares);
    for (int i = 0; i < BLOCK * BLOCKS; ++i) magnitudes[i] = squares[i % BLOCKS];
}

template <typename Float>
INLINE void quantize_rows(const Job& job, const Panel& panel, int64_t row, int64_t column) {
    constexpr int COUNT = BLOCK * BLOCKS;
    alignas(64) int32_t magnitudes[COUNT];
    alignas(64) float factors[COUNT];
    uint8_t scales[COUNT];
    if (job.square) {
        repeat_squares<Float>(panel, magnitudes);
    } else {
        for (int s = 0; s < STRIPS; ++s) block_magnitudes<BLOCK, Float>(panel.strips[s], magnitudes + s * HEIGHT * BLOCKS);
    }
    scales_of<Float>(magnitudes, COUNT, scales, factors);
    const e2m1::Rounding rounding = e2m1::rounding_of<Float>(job.stochastic, magnitudes, factors, COUNT);
    const int64_t across = blocks_of(job.x.columns), first = column / BLOCK, blocks = std::min<int64_t>(BLOCKS, across - first);
    for (int64_t r = 0; r < std::min<int64_t>(BLOCK, job.x.rows - row); ++r) {
        uint8_t line[WIDTH / 2], *to = job.rows.codes + ((row + r) * across + first) * BLOCK / 2;
        e2m1::encode_row<BLOCK, Float>(rounding, panel.strips[r / HEIGHT].values[r % HEIGHT], factors + r * BLOCKS,
                                       moved(job.row_origin, row + r, column), nullptr, blocks == BLOCKS ? to : line);
        if (blocks < BLOCKS) std::memcpy(to, line, blocks * BLOCK / 2);
        if (!job.square) std::memcpy(job.rows.scales + (row + r) * across + first, scales + r * BLOCKS, blocks);
    }
    if (job.square) std::memcpy(job.rows.scales + row / BLOCK * across + first, scales, blocks);
}

template <typename Float>
INLINE void quantize_columns(const Job& job, const Panel& panel, int64_t row, int64_t column, Columns& tile, int p) {
    alignas(64) int32_t magnitudes[WIDTH];
    alignas(64) float factors[WIDTH];
    if (job.square) {
        int32_t squares[BLOCKS];
        square_magnitudes<BLOCK, Float>(panel.strips, squares);
        for (int c = 0; c < WIDTH; ++c) magnitudes[c] = squares[c / BLOCK];
    } else {
        for (int c = 0; c < WIDTH; c += LENGTH<Float>) {
            IntOf<Float> largest{};
            for (int s = 0; s < STRIPS; ++s) largest = larger(largest, column_magnitudes<Float>(panel.strips[s], c));
            store(magnitudes + c, largest);
        }
    }
    scales_of<Float>(magnitudes, WIDTH, tile.scales[p], factors);
    const e2m1::Rounding rounding = e2m1::rounding_of<Float>(job.stochastic, magnitudes, factors, WIDTH);
    for (int s = 0; s < STRIPS; ++s) {
        e2m1::encode_columns<Float>(rounding, panel.strips[s], factors, moved(job.column_origin, column, row + s * HEIGHT),
                                    tile.codes.words + 2 * (p * STRIPS + s));
    }
}

INLINE void store_columns(const Job& job, const Columns& tile, int64_t row, int64_t column) {
    const int64_t across = blocks_of(job.x.rows), first = row / BLOCK, panels = std::min<int64_t>(PANELS, across - first);
    const int64_t width = std::min<int64_t>(WIDTH, job.x.columns - column), step = job.square ? BLOCK : 1;
    e2m1::store_columns(tile.codes, panels * BLOCK / 8, width, job.columns.codes + (column * across + first) * BLOCK / 2,
                        across * BLOCK / 2);
    for (int64_t c = 0; c < width; c += step) {
        for (int64_t p = 0; p < panels; ++p) job.columns.scales[(column + c) / step * across + first + p] = tile.scales[p][c];
    }
}

template <int LANES>
INLINE void quantize_unit(const Job& job, int64_t unit) {
    using Float = typename Vector<LANES>::Float;
    const int64_t first = unit / tiles_across(job) * PANELS * BLOCK, column = unit % tiles_across(job) * WIDTH;
    Columns tile;
    Panel panel, changed;
    for (int p = 0; p < PANELS && first + p * BLOCK < job.x.rows; ++p) {
        const int64_t row = first + p * BLOCK;
        load_panel<Float>(job.x, row, column, panel);
        if (job.rows.codes != nullptr) {
            for (int s = 0; job.rows.signs != nullptr && s < STRIPS; ++s) {
                transform_rows<BLOCK, Float>(job.x.type, job.rows.signs, panel.strips[s], changed.strips[s]);
            }
            quantize_rows<Float>(job, job.rows.signs != nullptr ? changed : panel, row, column);
        }
        if (job.columns.codes != nullptr) {
            if (job.columns.signs != nullptr) transform_columns<BLOCK, Float>(job.x.type, job.columns.signs, panel.strips, changed.strips);
            quantize_columns<Float>(job, job.columns.signs != nullptr ? changed : panel, row, column, tile, p);
        }
    }
    if (job.columns.codes != nullptr) store_columns(job, tile, first, column);
}

VARIANTS(quantize_unit, Job)

}  // namespace

// x [rows, columns] contiguous; type: 0 float32, 1 bfloat16. Of the rows and of the columns, either may be null:
//   codes [rows, 16 blocks] and scales [rows, blocks], where blocks = ceil(columns / 32); for columns the same of x transposed
//   square: blocks of 32 x 32, scales [ceil(rows / 32), ceil(columns / 32)]
//   signs [32] or null: for the Hadamard transform before the quantization
// stochastic rounding takes its bits from `seed`, the streams and the place in the whole matrix, of which x begins at first_row,
// first_column: random bits of rows count row_stream, those of columns column_stream.
// instructions: "avx512", "avx2", "portable", or "" for the first of these that the CPU has. Returns a code of variants.h.
extern "C" int32_t mxfp4_quantize(const void* x, int32_t type, int64_t rows, int64_t columns, int32_t square, int32_t stochastic,
                                  int64_t seed, int64_t first_row, int64_t first_column, int64_t row_stream, int64_t column_stream,
                                  uint8_t* row_codes, uint8_t* row_scales, const float* row_signs,
                                  uint8_t* column_codes, uint8_t* column_scales, const float* column_signs,
                                  int64_t threads, const char* instructions) try {
    const uint64_t key = static_cast<uint64_t>(seed);
    const Job job{{x, static_cast<Type>(type), rows, columns}, square != 0, stochastic != 0,
                  {key, static_cast<uint32_t>(row_stream), first_row, first_column / e2m1::PLACE},
                  {key, static_cast<uint32_t>(column_stream), first_column, first_row / e2m1::PLACE},
                  {row_codes, row_scales, row_signs}, {column_codes, column_scales, column_signs}};
    const int64_t height = e2m1::ColumnCodes::ROWS;
    return run_variant(quantize_unit_variants(), instructions, job, (rows + height - 1) / height * tiles_across(job), threads);
} catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
}
