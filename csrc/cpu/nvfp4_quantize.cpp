// NVFP4 from float32 or bfloat16: codes and scales of the rows, of the columns, or of both from one read.
//
// A unit is a tile of 128 rows, so that the codes of a column fill a cache line; it is treated in strips of 16 rows, one block high.
// Along rows a vector is a part of a block, across rows it holds values of neighbouring columns.

#include "nvfp4.h"

#include <new>

#include "philox.h"
#include "strip.h"

namespace {

constexpr int STRIPS = 8, BLOCKS = WIDTH / nvfp4::BLOCK;
constexpr uint32_t ROW_STREAM = 0, COLUMN_STREAM = 1;

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

// Scale codes and encoding factors of `count` blocks.
template <typename Float>
INLINE void scales_of(const int32_t* magnitudes, int count, float tensor_scale, uint8_t* scales, float* factors) {
    for (int i = 0; i < count; i += LENGTH<Float>) {
        const IntOf<Float> scale = nvfp4::block_scale(load<Float>(magnitudes + i), tensor_scale);
        store(factors + i, nvfp4::encoding_factor<Float>(scale, tensor_scale));
        store_narrow(scales + i, scale);
    }
}

// Random words of COUNT blocks, of which each is `row_step` rows and `block_step` blocks after the one before.
template <int COUNT>
INLINE void random_of(uint64_t seed, uint32_t stream, int64_t row, int64_t row_step, int64_t block, int64_t block_step,
                      uint32_t (*words)[COUNT]) {
    for (int i = 0; i < COUNT; ++i) {
        const Random4 random = block_random(seed, stream, row + i * row_step, block + i * block_step);
        for (int k = 0; k < 4; ++k) words[k][i] = random.words[k];
    }
}

// Codes of a row of a strip. `factors` are those of its blocks; seed, row and first block are what random bits are taken from.
template <bool STOCHASTIC, typename Float>
INLINE void encode_row(const float* v, const float* factors, uint64_t seed, int64_t row, int64_t first_block, int32_t* codes) {
    uint32_t words[4][BLOCKS];
    if (STOCHASTIC) random_of<BLOCKS>(seed, ROW_STREAM, row, 0, first_block, 1, words);
    for (int b = 0; b < BLOCKS; ++b) {
        uint32_t random[4];
        for (int k = 0; STOCHASTIC && k < 4; ++k) random[k] = words[k][b];
        for (int i = 0; i < nvfp4::BLOCK; i += LENGTH<Float>) {
            const Float scaled = load<Float>(v + b * nvfp4::BLOCK + i) * factors[b];
            if (STOCHASTIC) {
                const auto bytes = load<typename Lanes<Float>::Byte>(reinterpret_cast<const uint8_t*>(random) + i);
                store(codes + b * nvfp4::BLOCK + i, E2M1::encode_stochastic(scaled, __builtin_convertvector(bytes, IntOf<Float>)));
            } else {
                store(codes + b * nvfp4::BLOCK + i, E2M1::encode(scaled));
            }
        }
    }
}

// Two codes a byte, the even one in the low half.
template <typename Float>
INLINE void pack_row(const int32_t* codes, int64_t blocks, uint8_t* packed) {
    using Int = IntOf<Float>;
    uint8_t line[WIDTH / 2];
    uint8_t* to = blocks == BLOCKS ? packed : line;
    for (int i = 0; i < WIDTH; i += 4 * LENGTH<Float>) {
        const Int part[4] = {load<Int>(codes + i), load<Int>(codes + i + LENGTH<Float>), load<Int>(codes + i + 2 * LENGTH<Float>),
                             load<Int>(codes + i + 3 * LENGTH<Float>)};
        store_nibbles(to + i / 2, part);
    }
    if (blocks < BLOCKS) std::memcpy(packed, line, blocks * nvfp4::BLOCK / 2);
}

template <bool STOCHASTIC, typename Float>
INLINE void quantize_rows(const Job& job, const Strip& strip, int64_t row, int64_t column) {
    int32_t magnitudes[HEIGHT * BLOCKS];
    uint8_t scales[HEIGHT * BLOCKS];
    float factors[HEIGHT * BLOCKS];
    for (int i = 0; i < HEIGHT * BLOCKS; ++i) magnitudes[i] = row_magnitude<Float>(&strip.values[0][0] + i * nvfp4::BLOCK, nvfp4::BLOCK);
    scales_of<Float>(magnitudes, HEIGHT * BLOCKS, nvfp4::tensor_scale(*job.rows.amax), scales, factors);
    const int64_t across = blocks_of(job.x.columns), first = column / nvfp4::BLOCK;
    const int64_t blocks = std::min<int64_t>(BLOCKS, across - first), height = std::min<int64_t>(HEIGHT, job.x.rows - row);
    for (int64_t r = 0; r < height; ++r) {
        alignas(64) int32_t codes[WIDTH];
        encode_row<STOCHASTIC, Float>(strip.values[r], factors + r * BLOCKS, job.seed, job.first_row + row + r,
                                      job.first_column / nvfp4::BLOCK + first, codes);
        const int64_t at = (row + r) * across + first;
        pack_row<Float>(codes, blocks, job.rows.codes + at * nvfp4::BLOCK / 2);
        if (blocks == BLOCKS) {
            std::memcpy(job.rows.scales + at, scales + r * BLOCKS, BLOCKS);
        } else {
            std::memcpy(job.rows.scales + at, scales + r * BLOCKS, blocks);
        }
    }
}

// The codes of the columns of a tile while it is treated. A block of a column is 64 bits, kept in halves.
struct ColumnBlocks {
    alignas(64) uint32_t codes[STRIPS][2][WIDTH];
    uint8_t scales[STRIPS][WIDTH];
};

template <bool STOCHASTIC, typename Float>
INLINE void quantize_columns(const Job& job, const Strip& strip, int64_t row, int64_t column, ColumnBlocks& tile, int s) {
    using Int = IntOf<Float>;
    int32_t magnitudes[WIDTH];
    float factors[WIDTH];
    uint32_t random[4][WIDTH];
    for (int c = 0; c < WIDTH; c += LENGTH<Float>) store(magnitudes + c, column_magnitudes<Float>(strip, c));
    scales_of<Float>(magnitudes, WIDTH, nvfp4::tensor_scale(*job.columns.amax), tile.scales[s], factors);
    if (STOCHASTIC) {
        random_of<WIDTH>(job.seed, COLUMN_STREAM, job.first_column + column, 1, (job.first_row + row) / nvfp4::BLOCK, 0, random);
    }
    for (int half = 0; half < 2; ++half) {
        for (int c = 0; c < WIDTH; c += LENGTH<Float>) {
            Int bits{};
            for (int r = 0; r < 8; ++r) {
                const Float scaled = load<Float>(strip.values[half * 8 + r] + c) * load<Float>(factors + c);
                if (STOCHASTIC) {
                    const Int byte = (load<Int>(random[half * 2 + r / 4] + c) >> (8 * (r % 4))) & 0xff;
                    bits |= E2M1::encode_stochastic(scaled, byte) << (4 * r);
                } else {
                    bits |= E2M1::encode(scaled) << (4 * r);
                }
            }
            store(tile.codes[s][half] + c, bits);
        }
    }
}

// Blocks of 16 x 16: rows and columns share the codes.
template <bool STOCHASTIC, typename Float>
INLINE void quantize_squares(const Job& job, const Strip& strip, int64_t row, int64_t column, ColumnBlocks& tile, int s) {
    constexpr int PADDED = std::max(BLOCKS, LENGTH<Float>);
    int32_t of_columns[WIDTH], magnitudes[PADDED] = {};
    uint8_t scales[PADDED];
    float factors[PADDED];
    for (int c = 0; c < WIDTH; c += LENGTH<Float>) store(of_columns + c, column_magnitudes<Float>(strip, c));
    for (int b = 0; b < BLOCKS; ++b) {
        magnitudes[b] = *std::max_element(of_columns + b * nvfp4::BLOCK, of_columns + (b + 1) * nvfp4::BLOCK);
    }
    scales_of<Float>(magnitudes, PADDED, nvfp4::tensor_scale(*job.rows.amax), scales, factors);
    const int64_t across = blocks_of(job.x.columns), first = column / nvfp4::BLOCK;
    const int64_t blocks = std::min<int64_t>(BLOCKS, across - first);
    alignas(64) int32_t codes[HEIGHT][WIDTH];
    for (int r = 0; r < HEIGHT; ++r) {
        encode_row<STOCHASTIC, Float>(strip.values[r], factors, job.seed, job.first_row + row + r,
                                      job.first_column / nvfp4::BLOCK + first, codes[r]);
    }
    if (job.rows.codes != nullptr) {
        for (int64_t r = 0; r < std::min<int64_t>(HEIGHT, job.x.rows - row); ++r) {
            pack_row<Float>(codes[r], blocks, job.rows.codes + ((row + r) * across + first) * nvfp4::BLOCK / 2);
        }
        std::memcpy(job.rows.scales + row / nvfp4::BLOCK * across + first, scales, blocks);
    }
    if (job.columns.codes == nullptr) return;
    for (int c = 0; c < WIDTH; c += LENGTH<Float>) {
        for (int half = 0; half < 2; ++half) {
            IntOf<Float> bits{};
            for (int r = 0; r < 8; ++r) bits |= load<IntOf<Float>>(codes[half * 8 + r] + c) << (4 * r);
            store(tile.codes[s][half] + c, bits);
        }
    }
    for (int c = 0; c < WIDTH; ++c) tile.scales[s][c] = scales[c / nvfp4::BLOCK];
}

INLINE void store_columns(const Job& job, const ColumnBlocks& tile, int64_t row, int64_t column) {
    const int64_t across = blocks_of(job.x.rows), first = row / nvfp4::BLOCK;
    const int64_t strips = std::min<int64_t>(STRIPS, across - first), width = std::min<int64_t>(WIDTH, job.x.columns - column);
    for (int64_t c = 0; c < width; ++c) {
        uint32_t words[STRIPS][2];
        for (int s = 0; s < STRIPS; ++s) {
            words[s][0] = tile.codes[s][0][c];
            words[s][1] = tile.codes[s][1][c];
        }
        uint8_t* to = job.columns.codes + ((column + c) * across + first) * 8;
        if (strips == STRIPS) {
            std::memcpy(to, words, sizeof words);
        } else {
            std::memcpy(to, words, strips * sizeof words[0]);
        }
    }
    const int64_t step = job.square ? nvfp4::BLOCK : 1;
    for (int64_t c = 0; c < width; c += step) {
        for (int64_t s = 0; s < strips; ++s) job.columns.scales[(column + c) / step * across + first + s] = tile.scales[s][c];
    }
}

template <bool STOCHASTIC, typename Float>
INLINE void quantize_tile(const Job& job, int64_t unit) {
    const int64_t first = unit / tiles_across(job) * STRIPS * HEIGHT, column = unit % tiles_across(job) * WIDTH;
    const Type type = job.x.type;
    ColumnBlocks tile;
    Strip strip, changed;
    for (int s = 0; s < STRIPS && first + s * HEIGHT < job.x.rows; ++s) {
        const int64_t row = first + s * HEIGHT;
        load_strip<Float>(job.x, row, column, strip);
        if (job.square) {
            quantize_squares<STOCHASTIC, Float>(job, strip, row, column, tile, s);
            continue;
        }
        if (job.rows.codes != nullptr) {
            if (job.rows.signs != nullptr) transform_rows<Float>(type, job.rows.signs, strip, changed);
            quantize_rows<STOCHASTIC, Float>(job, job.rows.signs != nullptr ? changed : strip, row, column);
        }
        if (job.columns.codes != nullptr) {
            if (job.columns.signs != nullptr) transform_columns<Float>(type, job.columns.signs, strip, changed);
            quantize_columns<STOCHASTIC, Float>(job, job.columns.signs != nullptr ? changed : strip, row, column, tile, s);
        }
    }
    if (job.columns.codes != nullptr) store_columns(job, tile, first, column);
}

template <int LANES>
INLINE void quantize_unit(const Job& job, int64_t unit) {
    using Float = typename Vector<LANES>::Float;
    job.stochastic ? quantize_tile<true, Float>(job, unit) : quantize_tile<false, Float>(job, unit);
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
