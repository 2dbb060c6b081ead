// Random words of as many blocks as a vector has lanes.

#pragma once

#include "lanes.h"
#include "philox.h"

#if defined(__x86_64__)
// Compilers do not see that only the lower halves of vectors are multiplied, and would take three products instead of this one.
#define LOWER_HALVES_OF(N, INSTRUCTION)                                                            \
    template <>                                                                                    \
    struct LowerHalves<Vector<N>::Pair> {                                                          \
        using Pair = Vector<N>::Pair;                                                              \
        static HOST_DEVICE_MEMBER Pair product(Pair a, uint32_t b) {                               \
            const Pair factor = all<Pair>(b);                                                      \
            asm(INSTRUCTION : "+v"(a) : "v"(factor));                                              \
            return a;                                                                              \
        }                                                                                          \
    };
LOWER_HALVES_OF(4, "pmuludq %1, %0")
LOWER_HALVES_OF(8, "vpmuludq %1, %0, %0")
LOWER_HALVES_OF(16, "vpmuludq %1, %0, %0")
#undef LOWER_HALVES_OF
#endif

// Words of blocks `block`, `block` + 1 ... of a row if ALONG, else of block `block` of rows `row`, `row` + 1 ...; one in each lane.
template <bool ALONG, typename Float>
INLINE void block_random(uint64_t key, uint32_t stream, int64_t row, int64_t block, IntOf<Float>* words) {
    using Pair = typename Lanes<Float>::Pair;
    Pair halves[2][4];
    for (int odd = 0; odd < 2; ++odd) {
        Pair lane;
        for (int i = 0; i < LENGTH<Float> / 2; ++i) lane[i] = static_cast<uint64_t>(2 * i + odd);
        const Pair rows = static_cast<uint64_t>(row) + (ALONG ? Pair{} : lane);
        const Pair counter[4] = {static_cast<uint64_t>(block) + (ALONG ? lane : Pair{}), rows, rows >> 32, all<Pair>(uint64_t{stream})};
        std::copy(counter, counter + 4, halves[odd]);
        philox4x32(halves[odd], key);
    }
    for (int k = 0; k < 4; ++k) {
        const Pair joined = (halves[0][k] & 0xffffffffu) | (halves[1][k] << 32);
        words[k] = load<IntOf<Float>>(&joined);
    }
}

// 16 random bytes for each of LENGTH<Float> blocks, from their words.
template <typename Float>
struct RandomBytes {
    using Int = IntOf<Float>;
    alignas(64) Int blocks[4];  // number i + 4 j in part j, of 16 bytes, of vector i

    HOST_DEVICE_MEMBER explicit RandomBytes(const Int* words) {
        const Int lower[2] = {interleaved<1, 0>(words[0], words[1]), interleaved<1, 0>(words[2], words[3])};
        const Int upper[2] = {interleaved<1, 1>(words[0], words[1]), interleaved<1, 1>(words[2], words[3])};
        blocks[0] = interleaved<2, 0>(lower[0], lower[1]);
        blocks[1] = interleaved<2, 1>(lower[0], lower[1]);
        blocks[2] = interleaved<2, 0>(upper[0], upper[1]);
        blocks[3] = interleaved<2, 1>(upper[0], upper[1]);
    }

    // Those of as many values of a block as Values has lanes, from value i on.
    template <typename Values>
    HOST_DEVICE_MEMBER IntOf<Values> of(int block, int i) const {
        return load_bytes<IntOf<Values>>(reinterpret_cast<const uint8_t*>(&blocks[block % 4]) + block / 4 * 16 + i);
    }
};
