// Philox4x32-10 (Salmon, Moraes, Dror and Shaw, SC 2011): 128 random bits as a function of a 128-bit counter and a 64-bit key.

#pragma once

#include "host_device.h"

// Words lie in the lower halves of `Wide`, uint64_t or a vector of them (csrc/cpu/random.h); the upper halves have no meaning, so that
// products and shifts need no masks.
template <typename Wide>
struct LowerHalves {
    static HOST_DEVICE_MEMBER Wide product(Wide a, uint32_t b) { return (a & 0xffffffffu) * b; }
};

// Replaces the four words of a counter by random ones.
template <typename Wide>
HOST_DEVICE void philox4x32(Wide* words, uint64_t key) {
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    UNROLL
    for (int round = 0; round < 10; ++round) {
        const Wide first = LowerHalves<Wide>::product(words[0], 0xD2511F53u), second = LowerHalves<Wide>::product(words[2], 0xCD9E8D57u);
        words[0] = (second >> 32) ^ words[1] ^ static_cast<uint64_t>(k0);
        words[1] = second;
        words[2] = (first >> 32) ^ words[3] ^ static_cast<uint64_t>(k1);
        words[3] = first;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

struct Random4 {
    uint32_t words[4];
};

// The random bytes of 16 values: block `block` of row `row` of a whole matrix, however it is cut or tiled. Matrices with the same key
// differ by `stream`. Value i takes byte i % 4, from the lowest, of word i / 4.
HOST_DEVICE Random4 block_random(uint64_t key, uint32_t stream, int64_t row, int64_t block) {
    const uint64_t r = static_cast<uint64_t>(row);
    uint64_t words[4] = {static_cast<uint64_t>(block), r, r >> 32, stream};
    philox4x32(words, key);
    return {{static_cast<uint32_t>(words[0]), static_cast<uint32_t>(words[1]), static_cast<uint32_t>(words[2]),
             static_cast<uint32_t>(words[3])}};
}

HOST_DEVICE int32_t random_byte(const Random4& random, int i) { return static_cast<int32_t>(random.words[i / 4] >> (8 * (i % 4)) & 0xffu); }
