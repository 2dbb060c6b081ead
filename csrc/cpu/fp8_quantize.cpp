// FP8 from float32 or bfloat16: codes and scales of the rows, of the columns, or of both from one read; and back.
//
// A unit is a tile of 128 x 128, which holds whole blocks of every scaling but those of tensors and rows, whose amaxes are given.
// "Lines" are rows for the output of rows and columns for that of columns; a line of a tile has four parts of 32 values.

#include "fp8.h"

#include <new>

#include "strip.h"

namespace {

using fp8::Output;

constexpr int SIDE = WIDTH, PART = 32, PARTS = SIDE / PART;
constexpr int64_t ROWS = 16;  // of a unit of dequantization

struct Job {
    Matrix x;
    bool e5m2, power_of_two, mx;
    Output rows, columns;
};

// 128 x 128 values, filled up with zeros.
struct Tile {
    Strip strips[SIDE / HEIGHT];
    HOST_DEVICE_MEMBER const float* row(int r) const { return strips[r / HEIGHT].values[r % HEIGHT]; }
};

// Of the lines of a tile, by part; those of blocks of 128 are in part 0.
struct Lines {
    alignas(64) int32_t magnitudes[PARTS][SIDE];
    alignas(64) float factors[PARTS][SIDE];
    int parts;
    HOST_DEVICE_MEMBER const float* factors_of(int part) const { return factors[part < parts ? part : 0]; }
};

int64_t blocks_of(int64_t values, int64_t width) { return (values + width - 1) / width; }

int64_t tiles_across(const Matrix& x) { return blocks_of(x.columns, SIDE); }

template <typename Float>
INLINE void load_tile(const Matrix& x, int64_t row, int64_t column, Tile& tile) {
    for (int s = 0; s < SIDE / HEIGHT; ++s) {
        if (row + s * HEIGHT < x.rows) {
            load_strip<Float>(x, row + s * HEIGHT, column, tile.strips[s]);
        } else {
            std::memset(&tile.strips[s], 0, sizeof(Strip));
        }
    }
}

template <typename Float>
INLINE void magnitudes_of_rows(const Tile& tile, int32_t (*magnitudes)[SIDE]) {
    for (int s = 0; s < SIDE / HEIGHT; ++s) {
        alignas(64) int32_t of_parts[HEIGHT][PARTS];
        block_magnitudes<PART, Float>(tile.strips[s], of_parts[0]);
        for (int p = 0; p < PARTS; ++p) {
            for (int r = 0; r < HEIGHT; ++r) magnitudes[p][s * HEIGHT + r] = of_parts[r][p];
        }
    }
}

template <typename Float>
INLINE void magnitudes_of_columns(const Tile& tile, int32_t (*magnitudes)[SIDE]) {
    for (int p = 0; p < PARTS; ++p) {
        for (int c = 0; c < SIDE; c += LENGTH<Float>) {
            const IntOf<Float> upper = column_magnitudes<Float>(tile.strips[2 * p], c);
            store(magnitudes[p] + c, larger(upper, column_magnitudes<Float>(tile.strips[2 * p + 1], c)));
        }
    }
}

// From the largest magnitudes of parts to those of blocks.
template <typename Float>
INLINE void join_parts(const Output& output, Lines& lines) {
    if (output.width == PART) return;
    for (int i = 0; i < SIDE; i += LENGTH<Float>) {
        IntOf<Float> largest = load<IntOf<Float>>(lines.magnitudes[0] + i);
        for (int p = 1; p < PARTS; ++p) largest = larger(largest, load<IntOf<Float>>(lines.magnitudes[p] + i));
        store(lines.magnitudes[0] + i, largest);
    }
    if (output.height == 1) return;
    int32_t* first = lines.magnitudes[0];
    std::fill(first, first + SIDE, *std::max_element(first, first + SIDE));
}

// Where the scales of a tile lie, that begins with line `line` at value `along`.
struct Place {
    int64_t at, step, lines, parts;
    bool begins;  // whether blocks begin here, so that their scales are written from here

    Place(const Output& output, int64_t line, int64_t along) {
        at = line / output.height * output.across + along / output.width;
        step = output.height == 1 ? output.across : 0;
        begins = line % output.height == 0 && along % output.width == 0;
        lines = std::min<int64_t>(SIDE, output.lines - line);
        parts = output.width == PART ? std::min<int64_t>(PARTS, output.across - along / PART) : 1;
    }
};

template <typename Float>
INLINE void scales_of(const Job& job, const Output& output, const Place& place, Lines& lines) {
    alignas(64) float scales[SIDE];
    uint8_t codes[SIDE];
    const float largest = job.e5m2 ? 57344.0f : 448.0f;
    lines.parts = output.width == PART ? PARTS : 1;
    for (int p = 0; p < place.parts; ++p) {
        if (output.given != nullptr) {
            std::fill(lines.magnitudes[p], lines.magnitudes[p] + SIDE, 0);
            for (int64_t i = 0; i < place.lines; ++i) lines.magnitudes[p][i] = bits_of(output.given[place.at + i * place.step + p]);
        }
        for (int i = 0; i < SIDE; i += LENGTH<Float>) {
            const Float amax = load<Float>(lines.magnitudes[p] + i);
            if (job.mx) {
                const IntOf<Float> scale = fp8::block_scale(amax, largest);
                store(lines.factors[p] + i, fp8::block_encoding_factor<Float>(scale));
                store_narrow(codes + i, scale);
            } else {
                const Float factor = fp8::encoding_factor(amax, largest, job.power_of_two);
                store(lines.factors[p] + i, factor);
                store(scales + i, fp8::decoding_scale(amax, factor));
            }
        }
        for (int64_t i = 0; place.begins && i < (place.step == 0 ? 1 : place.lines); ++i) {
            const int64_t at = place.at + i * place.step + p;
            if (job.mx) {
                static_cast<uint8_t*>(output.scales)[at] = codes[i];
            } else {
                static_cast<float*>(output.scales)[at] = scales[i];
            }
            if (output.given == nullptr) output.amax[at] = float_of<float>(lines.magnitudes[p][i]);
        }
    }
}

// A copy whose size the compiler knows in most cases, which it then does in a few moves.
INLINE void copy_line(uint8_t* to, const void* from, int64_t count) { std::memcpy(to, from, count == SIDE ? SIDE : count); }

// words[i][c] are codes 4 i ... 4 i + 3 of column c.
INLINE void store_columns(const Job& job, const uint32_t (*words)[SIDE], int64_t row, int64_t column) {
    const int64_t count = std::min<int64_t>(SIDE, job.x.rows - row), width = std::min<int64_t>(SIDE, job.x.columns - column);
    for (int64_t c = 0; c < width; ++c) {
        uint32_t line[SIDE / 4];
        for (int i = 0; i < SIDE / 4; ++i) line[i] = words[i][c];
        copy_line(job.columns.codes + (column + c) * job.x.rows + row, line, count);
    }
}

// Codes of a tile: those of the rows, of the columns, or of both where their factors are the same. Returns whether all numbers were in the
// range that WITHIN takes for granted; if not, the codes are wrong.
template <typename Format, bool WITHIN, bool TO_ROWS, bool TO_COLUMNS, typename Float>
INLINE bool encode_tile(const Job& job, const Tile& tile, const Lines& lines, int64_t row, int64_t column) {
    using Int = IntOf<Float>;
    constexpr int LANES = LENGTH<Float>, STEP = 4 * LANES;
    const int64_t height = std::min<int64_t>(SIDE, job.x.rows - row), width = std::min<int64_t>(SIDE, job.x.columns - column);
    alignas(64) uint32_t words[SIDE / 4][SIDE];
    Int largest{};
    for (int r = 0; r < height; r += 4) {
        alignas(64) uint8_t bytes[4][SIDE];
        for (int c = 0; c < SIDE; c += STEP) {
            Int of_rows[4][4], of_columns[4][4];
            for (int k = 0; k < 4; ++k) {
                const float* v = tile.row(r + k) + c;
                for (int j = 0; j < 4; ++j) {
                    const int i = j * LANES;
                    const Float factor = TO_ROWS ? all<Float>(lines.factors_of(c / PART + i / PART)[r + k])
                                                 : load<Float>(lines.factors_of(r / PART) + c + i);
                    const Float scaled = load<Float>(v + i) * factor;
                    largest = larger(largest, magnitude_of(scaled));
                    of_rows[k][j] = of_columns[j][k] = Format::template encode_leading<WITHIN>(scaled);
                }
                if (TO_ROWS) store_bytes(bytes[k] + c, of_rows[k]);
            }
            for (int j = 0; TO_COLUMNS && j < 4; ++j) store(words[r / 4] + c + j * LANES, joined_bytes(of_columns[j]));
        }
        for (int k = 0; TO_ROWS && k < 4 && r + k < height; ++k) {
            copy_line(job.rows.codes + (row + r + k) * job.x.columns + column, bytes[k], width);
        }
    }
    if (TO_COLUMNS) store_columns(job, words, row, column);
    return largest_lane(largest) < Format::BEYOND;
}

// The same for any numbers.
template <typename Format, bool TO_ROWS, bool TO_COLUMNS, typename Float>
INLINE void encode_tile(const Job& job, const Tile& tile, const Lines& lines, int64_t row, int64_t column) {
    if (encode_tile<Format, true, TO_ROWS, TO_COLUMNS, Float>(job, tile, lines, row, column)) return;
    encode_tile<Format, false, TO_ROWS, TO_COLUMNS, Float>(job, tile, lines, row, column);
}

template <typename Format, typename Float>
INLINE void quantize_tile(const Job& job, int64_t unit) {
    const int64_t row = unit / tiles_across(job.x) * SIDE, column = unit % tiles_across(job.x) * SIDE;
    Tile tile;
    Lines lines;
    load_tile<Float>(job.x, row, column, tile);
    // Rows and columns that share scales share codes: those of the rows are the columns', transposed.
    const bool shared = job.rows.codes != nullptr && job.rows.height > 1 && job.columns.codes != nullptr;
    if (job.rows.codes != nullptr) {
        if (job.rows.given == nullptr) {
            magnitudes_of_rows<Float>(tile, lines.magnitudes);
            join_parts<Float>(job.rows, lines);
        }
        scales_of<Float>(job, job.rows, Place(job.rows, row, column), lines);
        shared ? encode_tile<Format, true, true, Float>(job, tile, lines, row, column)
               : encode_tile<Format, true, false, Float>(job, tile, lines, row, column);
    }
    if (job.columns.codes == nullptr) return;
    if (job.columns.given == nullptr) {
        magnitudes_of_columns<Float>(tile, lines.magnitudes);
        join_parts<Float>(job.columns, lines);
    }
    scales_of<Float>(job, job.columns, Place(job.columns, column, row), lines);
    if (!shared) encode_tile<Format, false, true, Float>(job, tile, lines, row, column);
}

template <int LANES>
INLINE void quantize_unit(const Job& job, int64_t unit) {
    using Float = typename Vector<LANES>::Float;
    job.e5m2 ? quantize_tile<E5M2, Float>(job, unit) : quantize_tile<E4M3, Float>(job, unit);
}

VARIANTS(quantize_unit, Job)

struct AmaxJob {
    Matrix x;
    int32_t *of_rows, *of_columns;  // bits of floats; null if not wanted
};

INLINE void raise(int32_t* largest, int32_t candidate) {
    int32_t seen = __atomic_load_n(largest, __ATOMIC_RELAXED);
    while (seen < candidate && !__atomic_compare_exchange_n(largest, &seen, candidate, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) continue;
}

template <int LANES>
INLINE void largest_of_unit(const AmaxJob& job, int64_t unit) {
    using Float = typename Vector<LANES>::Float;
    const int64_t row = unit / tiles_across(job.x) * SIDE, column = unit % tiles_across(job.x) * SIDE;
    const Output whole_lines{nullptr, nullptr, nullptr, nullptr, 1, SIDE};
    Tile tile;
    Lines lines;
    load_tile<Float>(job.x, row, column, tile);
    if (job.of_rows != nullptr) {
        magnitudes_of_rows<Float>(tile, lines.magnitudes);
        join_parts<Float>(whole_lines, lines);
        for (int64_t r = row; r < std::min(job.x.rows, row + SIDE); ++r) raise(job.of_rows + r, lines.magnitudes[0][r - row]);
    }
    if (job.of_columns != nullptr) {
        magnitudes_of_columns<Float>(tile, lines.magnitudes);
        join_parts<Float>(whole_lines, lines);
        for (int64_t c = column; c < std::min(job.x.columns, column + SIDE); ++c) {
            raise(job.of_columns + c, lines.magnitudes[0][c - column]);
        }
    }
}

VARIANTS(largest_of_unit, AmaxJob)

struct DequantizeJob {
    const uint8_t* codes;
    const void* scales;
    bool mx;
    int64_t rows, columns, height, width;
    bool e5m2;
    Type type;
    void* out;
};

template <typename Float>
INLINE Float decode(bool e5m2, IntOf<Float> codes) {
    return e5m2 ? decode_e5m2<Float>(codes) : decode_e4m3<Float>(codes);
}

template <int LANES>
INLINE void dequantize_unit(const DequantizeJob& job, int64_t unit) {
    using Float = typename Vector<LANES>::Float;
    const int64_t across = blocks_of(job.columns, job.width);
    for (int64_t row = unit * ROWS; row < std::min(job.rows, (unit + 1) * ROWS); ++row) {
        for (int64_t b = 0; b < across; ++b) {
            const int64_t place = row / job.height * across + b, end = (row * job.columns) + std::min(job.columns, (b + 1) * job.width);
            const float scale = job.mx ? decode_e8m0(static_cast<const uint8_t*>(job.scales)[place])
                                       : static_cast<const float*>(job.scales)[place];
            int64_t at = row * job.columns + b * job.width;
            for (; at + LANES <= end; at += LANES) {
                store_as(job.type, job.out, at, decode<Float>(job.e5m2, load_bytes<IntOf<Float>>(job.codes + at)) * scale);
            }
            for (; at < end; ++at) store_one(job.type, job.out, at, decode<float>(job.e5m2, job.codes[at]) * scale);
        }
    }
}

VARIANTS(dequantize_unit, DequantizeJob)

int64_t tiles_of(const Matrix& x) { return blocks_of(x.rows, SIDE) * tiles_across(x); }

}  // namespace

// x [rows, columns] contiguous; type: 0 float32, 1 bfloat16; codes of E5M2 or E4M3. Of the rows and of the columns, either may be null:
//   codes [rows, columns], scales and amax [ceil(rows / height), ceil(columns / width)]; for columns the same of x transposed
//   mx: scales are uint8 (E8M0), else float32, powers of two if power_of_two
//   given: the amaxes, or null: found in blocks, and written to amax
// Blocks are 1 x 32 of mx, 1 x 128 and 128 x 128; of a row or all where amaxes are given. Of squares, columns have the codes of rows.
// instructions: "avx512", "avx2", "portable", or "" for the first of these that the CPU has. Returns a code of variants.h.
extern "C" int32_t fp8_quantize(const void* x, int32_t type, int64_t rows, int64_t columns, int32_t e5m2, int32_t power_of_two, int32_t mx,
                                uint8_t* row_codes, void* row_scales, float* row_amax, const float* row_given, int64_t row_height,
                                int64_t row_width, uint8_t* column_codes, void* column_scales, float* column_amax,
                                const float* column_given, int64_t column_height, int64_t column_width, int64_t threads,
                                const char* instructions) try {
    const Job job{{x, static_cast<Type>(type), rows, columns}, e5m2 != 0, power_of_two != 0, mx != 0,
                  {row_codes, row_scales, row_amax, row_given, row_height, row_width, rows, blocks_of(columns, row_width)},
                  {column_codes, column_scales, column_amax, column_given, column_height, column_width, columns,
                   blocks_of(rows, column_width)}};
    return run_variant(quantize_unit_variants(), instructions, job, tiles_of(job.x), threads);
} catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
}

// Largest magnitudes of the rows and of the columns of x, as of fp8_quantize; either may be null. They have to be 0 before.
extern "C" int32_t fp8_amax(const void* x, int32_t type, int64_t rows, int64_t columns, float* of_rows, float* of_columns, int64_t threads,
                            const char* instructions) try {
    // Floats of one sign order as their bits do.
    const AmaxJob job{{x, static_cast<Type>(type), rows, columns}, reinterpret_cast<int32_t*>(of_rows),
                      reinterpret_cast<int32_t*>(of_columns)};
    return run_variant(largest_of_unit_variants(), instructions, job, tiles_of(job.x), threads);
} catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
}

// codes and scales as of fp8_quantize -> out [rows, columns]; type: 0 float32, 1 bfloat16.
extern "C" int32_t fp8_dequantize(const uint8_t* codes, const void* scales, int32_t mx, int64_t rows, int64_t columns, int64_t height,
                                  int64_t width, int32_t e5m2, int32_t type, void* out, int64_t threads, const char* instructions) try {
    const DequantizeJob job{codes, scales, mx != 0, rows, columns, height, width, e5m2 != 0, static_cast<Type>(type), out};
    return run_variant(dequantize_unit_variants(), instructions, job, blocks_of(rows, ROWS), threads);
} catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
}
