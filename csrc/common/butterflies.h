// Stages of Hadamard transforms, in the order of the definition.

#pragma once

#include "host_device.h"

// The stages of distances 1, 2, 4 ... < COUNT of a list of numbers or of vectors: a and b become a + b and a - b.
template <int COUNT, typename Float>
HOST_DEVICE void butterflies(Float* v) {
    UNROLL
    for (int distance = 1; distance < COUNT; distance *= 2) {
        UNROLL
        for (int i = 0; i < COUNT; ++i) {
            if (i & distance) continue;
            const Float a = v[i], b = v[i + distance];
            v[i] = a + b;
            v[i + distance] = a - b;
        }
    }
}
