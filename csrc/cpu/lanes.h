// Vectors of 4, 8 or 16 floats, for which the cores of csrc/common are compiled as they are for one float.

#pragma once

#include "butterflies.h"
#include "host_device.h"
#include "variants.h"

template <int N>
struct Vector {
    typedef float Float __attribute__((vector_size(4 * N)));
    typedef int32_t Int __attribute__((vector_size(4 * N)));
    typedef uint32_t Unsigned __attribute__((vector_size(4 * N)));
    typedef uint64_t Pair __attribute__((vector_size(4 * N)));
    typedef uint16_t Short __attribute__((vector_size(2 * N)));
    typedef uint8_t Byte __attribute__((vector_size(N)));
};

#define LANES_OF(N)                                                                                    \
    template <>                                                                                        \
    struct Lanes<Vector<N>::Float> : Vector<N> {                                                       \
        static HOST_DEVICE_MEMBER Int to_int(Float x) { return __builtin_convertvector(x, Int); }      \
        static HOST_DEVICE_MEMBER Float to_float(Int x) { return __builtin_convertvector(x, Float); }  \
    };
LANES_OF(4)
LANES_OF(8)
LANES_OF(16)
#undef LANES_OF

template <typename Vector>
constexpr int LENGTH = sizeof(Vector) / 4;

template <typename T>
INLINE T load(const void* from) {
    T vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

template <typename T>
INLINE void store(void* to, T vector) {
    std::memcpy(to, &vector, sizeof vector);
}

// Stores the lowest bytes of each lane as Small numbers. A shuffle, because compilers convert to narrow vectors number by number.
template <typename Small, typename Int>
INLINE void store_narrow(Small* to, Int x) {
    typedef Small Parts __attribute__((vector_size(sizeof(Int))));
    constexpr int STEP = 4 / sizeof(Small);
    Parts places;
    for (size_t i = 0; i < sizeof(Int) / sizeof(Small); ++i) places[i] = static_cast<Small>(i * STEP % (sizeof(Int) / sizeof(Small)));
    const Parts parts = __builtin_shuffle(load<Parts>(&x), places);
    std::memcpy(to, &parts, sizeof(Int) / STEP);
}

// Stores four vectors of 4-bit codes, one after another, as bytes of two codes, the even one in the low half.
template <typename Int>
INLINE void store_nibbles(uint8_t* to, const Int* codes) {
    using Pairs = typename Vector<LENGTH<Int>>::Pair;
    using Bytes = typename Vector<4 * LENGTH<Int>>::Byte;
    constexpr int COUNT = LENGTH<Int> / 2;  // pairs of a vector
    // Byte k of the two lanes of a pair holds codes of vector k.
    const Int lanes = codes[0] | (codes[1] << 8) | (codes[2] << 16) | (codes[3] << 24);
    Pairs pairs = load<Pairs>(&lanes);
    pairs |= pairs >> 28;
    Bytes places{};
    for (int k = 0; k < 4; ++k) {
        for (int pair = 0; pair < COUNT; ++pair) places[k * COUNT + pair] = static_cast<uint8_t>(pair * 8 + k);
    }
    const Bytes bytes = __builtin_shuffle(load<Bytes>(&pairs), places);
    std::memcpy(to, &bytes, 4 * COUNT);
}

enum class Type : int32_t { FLOAT32 = 0, BFLOAT16 = 1 };

// LENGTH<Float> numbers of a type, as floats.
template <typename Float>
INLINE Float load_as(Type type, const void* values, int64_t at) {
    if (type == Type::FLOAT32) return load<Float>(static_cast<const float*>(values) + at);
    const auto halves = load<typename Lanes<Float>::Short>(static_cast<const uint16_t*>(values) + at);
    return float_of<Float>(__builtin_convertvector(halves, IntOf<Float>) << 16);
}

template <typename Float>
INLINE void store_as(Type type, void* values, int64_t at, Float x) {
    if (type == Type::FLOAT32) {
        store(static_cast<float*>(values) + at, x);
    } else {
        store_narrow(static_cast<uint16_t*>(values) + at, bfloat16_of(x));
    }
}

INLINE float load_one(Type type, const void* x, int64_t at) {
    return type == Type::BFLOAT16 ? float_of_bfloat16(static_cast<const uint16_t*>(x)[at]) : static_cast<const float*>(x)[at];
}

INLINE void store_one(Type type, void* out, int64_t at, float x) {
    if (type == Type::BFLOAT16) {
        static_cast<uint16_t*>(out)[at] = static_cast<uint16_t>(bfloat16_of(x));
    } else {
        static_cast<float*>(out)[at] = x;
    }
}

template <typename Float>
INLINE Float rounded_to(Type type, Float x) {
    return type == Type::BFLOAT16 ? rounded_to_bfloat16(x) : x;
}

// Lane i and lane i ^ DISTANCE change places.
template <int DISTANCE, typename T>
INLINE T partners(T x) {
    IntOf<typename Vector<LENGTH<T>>::Float> places;
    for (int i = 0; i < LENGTH<T>; ++i) places[i] = i ^ DISTANCE;
    return __builtin_shuffle(x, places);
}

template <typename Int>
INLINE int32_t largest_lane(Int x) {
    if constexpr (LENGTH<Int> >= 16) x = larger(x, partners<8>(x));
    if constexpr (LENGTH<Int> >= 8) x = larger(x, partners<4>(x));
    x = larger(x, partners<2>(x));
    return larger(x, partners<1>(x))[0];
}

// One stage of a Hadamard transform within a vector: a and b, DISTANCE lanes apart, become a + b and a - b.
template <int DISTANCE, typename Float>
INLINE Float butterfly(Float x) {
    IntOf<Float> signs;
    for (int i = 0; i < LENGTH<Float>; ++i) signs[i] = i & DISTANCE ? INT32_MIN : 0;
    return partners<DISTANCE>(x) + float_of<Float>(bits_of(x) ^ signs);
}

// The stages of distances below the length of the vector.
template <typename Float>
INLINE Float butterflies(Float x) {
    x = butterfly<2>(butterfly<1>(x));
    if constexpr (LENGTH<Float> >= 8) x = butterfly<4>(x);
    if constexpr (LENGTH<Float> >= 16) x = butterfly<8>(x);
    return x;
}
