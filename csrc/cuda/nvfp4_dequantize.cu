// float32 or bfloat16 from NVFP4 codes and scales, a block of 16 a thread.

#include "launch.h"
#include "nvfp4.h"

namespace {

constexpr int THREADS = 256;

template <typename T>
__global__ void __launch_bounds__(THREADS)
    dequantize(const uint2* codes, const uint8_t* scales, const float* amax, int64_t rows, int64_t blocks, int64_t rows_of_scale, T* out) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (at >= rows * blocks) return;
    const float factor = nvfp4::decoding_factor(scales[at / blocks / rows_of_scale * blocks + at % blocks], *amax);
    const uint32_t words[2] = {codes[at].x, codes[at].y};
    constexpr int PER = 16 / sizeof(T);
    UNROLL
    for (int i = 0; i < nvfp4::BLOCK; i += PER) {
        float v[PER];
        UNROLL
        for (int k = 0; k < PER; ++k) {
            const uint32_t code = words[(i + k) / 8] >> (4 * ((i + k) % 8)) & 15;
            v[k] = E2M1::decode<float>(static_cast<int32_t>(code)) * factor;
        }
        store_floats<PER>(out + at * nvfp4::BLOCK + i, v);
    }
}

}  // namespace

// Arguments as of csrc/cpu/nvfp4_dequantize.cpp, with a stream. Returns an error code of CUDA.
extern "C" int32_t nvfp4_dequantize(const uint8_t* codes, const uint8_t* scales, const float* amax, int64_t rows, int64_t blocks,
                                    int64_t rows_of_scale, int32_t type, void* out, void* stream) {
    return with_type(type, [&](auto number) {
        using T = decltype(number);
        const int64_t count = (rows * blocks + THREADS - 1) / THREADS;
        return launch(dequantize<T>, count, THREADS, 0, stream, reinterpret_cast<const uint2*>(codes), scales, amax, rows, blocks,
                      rows_of_scale, static_cast<T*>(out));
    });
}
