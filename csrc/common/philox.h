// Philox4x32-10 (Salmon, Moraes, Dror and Shaw, SC 2011): 128 random bits as a function of a 128-bit counter and a 64-bit key.

#pragma once

#include "host_device.h"

struct Random4 {
    uint32_t words[4];
};

HOST_DEVICE Random4 philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key) {
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t first = static_cast<uint64_t>(c0) * 0xD2511F53u, second = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
        c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
        c1 = static_cast<uint32_t>(second);
        c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
        c3 = static_cast<uint32_t>(first);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// The random bytes of 16 values: block `block` of row `row` of a whole matrix, however it is cut or tiled. Matrices with the same key
// differ by `stream`. Value i takes byte i % 4, from the lowest, of word i / 4.
HOST_DEVICE Random4 block_random(uint64_t key, uint32_t stream, int64_t row, int64_t block) {
    const uint64_t r = static_cast<uint64_t>(row);
    return philox4x32(static_cast<uint32_t>(block), static_cast<uint32_t>(r), static_cast<uint32_t>(r >> 32), stream, key);
}

HOST_DEVICE int32_t random_byte(const Random4& random, int i) { return static_cast<int32_t>(random.words[i / 4] >> (8 * (i % 4)) & 0xffu); }
