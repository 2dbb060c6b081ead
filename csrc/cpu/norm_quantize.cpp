// RMSNorm and SSNorm (rms.h) whose result is quantized at once, while it is in the cache: to FP8 (E4M3) in blocks of 1 x 128, or to NVFP4
// in blocks of 1 x 16. The bits are those of norm.cpp followed by fp8_quantize.cpp or nvfp4_quantize.cpp.

#include "fp8.h"
#include "nvfp4.h"
#include "rms.h"

#include <new>

namespace {

constexpr int64_t ROWS = 64;  // of a unit
constexpr int LINE = 128;     // values that are normalized and quantized together
constexpr int BLOCKS = LINE / nvfp4::BLOCK;

struct Job {
    NormInput in;
    bool to_nvfp4;
    float tensor_scale;  // of NVFP4
    bool power_of_two;   // scales of FP8
    uint8_t* codes;
    void* scales;
    float* amax;  // of the blocks of FP8
};

int64_t blocks_of(int64_t values, int64_t of_block) { return (values + of_block - 1) / of_block; }

// The largest magnitudes of COUNT normalized values, by lanes.
template <Type TYPE, int COUNT, typename Float>
INLINE IntOf<Float> largest_of(const void* line, int64_t at) {
    IntOf<Float> largest{};
    for (int i = 0; i < COUNT; i += LENGTH<Float>) largest = larger(largest, magnitude_of(load_as<Float>(TYPE, line, at + i)));
    return largest;
}

// Leading codes of a line, four vectors at a time, which are given to `store`. factors[i] is of the values from WIDTH i on.
template <typename Format, bool WITHIN, Type TYPE, int WIDTH, typename Float, typename Store>
INLINE void encode_line(const void* line, const float* factors, Store store) {
    constexpr int LANES = LENGTH<Float>;
    for (int at = 0; at < LINE; at += 4 * LANES) {
        IntOf<Float> codes[4];
        for (int k = 0; k < 4; ++k) {
            const int i = at + k * LANES;
            codes[k] = Format::template encode_leading<WITHIN>(load_as<Float>(TYPE, line, i) * factors[i / WIDTH]);
        }
        store(at, codes);
    }
}

template <Type TYPE, typename Float>
INLINE void quantize_to_fp8(const Job& job, const void* line, int64_t row, int64_t begin, int64_t count) {
    const int64_t at = row * blocks_of(job.in.width, LINE) + begin / LINE;
    const float amax = float_of<float>(largest_lane(largest_of<TYPE, LINE, Float>(line, 0)));
    const float factor = fp8::encoding_factor(amax, 448.0f, job.power_of_two);
    job.amax[at] = amax;
    static_cast<float*>(job.scales)[at] = fp8::decoding_scale(amax, factor);
    uint8_t bytes[LINE], *const into = job.codes + row * job.in.width + begin, *const to = count < LINE ? bytes : into;
    const auto keep = [to](int place, const IntOf<Float>* codes) __attribute__((always_inline)) { store_bytes(to + place, codes); };
    if (magnitude_of(amax * factor) < E4M3::BEYOND) {
        encode_line<E4M3, true, TYPE, LINE, Float>(line, &factor, keep);
    } else {
        encode_line<E4M3, false, TYPE, LINE, Float>(line, &factor, keep);
    }
    if (count < LINE) std::memcpy(into, bytes, count);
}

// Scale codes and encoding factors of the blocks of a line. Returns whether its codes need no clamping.
template <Type TYPE, typename Float>
INLINE bool scales_of(const void* line, float tensor_scale, uint8_t* scales, float* factors) {
    constexpr int LANES = LENGTH<Float>;
    IntOf<Float> beyond{};
    for (int first = 0; first < BLOCKS; first += LANES) {
        IntOf<Float> largest[LANES] = {};
        for (int k = 0; k < std::min(LANES, BLOCKS); ++k) {
            largest[k] = largest_of<TYPE, nvfp4::BLOCK, Float>(line, (first + k) * nvfp4::BLOCK);
        }
        const Float amax = float_of<Float>(largest_lanes<LANES / 2>(largest));
        const IntOf<Float> scale = nvfp4::block_scale(amax, tensor_scale);
        const Float factor = nvfp4::encoding_factor<Float>(scale, tensor_scale);
        beyond = larger(beyond, magnitude_of(amax * factor));
        store(factors + first, factor);
        store_narrow(scales + first, scale);
    }
    return largest_lane(beyond) < E2M1::BEYOND;
}

template <Type TYPE, typename Float>
INLINE void quantize_to_nvfp4(const Job& job, const void* line, int64_t row, int64_t begin, int64_t count) {
    constexpr int PADDED = std::max(BLOCKS, LENGTH<Float>);
    const int64_t across = blocks_of(job.in.width, nvfp4::BLOCK), blocks = blocks_of(count, nvfp4::BLOCK);
    const int64_t at = row * across + begin / nvfp4::BLOCK;
    uint8_t scales[PADDED];
    float factors[PADDED];
    const bool within = scales_of<TYPE, Float>(line, job.tensor_scale, scales, factors);
    std::memcpy(static_cast<uint8_t*>(job.scales) + at, scales, blocks);
    uint8_t bytes[LINE / 2], *const into = job.codes + at * nvfp4::BLOCK / 2, *const to = blocks < BLOCKS ? bytes : into;
    const auto keep = [to](int place, const IntOf<Float>* codes) __attribute__((always_inline)) { store_nibbles(to + place / 2, codes); };
    if (within) {
        encode_line<E2M1, true, TYPE, nvfp4::BLOCK, Float>(line, factors, keep);
    } else {
        encode_line<E2M1, false, TYPE, nvfp4::BLOCK, Float>(line, factors, keep);
    }
    if (blocks < BLOCKS) std::memcpy(into, bytes, blocks * nvfp4::BLOCK / 2);
}

template <Type TYPE, bool ONE_GAIN, typename Float>
INLINE void quantize_rows(const Job& job, int64_t unit) {
    const NormInput& in = job.in;
    for (int64_t row = unit * ROWS; row < std::min(in.rows, (unit + 1) * ROWS); ++row) {
        const void* const values = prepared_row<TYPE, Float>(in, row);
        const float inverse_rms = inverse_rms_of<TYPE, Float>(in, values);
        for (int64_t begin = 0; begin < in.width; begin += LINE) {
            const int64_t count = std::min<int64_t>(LINE, in.width - begin);
            alignas(64) char line[LINE * SIZE_OF<TYPE>];
            if (count < LINE) std::memset(line, 0, sizeof line);
            for (int64_t at = 0; at < count; at += BLOCK) {
                const int64_t here = std::min<int64_t>(BLOCK, count - at);
                Float parts[PARTS<Float>];
                normalized_block<TYPE, ONE_GAIN>(in, values, inverse_rms, begin + at, here, parts);
                store_block<TYPE>(line, at, here, parts);
            }
            job.to_nvfp4 ? quantize_to_nvfp4<TYPE, Float>(job, line, row, begin, count)
                         : quantize_to_fp8<TYPE, Float>(job, line, row, begin, count);
        }
    }
}

template <int LANES>
INLINE void quantize_unit(const Job& job, int64_t unit) {
    using Float = typename Vector<LANES>::Float;
    if (job.in.type == Type::FLOAT32) {
        job.in.one_gain ? quantize_rows<Type::FLOAT32, true, Float>(job, unit) : quantize_rows<Type::FLOAT32, false, Float>(job, unit);
    } else {
        job.in.one_gain ? quantize_rows<Type::BFLOAT16, true, Float>(job, unit) : quantize_rows<Type::BFLOAT16, false, Float>(job, unit);
    }
}

VARIANTS(quantize_unit, Job)

}  // namespace

// x, residual, sum, weight, eps: as of rms_norm in norm.cpp. tensor_amax null: power_of_two, codes [rows, width], scales and amax
// [rows, ceil(width / 128)] as of the rows of fp8_quantize; else codes [rows, 8 blocks] and scales uint8 [rows, blocks] of nvfp4_quantize.
// instructions: "avx512", "avx2", "portable", or "" for the first of these that the CPU has. Returns a code of variants.h.
extern "C" int32_t rms_norm_quantize(const void* x, int64_t stride, const void* residual, int64_t residual_stride, int32_t type,
                                     int64_t rows, int64_t width, const float* weight, int32_t one_gain, float eps, void* sum,
                                     const float* tensor_amax, int32_t power_of_two, uint8_t* codes, void* scales, float* amax,
                                     int64_t threads, const char* instructions) try {
    const Type values = static_cast<Type>(type);
    const auto lanes = arranged(weight, one_gain != 0, values, width);
    const Job job{{{x, stride}, {residual, residual_stride}, sum, values, rows, width, lanes.get(), one_gain != 0, eps},
                  tensor_amax != nullptr, tensor_amax == nullptr ? 1.0f : nvfp4::tensor_scale(*tensor_amax), power_of_two != 0,
                  codes, scales, amax};
    return run_variant(quantize_unit_variants(), instructions, job, (rows + ROWS - 1) / ROWS, threads);
} catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
}
