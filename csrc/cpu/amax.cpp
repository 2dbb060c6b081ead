// Largest magnitude of a matrix, and of its 16-point Hadamard transforms along and across rows, from one read.

#include "strip.h"

#include <new>

namespace {

constexpr int64_t STRIPS = 16;  // of a unit

struct Job {
    Matrix x;
    const float *row_signs, *column_signs;
    std::atomic<int32_t>*row_amax, *column_amax;  // bits of a float
};

int64_t tiles_across(const Job& job) { return (job.x.columns + WIDTH - 1) / WIDTH; }

INLINE void raise(std::atomic<int32_t>& largest, int32_t candidate) {
    int32_t seen = largest.load();
    while (seen < candidate && !largest.compare_exchange_weak(seen, candidate)) continue;
}

template <int LANES>
INLINE void largest_of_unit(const Job& job, int64_t unit) {
    const int64_t first = unit / tiles_across(job) * STRIPS, column = unit % tiles_across(job) * WIDTH;
    using Float = typename Vector<LANES>::Float;
    int32_t of_rows = 0, of_columns = 0;
    Strip strip, changed;
    for (int64_t row = first * HEIGHT; row < std::min(job.x.rows, (first + STRIPS) * HEIGHT); row += HEIGHT) {
        load_strip<Float>(job.x, row, column, strip);
        if (job.row_amax != nullptr) {
            if (job.row_signs != nullptr) transform_rows<16, Float>(job.x.type, job.row_signs, strip, changed);
            const Strip& seen = job.row_signs != nullptr ? changed : strip;
            of_rows = larger(of_rows, row_magnitude<Float>(&seen.values[0][0], HEIGHT * WIDTH));
        }
        if (job.column_amax != nullptr) {
            if (job.column_signs != nullptr) transform_columns<16, Float>(job.x.type, job.column_signs, &strip, &changed);
            const Strip& seen = job.column_signs != nullptr ? changed : strip;
            of_columns = larger(of_columns, row_magnitude<Float>(&seen.values[0][0], HEIGHT * WIDTH));
        }
    }
    if (job.row_amax != nullptr) raise(*job.row_amax, of_rows);
    if (job.column_amax != nullptr) raise(*job.column_amax, of_columns);
}

VARIANTS(largest_of_unit, Job)

}  // namespace

// x [rows, columns] contiguous; type: 0 float32, 1 bfloat16. row_amax is that of x, or of its transform along rows if row_signs [16] are
// not null; column_amax that of x, or of its transform along columns. Either amax may be null. NaN is larger than infinity.
// instructions: "avx512", "avx2", "portable", or "" for the first of these that the CPU has. Returns a code of variants.h.
extern "C" int32_t amax(const void* x, int32_t type, int64_t rows, int64_t columns, const float* row_signs, const float* column_signs,
                        float* row_amax, float* column_amax, int64_t threads, const char* instructions) try {
    std::atomic<int32_t> of_rows{0}, of_columns{0};
    const Job job{{x, static_cast<Type>(type), rows, columns}, row_signs, column_signs, row_amax ? &of_rows : nullptr,
                  column_amax ? &of_columns : nullptr};
    const int64_t units = (rows + STRIPS * HEIGHT - 1) / (STRIPS * HEIGHT) * tiles_across(job);
    const int32_t code = run_variant(largest_of_unit_variants(), instructions, job, units, threads);
    if (row_amax != nullptr) *row_amax = float_of<float>(of_rows);
    if (column_amax != nullptr) *column_amax = float_of<float>(of_columns);
    return code;
} catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
}
