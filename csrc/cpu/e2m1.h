// E2M1 codes of the rows and columns of strips, packed: what NVFP4 and MXFP4 share.

#pragma once

#include "minifloat.h"
#include "random.h"
#include "strip.h"

namespace e2m1 {

constexpr uint32_t ROW_STREAM = 0, COLUMN_STREAM = 1;
constexpr int PLACE = 16;  // values that take their random bits together

enum class Rounding { NEAREST, NEAREST_WITHIN, STOCHASTIC };

// Where random bits come from: the row of a whole matrix and, in units of PLACE values, the place in it.
struct Origin {
    uint64_t seed;
    uint32_t stream;
    int64_t row, place;
};

// How to round blocks of these magnitudes and factors: to nearest is quicker if nothing has to be clamped and nothing is NaN.
template <typename Float>
INLINE Rounding rounding_of(bool stochastic, const int32_t* magnitudes, const float* factors, int count) {
    if (stochastic) return Rounding::STOCHASTIC;
    IntOf<Float> largest{};
    for (int i = 0; i < count; i += LENGTH<Float>) {
        largest = larger(largest, magnitude_of(load<Float>(magnitudes + i) * load<Float>(factors + i)));
    }
    return largest_lane(largest) < E2M1::BEYOND ? Rounding::NEAREST_WITHIN : Rounding::NEAREST;
}

// Leading codes.
template <Rounding ROUNDING, typename Float>
INLINE IntOf<Float> encode(Float scaled, IntOf<Float> random) {
    if constexpr (ROUNDING == Rounding::STOCHASTIC) return E2M1::encode_stochastic_leading(scaled, random);
    return E2M1::encode_leading<ROUNDING == Rounding::NEAREST_WITHIN>(scaled);
}

template <Rounding ROUNDING, int BLOCK, typename Float>
INLINE void encode_row(const float* v, const float* factors, const Origin& origin, int32_t* kept, uint8_t* packed) {
    constexpr int LANES = LENGTH<Float>, TOGETHER = std::min(WIDTH / PLACE, LANES);  // places whose random numbers come at once
    using Places = typename Vector<TOGETHER>::Float;
    for (int first = 0; first < WIDTH; first += TOGETHER * PLACE) {
        IntOf<Places> words[4] = {};
        if (ROUNDING == Rounding::STOCHASTIC) {
            block_random<true, Places>(origin.seed, origin.stream, origin.row, origin.place + first / PLACE, words);
        }
        const RandomBytes<Places> bytes(words);
        for (int at = first; at < first + TOGETHER * PLACE; at += 4 * LANES) {
            IntOf<Float> codes[4];
            for (int k = 0; k < 4; ++k) {
                const int i = at + k * LANES;
                // 4 vectors may be less than a block or begin at a multiple of one.
                const float factor = 4 * LANES >= BLOCK ? factors[at / BLOCK + k * LANES / BLOCK] : factors[i / BLOCK];
                IntOf<Float> random{};
                if (ROUNDING == Rounding::STOCHASTIC) random = bytes.template of<Float>((i - first) / PLACE, i % PLACE);
                codes[k] = encode<ROUNDING>(load<Float>(v + i) * factor, random);
                if (kept != nullptr) store(kept + i, codes[k]);
            }
            store_nibbles(packed + at / 2, codes);
        }
    }
}

// Codes of WIDTH values of a row, packed, and leading words each by itself if `kept` is not null. `factors` are those of BLOCK values each.
template <int BLOCK, typename Float>
INLINE void encode_row(Rounding rounding, const float* v, const float* factors, const Origin& origin, int32_t* kept, uint8_t* packed) {
    switch (rounding) {
        case Rounding::NEAREST: return encode_row<Rounding::NEAREST, BLOCK, Float>(v, factors, origin, kept, packed);
        case Rounding::NEAREST_WITHIN: return encode_row<Rounding::NEAREST_WITHIN, BLOCK, Float>(v, factors, origin, kept, packed);
        case Rounding::STOCHASTIC: return encode_row<Rounding::STOCHASTIC, BLOCK, Float>(v, factors, origin, kept, packed);
    }
}

template <Rounding ROUNDING, typename Float>
INLINE void encode_columns(const Strip& strip, const float* factors, const Origin& origin, uint32_t (*codes)[WIDTH]) {
    using Int = IntOf<Float>;
    using Unsigned = typename Lanes<Float>::Unsigned;
    for (int c = 0; c < WIDTH; c += LENGTH<Float>) {
        Int words[4] = {};
        if (ROUNDING == Rounding::STOCHASTIC) {
            block_random<false, Float>(origin.seed, origin.stream, origin.row + c, origin.place, words);
        }
        for (int half = 0; half < 2; ++half) {
            Unsigned bits{};
            for (int r = 0; r < 8; ++r) {
                const Float scaled = load<Float>(strip.values[half * 8 + r] + c) * load<Float>(factors + c);
                const Int random = (words[half * 2 + r / 4] >> (8 * (r % 4))) & 0xff;
                bits |= (Unsigned)encode<ROUNDING>(scaled, random) >> (28 - 4 * r);
            }
            store(codes[half] + c, bits);
        }
    }
}

// Codes of the columns of a strip, in two words a column. `factors` are those of the columns; `origin` is that of the first of them.
template <typename Float>
INLINE void encode_columns(Rounding rounding, const Strip& strip, const float* factors, const Origin& origin, uint32_t (*codes)[WIDTH]) {
    switch (rounding) {
        case Rounding::NEAREST: return encode_columns<Rounding::NEAREST, Float>(strip, factors, origin, codes);
        case Rounding::NEAREST_WITHIN: return encode_columns<Rounding::NEAREST_WITHIN, Float>(strip, factors, origin, codes);
        case Rounding::STOCHASTIC: return encode_columns<Rounding::STOCHASTIC, Float>(strip, factors, origin, codes);
    }
}

// The codes of the columns of a tile of 128 rows while it is treated: a cache line a column, in words of 8 codes.
struct ColumnCodes {
    static constexpr int WORDS = 16, ROWS = 8 * WORDS;
    alignas(64) uint32_t words[WORDS][WIDTH];
};

// Stores `count` words of `width` columns, which lie `step` bytes apart.
INLINE void store_columns(const ColumnCodes& codes, int64_t count, int64_t width, uint8_t* to, int64_t step) {
    for (int64_t c = 0; c < width; ++c) {
        uint32_t line[ColumnCodes::WORDS];
        for (int w = 0; w < ColumnCodes::WORDS; ++w) line[w] = codes.words[w][c];
        if (count == ColumnCodes::WORDS) {
            std::memcpy(to + c * step, line, sizeof line);
        } else {
            std::memcpy(to + c * step, line, count * sizeof line[0]);
        }
    }
}

}  // namespace e2m1
