// float32 or bfloat16 from NVFP4 codes and scales.

#include "nvfp4.h"

#include <new>

#include "strip.h"

namespace {

constexpr int64_t ROWS = 16;  // of a unit

struct Job {
    const uint8_t *codes, *scales;
    const float* amax;
    int64_t rows, blocks, rows_of_scale;
    Type type;
    void* out;
};


// LENGTH<Float> codes of 4 bits, the first in the lowest.
template <typename Float>
INLINE IntOf<Float> load_nibbles(const uint8_t* codes) {
    constexpr int COUNT = LENGTH<Float>;
    IntOf<Float> words, shifts;
    for (int i = 0; i < COUNT; ++i) {
        uint32_t word = 0;
        std::memcpy(&word, codes + i / 8 * 4, std::min(4, COUNT / 2));
        words[i] = static_cast<int32_t>(word);
        shifts[i] = i % 8 * 4;
    }
    return (words >> shifts) & 15;
}

template <int LANES>
INLINE void dequantize_unit(const Job& job, int64_t unit) {
    using Float = typename Vector<LANES>::Float;
    const float amax = *job.amax;
    for (int64_t row = unit * ROWS; row < std::min(job.rows, (unit + 1) * ROWS); ++row) {
        const uint8_t* codes = job.codes + row * job.blocks * 8;
        const uint8_t* scales = job.scales + row / job.rows_of_scale * job.blocks;
        for (int64_t b = 0; b < job.blocks; ++b) {
            const float factor = nvfp4::decoding_factor(scales[b], amax);
            for (int i = 0; i < nvfp4::BLOCK; i += LANES) {
                const Float x = E2M1::decode<Float>(load_nibbles<Float>(codes + b * 8 + i / 2)) * factor;
                store_as(job.type, job.out, (row * job.blocks + b) * nvfp4::BLOCK + i, x);
            }
        }
    }
}

VARIANTS(dequantize_unit, Job)

}  // namespace

// codes [rows, 8 blocks], scales [ceil(rows / rows_of_scale), blocks] -> out [rows, 16 blocks]; type: 0 float32, 1 bfloat16.
// instructions: "avx512", "avx2", "portable", or "" for the first of these that the CPU has. Returns a code of variants.h.
extern "C" int32_t nvfp4_dequantize(const uint8_t* codes, const uint8_t* scales, const float* amax, int64_t rows, int64_t blocks,
                                    int64_t rows_of_scale, int32_t type, void* out, int64_t threads, const char* instructions) try {
    const Job job{codes, scales, amax, rows, blocks, rows_of_scale, static_cast<Type>(type), out};
    return run_variant(dequantize_unit_variants(), instructions, job, (rows + ROWS - 1) / ROWS, threads);
} catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
}
