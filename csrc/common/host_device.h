// What g++ and nvcc need to compile the same cores, and the bits of floating-point numbers.
//
// The cores of csrc/common are exact: every operation is one rounding of IEEE 754 in a fixed order, so that all compilers, instruction
// sets and devices give the same bits. g++ has to be told -ffp-contract=off and nvcc -fmad=false; neither may flush subnormals.
//
// They are templates of `Float`: float, or with g++ also a vector of floats (csrc/cpu/lanes.h), on which the same operators act by lane.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define HOST_DEVICE __host__ __device__ __forceinline__
#define HOST_DEVICE_MEMBER __host__ __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#else
#define HOST_DEVICE static inline __attribute__((always_inline))
#define HOST_DEVICE_MEMBER inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#endif

constexpr int32_t MAGNITUDE = 0x7fffffff;
constexpr int32_t INFINITE = 0x7f800000;
constexpr float LARGEST_FLOAT = 3.40282346638528859812e+38f;

// The integers that go with a float, or with a vector of floats. Signed ones are compared, because all instruction sets can.
template <typename Float>
struct Lanes;

template <>
struct Lanes<float> {
    using Int = int32_t;
    using Unsigned = uint32_t;
    static HOST_DEVICE_MEMBER int32_t to_int(float x) { return static_cast<int32_t>(x); }
    static HOST_DEVICE_MEMBER float to_float(int32_t x) { return static_cast<float>(x); }
};

template <typename Float>
using IntOf = typename Lanes<Float>::Int;

template <typename Float>
HOST_DEVICE IntOf<Float> bits_of(Float x) {
    IntOf<Float> bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

template <typename Float>
HOST_DEVICE Float float_of(IntOf<Float> bits) {
    Float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// The same number in every lane. Subtracting zero changes none, so that nothing is computed.
template <typename T, typename Scalar>
HOST_DEVICE T all(Scalar x) {
    return x - T{};
}

template <typename Int>
HOST_DEVICE Int smaller(Int a, Int b) {
    return a < b ? a : b;
}

template <typename Int>
HOST_DEVICE Int larger(Int a, Int b) {
    return a > b ? a : b;
}

// min(x, LARGEST_FLOAT), which is LARGEST_FLOAT for NaN.
template <typename Float>
HOST_DEVICE Float finite(Float x) {
    return x < LARGEST_FLOAT ? x : all<Float>(LARGEST_FLOAT);
}

// Bits of |x|. They order as the numbers do, with NaN above infinity: their maximum is an amax that no order of reading changes.
template <typename Float>
HOST_DEVICE IntOf<Float> magnitude_of(Float x) {
    return bits_of(x) & MAGNITUDE;
}

HOST_DEVICE float float_of_bfloat16(uint16_t bits) { return float_of<float>(static_cast<int32_t>(static_cast<uint32_t>(bits) << 16)); }

// To nearest, ties to even; every NaN becomes 0x7fc0.
template <typename Float>
HOST_DEVICE IntOf<Float> bfloat16_of(Float x) {
    using Int = IntOf<Float>;
    using Unsigned = typename Lanes<Float>::Unsigned;
    const Unsigned bits = (Unsigned)bits_of(x);
    const Int rounded = (Int)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    return magnitude_of(x) > INFINITE ? all<Int>(0x7fc0) : rounded;
}

// x as a bfloat16, in a float.
template <typename Float>
HOST_DEVICE Float rounded_to_bfloat16(Float x) {
    return float_of<Float>(bfloat16_of(x) << 16);
}
