// For test_minifloat.py: the encoders of csrc/common on lists of floats, for one float and for vectors of them, and NVIDIA's where the
// headers are at hand.

#include "lanes.h"
#include "minifloat.h"

#if defined(WITH_NVIDIA)
#include <cuda_fp4.h>
#include <cuda_fp8.h>
#endif

namespace {

template <typename Float>
INLINE IntOf<Float> encode(int32_t format, Float x) {
    return format == 0 ? E2M1::encode(x) : format == 1 ? E4M3::encode(x) : format == 2 ? E5M2::encode(x) : encode_e8m0(x);
}

template <typename Float>
INLINE void encode_all(int32_t format, const float* x, int64_t count, uint8_t* codes) {
    for (int64_t i = 0; i < count; i += LENGTH<Float>) store_narrow(codes + i, encode(format, load<Float>(x + i)));
}

}  // namespace

// format: 0 E2M1, 1 E4M3, 2 E5M2, 3 E8M0; count is a multiple of 16.
extern "C" void encode_scalars(int32_t format, const float* x, int64_t count, uint8_t* codes) {
    for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(encode(format, x[i]));
}

extern "C" void encode_vectors4(int32_t format, const float* x, int64_t count, uint8_t* codes) {
    encode_all<Vector<4>::Float>(format, x, count, codes);
}

extern "C" void encode_vectors16(int32_t format, const float* x, int64_t count, uint8_t* codes) {
    encode_all<Vector<16>::Float>(format, x, count, codes);
}

extern "C" void encode_stochastic(const float* x, const int32_t* random, int64_t count, uint8_t* codes) {
    for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(E2M1::encode_stochastic(x[i], random[i]));
}

extern "C" void decode(int32_t format, float* x) {
    for (int32_t code = 0; code < 256; ++code) {
        x[code] = format == 0   ? E2M1::decode<float>(code & 15)
                  : format == 1 ? decode_e4m3(code)
                  : format == 2 ? decode_e5m2(code)
                                : decode_e8m0(code);
    }
}

#if defined(WITH_NVIDIA)
extern "C" void encode_nvidia(int32_t format, const float* x, int64_t count, uint8_t* codes) {
    for (int64_t i = 0; i < count; ++i) {
        codes[i] = format == 0   ? __nv_cvt_float_to_fp4(x[i], __NV_E2M1, cudaRoundNearest)
                   : format == 3 ? __nv_cvt_float_to_e8m0(x[i], __NV_SATFINITE, cudaRoundPosInf)
                                 : __nv_cvt_float_to_fp8(x[i], __NV_SATFINITE, format == 1 ? __NV_E4M3 : __NV_E5M2);
    }
}
#endif
