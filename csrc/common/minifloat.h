// Floating-point numbers of 4 and 8 bits: E2M1, E4M3, E5M2 and the scale format E8M0 (OCP Microscaling Formats 1.0 and OFP8 1.0).
//
// Encoding rounds to nearest, ties to even, and saturates: what is beyond the largest finite number, infinity included, becomes that
// number. NaN becomes 0x7f in the 8-bit formats and +6 in E2M1, which has none; its sign is dropped, because devices differ in it.

#pragma once

#include "host_device.h"

// EXPONENT and MANTISSA are numbers of bits, LARGEST the bits of the largest finite number as float, NOT_A_NUMBER the code of NaN.
template <int EXPONENT, int MANTISSA, int32_t LARGEST, int32_t NOT_A_NUMBER>
struct MiniFloat {
    static constexpr int BIAS = (1 << (EXPONENT - 1)) - 1;
    static constexpr int DROPPED = 23 - MANTISSA;                      // bits of a float's mantissa that are rounded away
    static constexpr int32_t SMALLEST_NORMAL = (128 - BIAS) << 23;     // as float: 2^(1 - BIAS)
    static constexpr int SIGN = EXPONENT + MANTISSA;
    static constexpr int UNUSED = 31 - SIGN;                           // bits of a word below a code that leads it
    static constexpr int32_t BEYOND = LARGEST + (1 << (DROPPED - 1));  // what is smaller than this needs no clamping to round to LARGEST

    template <typename Float>
    static HOST_DEVICE_MEMBER IntOf<Float> clamped(Float x) {
        return smaller(magnitude_of(x), all<IntOf<Float>>(LARGEST));
    }

    // Exponent of the binade of a magnitude, in place; that of subnormal codes counts as the smallest one.
    template <typename Int>
    static HOST_DEVICE_MEMBER Int binade(Int magnitude) {
        return larger(magnitude & INFINITE, all<Int>(SMALLEST_NORMAL));
    }

    // A code is the number of steps in its binade and, from bit MANTISSA on, the number of the binade. The latter is exponent >> DROPPED
    // plus this, as far as the SIGN + 1 lowest bits go. It is even, so that adding it to steps leaves ties as they are.
    static constexpr int32_t FIRST_BINADE = -(SMALLEST_NORMAL >> DROPPED) & ((2 << SIGN) - 1);
    static_assert(FIRST_BINADE % 2 == 0, "ties go to even codes");

    // The code of a magnitude below BEYOND in the SIGN + 1 lowest bits, to nearest; the others have no meaning.
    template <typename Float>
    static HOST_DEVICE_MEMBER IntOf<Float> nearest(IntOf<Float> magnitude) {
        const IntOf<Float> exponent = binade(magnitude);
        // A float of this exponent has the spacing of the codes, so that adding it rounds, and leaves the steps in the last bits.
        const IntOf<Float> grid = exponent + ((DROPPED << 23) + FIRST_BINADE);
        return bits_of<Float>(float_of<Float>(magnitude) + float_of<Float>(grid)) + (exponent >> DROPPED);
    }

    // The same, up with the probability of the distance to the number below, in steps of 1/256: `random` is one of 0...255. Numbers of the
    // format stay. With f the distance, up if f + (random + 1/2) / 256 >= 1, which is exact in steps of 1/512.
    template <typename Float>
    static HOST_DEVICE_MEMBER IntOf<Float> stochastic(IntOf<Float> magnitude, IntOf<Float> random) {
        const IntOf<Float> exponent = binade(magnitude);
        const Float steps = float_of<Float>(magnitude) * float_of<Float>(((254 + MANTISSA + 9) << 23) - exponent);
        return ((Lanes<Float>::to_int(steps) + (random << 1) + (1 + (FIRST_BINADE << 9))) >> 9) + (exponent >> DROPPED);
    }

    // The code in the highest bits of a word, with the sign of x and zeros after it.
    template <typename Float>
    static HOST_DEVICE_MEMBER IntOf<Float> leading(Float x, IntOf<Float> lowest) {
        using Unsigned = typename Lanes<Float>::Unsigned;
        return (IntOf<Float>)((Unsigned)lowest << UNUSED) | (bits_of(x) & INT32_MIN);
    }

    template <typename Float>
    static HOST_DEVICE_MEMBER IntOf<Float> unless_nan(Float x, IntOf<Float> leading_code) {
        const int32_t not_a_number = static_cast<int32_t>(static_cast<uint32_t>(NOT_A_NUMBER) << UNUSED);
        return magnitude_of(x) > INFINITE ? all<IntOf<Float>>(not_a_number) : leading_code;
    }

    // Codes that lead words. Those of all numbers, and those of numbers whose magnitudes are known to be below BEYOND.
    template <bool WITHIN, typename Float>
    static HOST_DEVICE_MEMBER IntOf<Float> encode_leading(Float x) {
        return WITHIN ? leading(x, nearest<Float>(magnitude_of(x))) : unless_nan(x, leading(x, nearest<Float>(clamped(x))));
    }

    template <typename Float>
    static HOST_DEVICE_MEMBER IntOf<Float> encode_stochastic_leading(Float x, IntOf<Float> random) {
        return unless_nan(x, leading(x, stochastic<Float>(clamped(x), random)));
    }

    template <typename Float>
    static HOST_DEVICE_MEMBER IntOf<Float> encode(Float x) {
        using Unsigned = typename Lanes<Float>::Unsigned;
        return (IntOf<Float>)((Unsigned)encode_leading<false>(x) >> UNUSED);
    }

    template <typename Float>
    static HOST_DEVICE_MEMBER IntOf<Float> encode_stochastic(Float x, IntOf<Float> random) {
        using Unsigned = typename Lanes<Float>::Unsigned;
        return (IntOf<Float>)((Unsigned)encode_stochastic_leading(x, random) >> UNUSED);
    }

    // Of a number that is not negative and not NaN.
    template <typename Float>
    static HOST_DEVICE_MEMBER IntOf<Float> encode_positive(Float x) {
        return nearest<Float>(clamped(x)) & ((1 << SIGN) - 1);
    }

    // Of the code of a finite number.
    template <typename Float>
    static HOST_DEVICE_MEMBER Float decode(IntOf<Float> code) {
        using Int = IntOf<Float>;
        const Int magnitude = code & ((1 << SIGN) - 1);
        const Float normal = float_of<Float>((magnitude << DROPPED) + ((127 - BIAS) << 23));
        const Float subnormal = Lanes<Float>::to_float(magnitude) * float_of<float>((128 - BIAS - MANTISSA) << 23);
        const Float x = magnitude >= (1 << MANTISSA) ? normal : subnormal;
        return float_of<Float>(bits_of(x) | ((code >> SIGN & 1) << 31));
    }
};

using E2M1 = MiniFloat<2, 1, 0x40c00000, 0x07>;  // 6
using E4M3 = MiniFloat<4, 3, 0x43e00000, 0x7f>;  // 448
using E5M2 = MiniFloat<5, 2, 0x47600000, 0x7f>;  // 57344

HOST_DEVICE float quiet_nan() { return float_of<float>(0x7fc00000); }

template <typename Float = float>
HOST_DEVICE Float decode_e4m3(IntOf<Float> code) {
    return (code & 0x7f) == 0x7f ? all<Float>(quiet_nan()) : E4M3::decode<Float>(code);
}

template <typename Float = float>
HOST_DEVICE Float decode_e5m2(IntOf<Float> code) {
    const Float infinity = float_of<Float>(((code & 0x80) << 24) | INFINITE);
    const Float beyond = (code & 0x7f) == 0x7c ? infinity : all<Float>(quiet_nan());
    return (code & 0x7f) < 0x7c ? E5M2::decode<Float>(code) : beyond;
}

// Powers of two from 2^-127 (0) to 2^127 (254); 255 is NaN. Rounds |x| up and saturates, zero included, as NVIDIA's cvt.rp.satfinite.
template <typename Float>
HOST_DEVICE IntOf<Float> encode_e8m0(Float x) {
    using Int = IntOf<Float>;
    const Int magnitude = smaller(magnitude_of(x), all<Int>(INFINITE));
    const Int rounded = magnitude < 0x00800000 ? (magnitude + 0x003fffff) >> 23 : (magnitude + 0x007fffff) >> 23;
    return magnitude_of(x) > INFINITE ? all<Int>(255) : smaller(rounded, all<Int>(254));
}

HOST_DEVICE float decode_e8m0(int32_t code) { return code == 255 ? quiet_nan() : float_of<float>(code ? code << 23 : 0x00400000); }
