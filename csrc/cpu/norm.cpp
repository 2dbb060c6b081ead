// RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467, equation 4) and SSNorm (Park et al. 2025, arXiv:2506.19697), which has one gain for
// all channels, with an optional residual that is added first; forward and backward.
//
// No bit depends on the number of threads or on the instruction set: sums of a row run over 32 lanes. The gradients of the weights are
// summed in the order of rows: of 8 rows in float32, of 8 such sums in float32, of these in float64. That of one gain is a sum of a number
// for each row, in float64.

#include "rms.h"

#include <new>

namespace {

constexpr int64_t SEGMENT = 512;  // values of a row whose products are summed in float32 lanes
constexpr int64_t RUN = 8;        // rows whose gradients of the weights are summed before they are added to those of the unit
constexpr int64_t ROWS = 64;      // of a unit
constexpr int64_t COLUMNS = 256;  // of a unit of sums over units

struct Job {
    NormInput in;
    void* y;
    float* inverse_rms;
};

template <Type TYPE, bool ONE_GAIN, typename Float>
INLINE void normalize_rows(const Job& job, int64_t unit) {
    const NormInput& in = job.in;
    for (int64_t row = unit * ROWS; row < std::min(in.rows, (unit + 1) * ROWS); ++row) {
        const void* const values = prepared_row<TYPE, Float>(in, row);
        const float inverse_rms = job.inverse_rms[row] = inverse_rms_of<TYPE, Float>(in, values);
        for (int64_t at = 0; at < in.width; at += BLOCK) {
            const int64_t count = std::min<int64_t>(BLOCK, in.width - at);
            Float parts[PARTS<Float>];
            normalized_block<TYPE, ONE_GAIN>(in, values, inverse_rms, at, count, parts);
            store_block<TYPE>(job.y, row * in.width + at, count, parts);
        }
    }
}

template <int LANES>
INLINE void normalize_unit(const Job& job, int64_t unit) {
    using Float = typename Vector<LANES>::Float;
    if (job.in.type == Type::FLOAT32) {
        job.in.one_gain ? normalize_rows<Type::FLOAT32, true, Float>(job, unit) : normalize_rows<Type::FLOAT32, false, Float>(job, unit);
    } else {
        job.in.one_gain ? normalize_rows<Type::BFLOAT16, true, Float>(job, unit) : normalize_rows<Type::BFLOAT16, false, Float>(job, unit);
    }
}

VARIANTS(normalize_unit, Job)

struct BackwardJob {
    NormInput in;
    Rows grad, grad_sum;  // of the result; of x + residual if that is used elsewhere
    const float* inverse_rms;
    void* grad_x;
    float* of_channels;  // [units, 2, lanes] gradients of the weights, summed over the unit and over a run; or null
    double* of_gain;     // [units]
};

// Sum of x * grad * weight over a row, or with one gain of x * grad: all that the gradients of the row's scale and of the gain need.
template <Type TYPE, bool ONE_GAIN, typename Float>
INLINE double product_of(const BackwardJob& job, const void* x, const void* grad) {
    double sum = 0;
    for (int64_t begin = 0; begin < job.in.width; begin += SEGMENT) {
        const int64_t end = std::min(job.in.width, begin + SEGMENT);
        Float sums[PARTS<Float>] = {};
        for (int64_t at = begin; at < end; at += BLOCK) {
            const int64_t count = std::min<int64_t>(BLOCK, end - at);
            Float values[PARTS<Float>], grads[PARTS<Float>], weights[PARTS<Float>];
            load_block<TYPE>(x, at, count, values);
            load_block<TYPE>(grad, at, count, grads);
            if (!ONE_GAIN) load_weights<false>(job.in, at, weights);
            UNROLL
            for (int i = 0; i < PARTS<Float>; ++i) sums[i] += values[i] * (ONE_GAIN ? grads[i] : grads[i] * weights[i]);
        }
        sum += total(sums);
    }
    return sum;
}

// grad_x = grad * weight / rms - x * slope (+ grad_sum). One gain is applied last, so that terms that cancel are not rounded with it. To
// `of_run`, if it is wanted, is added grad * x / rms.
template <Type TYPE, bool ONE_GAIN, typename Float>
INLINE void differentiate_row(const BackwardJob& job, int64_t row, float* of_run, double* of_gain) {
    const NormInput& in = job.in;
    const void *x = row_of<TYPE>(in.x, row), *grad = row_of<TYPE>(job.grad, row), *grad_sum = row_of<TYPE>(job.grad_sum, row);
    const double inverse = job.inverse_rms[row], product = product_of<TYPE, ONE_GAIN, Float>(job, x, grad);
    if (ONE_GAIN) *of_gain += product * inverse;
    const float factor = job.inverse_rms[row], slope = static_cast<float>(product * inverse * inverse * inverse / in.width);
    for (int64_t at = 0; at < in.width; at += BLOCK) {
        const int64_t count = std::min<int64_t>(BLOCK, in.width - at);
        Float values[PARTS<Float>], grads[PARTS<Float>], weights[PARTS<Float>];
        load_block<TYPE>(x, at, count, values);
        load_block<TYPE>(grad, at, count, grads);
        load_weights<ONE_GAIN>(in, at, weights);
        if (!ONE_GAIN && of_run != nullptr) {
            UNROLL
            for (int i = 0; i < PARTS<Float>; ++i) {
                float* lanes = of_run + at + i * LENGTH<Float>;
                store(lanes, load<Float>(lanes) + grads[i] * (values[i] * factor));
            }
        }
        UNROLL
        for (int i = 0; i < PARTS<Float>; ++i) {
            const Float direct = (ONE_GAIN ? grads[i] : grads[i] * weights[i]) * factor, difference = direct - values[i] * slope;
            values[i] = ONE_GAIN ? difference * weights[i] : difference;
        }
        if (grad_sum != nullptr) {
            load_block<TYPE>(grad_sum, at, count, grads);
            UNROLL
            for (int i = 0; i < PARTS<Float>; ++i) values[i] += grads[i];
        }
        store_block<TYPE>(job.grad_x, row * in.width + at, count, values);
    }
}

template <Type TYPE, bool ONE_GAIN, typename Float>
INLINE void differentiate_rows(const BackwardJob& job, int64_t unit) {
    const int64_t lanes = lanes_of(job.in.width), end = std::min(job.in.rows, (unit + 1) * ROWS);
    float* const of_unit = job.of_channels == nullptr ? nullptr : job.of_channels + unit * 2 * lanes;
    float* const of_run = of_unit == nullptr ? nullptr : of_unit + lanes;
    if (of_unit != nullptr) std::fill(of_unit, of_unit + 2 * lanes, 0.0f);
    double of_gain = 0;
    for (int64_t row = unit * ROWS; row < end; ++row) {
        differentiate_row<TYPE, ONE_GAIN, Float>(job, row, of_run, &of_gain);
        if (of_run == nullptr || ((row + 1) % RUN != 0 && row + 1 < end)) continue;
        for (int64_t i = 0; i < lanes; ++i) of_unit[i] += of_run[i];
        std::fill(of_run, of_run + lanes, 0.0f);
    }
    if (ONE_GAIN) job.of_gain[unit] = of_gain;
}

template <int LANES>
INLINE void differentiate_unit(const BackwardJob& job, int64_t unit) {
    using Float = typename Vector<LANES>::Float;
    if (job.in.type == Type::FLOAT32) {
        job.in.one_gain ? differentiate_rows<Type::FLOAT32, true, Float>(job, unit)
                        : differentiate_rows<Type::FLOAT32, false, Float>(job, unit);
    } else {
        job.in.one_gain ? differentiate_rows<Type::BFLOAT16, true, Float>(job, unit)
                        : differentiate_rows<Type::BFLOAT16, false, Float>(job, unit);
    }
}

VARIANTS(differentiate_unit, BackwardJob)

struct SumJob {
    const float* parts;  // [count, 2, lanes], of which the first are summed
    int64_t count, width;
    Type type;
    float* sums;  // [width]
};

template <int LANES>
INLINE void sum_unit(const SumJob& job, int64_t unit) {
    const int64_t lanes = lanes_of(job.width), begin = unit * COLUMNS, columns = std::min(COLUMNS, lanes - begin);
    double sums[COLUMNS] = {};
    for (int64_t part = 0; part < job.count; ++part) {
        const float* line = job.parts + part * 2 * lanes + begin;
        for (int64_t i = 0; i < columns; ++i) sums[i] += line[i];
    }
    for (int64_t i = begin; i < std::min(job.width, begin + COLUMNS); ++i) {
        job.sums[i] = static_cast<float>(sums[lane_of(job.type, i) - begin]);
    }
}

VARIANTS(sum_unit, SumJob)

int64_t units_of(int64_t values, int64_t of_unit) { return (values + of_unit - 1) / of_unit; }

}  // namespace

// Of both functions: x [rows, width] with rows `stride` values apart; type: 0 float32, 1 bfloat16, of all but what is float below.
// weight [width], or of one gain [1].
// instructions: "avx512", "avx2", "portable", or "" for the first of these that the CPU has. Returns a code of variants.h.

// residual [rows, width] or null; sum: x + residual, rounded; null without residual. y [rows, width]: with r = 1 / sqrt(mean(x^2) + eps) of
// each row, x r, rounded, times the weight, rounded. inverse_rms [rows]: r.
extern "C" int32_t rms_norm(const void* x, int64_t stride, const void* residual, int64_t residual_stride, int32_t type, int64_t rows,
                            int64_t width, const float* weight, int32_t one_gain, float eps, void* y, void* sum, float* inverse_rms,
                            int64_t threads, const char* instructions) try {
    const Type values = static_cast<Type>(type);
    const auto lanes = arranged(weight, one_gain != 0, values, width);
    const Job job{{{x, stride}, {residual, residual_stride}, sum, values, rows, width, lanes.get(), one_gain != 0, eps}, y, inverse_rms};
    return run_variant(normalize_unit_variants(), instructions, job, units_of(rows, ROWS), threads);
} catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
}

// x: x + residual where there is one; grad: of y; grad_sum: of x + residual, or null; inverse_rms: of rms_norm.
// grad_x [rows, width], rounded once; grad_weight of the weight's shape, or null.
extern "C" int32_t rms_norm_backward(const void* x, int64_t stride, const void* grad, int64_t grad_stride, const void* grad_sum,
                                     int64_t grad_sum_stride, int32_t type, int64_t rows, int64_t width, const float* weight,
                                     int32_t one_gain, const float* inverse_rms, void* grad_x, float* grad_weight, int64_t threads,
                                     const char* instructions) try {
    const Type values = static_cast<Type>(type);
    const int64_t units = units_of(rows, ROWS);
    const bool by_channels = grad_weight != nullptr && one_gain == 0;
    const auto lanes = arranged(weight, one_gain != 0, values, width);
    const std::unique_ptr<float[]> of_channels(by_channels ? new float[units * 2 * lanes_of(width)] : nullptr);
    const std::unique_ptr<double[]> of_gain(one_gain ? new double[units] : nullptr);
    const BackwardJob job{{{x, stride}, {nullptr, 0}, nullptr, values, rows, width, lanes.get(), one_gain != 0, 0},
                          {grad, grad_stride}, {grad_sum, grad_sum_stride}, inverse_rms, grad_x, of_channels.get(), of_gain.get()};
    const int32_t code = run_variant(differentiate_unit_variants(), instructions, job, units, threads);
    if (code != DONE || grad_weight == nullptr) return code;
    if (by_channels) {
        const SumJob sums{of_channels.get(), units, width, values, grad_weight};
        return run_variant(sum_unit_variants(), instructions, sums, units_of(width, COLUMNS), threads);
    }
    double sum = 0;
    for (int64_t unit = 0; unit < units; ++unit) sum += of_gain[unit];
    *grad_weight = static_cast<float>(sum);
    return DONE;
} catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
}
