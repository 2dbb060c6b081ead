// Vectors of 4, 8 or 16 floats, for which the cores of csrc/common are compiled as they are for one float.

#pragma once

#include <utility>

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

// The vector whose lane i is rule(i), a constant.
template <typename Result, typename Rule, size_t... I>
INLINE Result lanes_by(Rule rule, std::index_sequence<I...>) {
    return Result{std::integral_constant<std::decay_t<decltype(Result{}[0])>, rule(int{I})>::value...};
}

// The shuffle whose lane i comes from lane rule(i) of x, or of a followed by b.
template <typename T, typename Rule>
INLINE T shuffled(T x, Rule rule) {
    return __builtin_shuffle(x, lanes_by<IntOf<typename Vector<LENGTH<T>>::Float>>(rule, std::make_index_sequence<LENGTH<T>>{}));
}

template <typename T, typename Rule>
INLINE T shuffled(T a, T b, Rule rule) {
    return __builtin_shuffle(a, b, lanes_by<IntOf<typename Vector<LENGTH<T>>::Float>>(rule, std::make_index_sequence<LENGTH<T>>{}));
}

// The same of bytes.
template <typename Int, typename Rule>
INLINE Int shuffled_bytes(Int x, Rule rule) {
    using Bytes = typename Vector<sizeof(Int)>::Byte;
    const Bytes bytes = __builtin_shuffle(load<Bytes>(&x), lanes_by<Bytes>(rule, std::make_index_sequence<sizeof(Int)>{}));
    return load<Int>(&bytes);
}

// Stores the lowest bytes of each lane as Small numbers: brings them together within 16 bytes, then these. Shuffles, because compilers
// convert to narrow vectors number by number.
template <typename Small, typename Int>
INLINE void store_narrow(Small* to, Int x) {
    constexpr int SIZE = sizeof(Small), WORDS = SIZE;  // of 4 bytes that 16 bytes become
    x = shuffled_bytes(x, [](int i) { return i / 16 * 16 + i % (4 * SIZE) / SIZE * 4 + i % SIZE; });
    if constexpr (LENGTH<Int> > 4) x = shuffled(x, [](int i) { return i / WORDS * 4 % LENGTH<Int> + i % WORDS; });
    std::memcpy(to, &x, LENGTH<Int> * SIZE);
}

// LENGTH<Int> bytes, one a lane. A shuffle, because compilers widen short vectors number by number.
template <typename Int>
INLINE Int load_bytes(const uint8_t* from) {
    constexpr int LANES = LENGTH<Int>;
    using Lane = Lanes<typename Vector<LANES>::Float>;
    if constexpr (LANES == 4) {
        return __builtin_convertvector(load<typename Lane::Byte>(from), Int);
    } else {
        typename Lane::Pair pairs;  // every 16 bytes hold all
        for (int i = 0; i < LANES / 2; ++i) pairs[i] = load<uint64_t>(from + (LANES == 16 ? i % 2 * 8 : 0));
        return shuffled_bytes(load<Int>(&pairs), [](int i) { return i / 16 * 16 + i / 16 * 4 + i % 16 / 4; }) & 0xff;
    }
}

// UNIT lanes of a, UNIT of b, and so on, from the lower or the UPPER half of every 4 lanes.
template <int UNIT, bool UPPER, typename T>
INLINE T interleaved(T a, T b) {
    constexpr int LANES = LENGTH<T>;
    return shuffled(a, b, [](int i) {
        const int from_b = i % (2 * UNIT) < UNIT ? 0 : LANES;
        return from_b + i / 4 * 4 + (UPPER ? 2 : 0) + i % 4 / (2 * UNIT) * UNIT + i % UNIT;
    });
}

// Byte k of a lane is the leading byte of that lane of vector k. The other bytes of the vectors are zeros.
template <typename Int>
INLINE Int joined_bytes(const Int* leading) {
    using Unsigned = typename Lanes<typename Vector<LENGTH<Int>>::Float>::Unsigned;
    return (Int)((Unsigned)leading[0] >> 24 | (Unsigned)leading[1] >> 16 | (Unsigned)leading[2] >> 8 | (Unsigned)leading[3]);
}

// From bytes k of lanes i < COUNT to bytes k COUNT + i: within 16 bytes first, which is cheap.
template <int COUNT, typename Int>
INLINE Int transposed_bytes(Int x) {
    if constexpr (COUNT == 2) {
        return shuffled_bytes(x, [](int i) { return i / 8 * 8 + i % 2 * 4 + i % 8 / 2; });
    } else {
        constexpr int QUARTER = COUNT / 4;
        x = shuffled_bytes(x, [](int i) { return i / 16 * 16 + i % 4 * 4 + i % 16 / 4; });
        return QUARTER == 1 ? x : shuffled(x, [](int i) { return i / COUNT * COUNT + i % QUARTER * 4 + i % COUNT / QUARTER; });
    }
}

// Stores the leading bytes of four vectors, one after another.
template <typename Int>
INLINE void store_bytes(uint8_t* to, const Int* leading) {
    store(to, transposed_bytes<LENGTH<Int>>(joined_bytes(leading)));
}

// Stores the leading codes of 4 bits of four vectors, one after another, as bytes of two codes, the even one in the low half.
template <typename Int>
INLINE void store_nibbles(uint8_t* to, const Int* leading) {
    using Pairs = typename Lanes<typename Vector<LENGTH<Int>>::Float>::Pair;
    constexpr int COUNT = LENGTH<Int> / 2;  // pairs of a vector
    const Int lanes = joined_bytes(leading);
    Pairs pairs = load<Pairs>(&lanes);
    pairs = pairs >> 4 | pairs >> 32;
    const Int halves = shuffled(load<Int>(&pairs), [](int i) { return i % COUNT * 2; });
    const Int bytes = transposed_bytes<COUNT>(halves);
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

// The larger ones of lanes DISTANCE apart; those of `a`, then those of `b`, in every 2 DISTANCE lanes.
template <int DISTANCE, typename Int>
INLINE Int folded(Int a, Int b) {
    constexpr int LANES = LENGTH<Int>;
    return larger(shuffled(a, b, [](int i) { return i % (2 * DISTANCE) < DISTANCE ? i : i - DISTANCE + LANES; }),
                  shuffled(a, b, [](int i) { return i % (2 * DISTANCE) < DISTANCE ? i + DISTANCE : i + LANES; }));
}

// Lane i is the largest lane of v[i]; v is used up.
template <int DISTANCE, typename Int>
INLINE Int largest_lanes(Int* v) {
    for (int i = 0; i < DISTANCE; ++i) v[i] = folded<DISTANCE>(v[i], v[i + DISTANCE]);
    if constexpr (DISTANCE > 1) return largest_lanes<DISTANCE / 2>(v);
    return v[0];
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
