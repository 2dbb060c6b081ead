// Hadamard transforms of orders b 2^k of float32 or bfloat16, row by row in a buffer of float32.
//
// Up to four stages in a pass, so that values are loaded and stored once for 16 sums; the first pass also does the stages within vectors.
// The order of the additions is that of the definition: distances 1, 2, 4 ... in the 2^k neighbours, then the columns of the small matrix.

#include <new>

#include "lanes.h"

namespace {

constexpr int64_t LARGEST_ORDER = 32768, UNIT = 32768;  // values that a thread takes at a time

// Vectors of a pass at most: caches of eight ways hold no more at distances of a power of two. Where one pass is enough, it may have twice
// as many.
constexpr int64_t MOST = 8;

struct Job {
    const void* x;
    void* out;
    Type type;
    int64_t rows, order, base;
    const uint32_t* negatives;
    float scale;
    const float* signs;  // null if there are none
    int64_t sign_count;
};

// Where values of a pass come from.
enum class From { X, SIGNED_X, BUFFER };

// `size` values from `begin` on in stages of distances step, 2 step ... < COUNT step, where step is a multiple of the length of a vector.
// Those from x have the stages within vectors before; LAST puts them into out. Between passes they lie in v.
template <From FROM, bool LAST, int COUNT, typename Float>
INLINE void pass(const Job& job, int64_t begin, int64_t size, int64_t step, float* v) {
    const float* signs = FROM == From::SIGNED_X ? job.signs + begin % job.sign_count : nullptr;
    for (int64_t group = 0; group < size; group += COUNT * step) {
        const int64_t sign_begin = LAST ? group : 0;  // of many rows in one pass, each has the same signs
        for (int64_t at = group; at < group + step; at += LENGTH<Float>) {
            Float part[COUNT];
            for (int i = 0; i < COUNT; ++i) {
                if (FROM != From::BUFFER) {
                    part[i] = load_as<Float>(job.type, job.x, begin + at + i * step);
                    if (FROM == From::SIGNED_X) part[i] *= load<Float>(signs + (at - sign_begin) + i * step);
                    part[i] = butterflies(part[i]);
                } else {
                    part[i] = load<Float>(v + at + i * step);
                }
            }
            butterflies<COUNT>(part);
            for (int i = 0; i < COUNT; ++i) {
                if (LAST) {
                    store_as(job.type, job.out, begin + at + i * step, part[i] * job.scale);
                } else {
                    store(v + at + i * step, part[i]);
                }
            }
        }
    }
}

template <From FROM, bool LAST, typename Float>
INLINE void pass_of(int64_t count, const Job& job, int64_t begin, int64_t size, int64_t step, float* v) {
    constexpr bool FIRST = FROM != From::BUFFER;
    // Only what happens is compiled.
    if constexpr (FIRST) {
        if (count == 1) return pass<FROM, LAST, 1, Float>(job, begin, size, step, v);
    }
    if constexpr (FIRST && LAST) {
        if (count > MOST) return pass<FROM, LAST, 2 * MOST, Float>(job, begin, size, step, v);
    }
    switch (count) {
        case 2: return pass<FROM, LAST, 2, Float>(job, begin, size, step, v);
        case 4: return pass<FROM, LAST, 4, Float>(job, begin, size, step, v);
        default: return pass<FROM, LAST, MOST, Float>(job, begin, size, step, v);
    }
}

// Transforms of 2^k >= a vector of `size` values from `begin` on, in as few passes as there have to be; into out if `finish`, else v.
template <From FROM, typename Float>
INLINE void transform_powers(const Job& job, int64_t begin, int64_t size, int64_t power, bool finish, float* v) {
    int64_t step = LENGTH<Float>, count = std::min(MOST, power / step);
    if (finish && power <= 2 * MOST * step) return pass_of<FROM, true, Float>(power / step, job, begin, size, step, v);
    pass_of<FROM, false, Float>(count, job, begin, size, step, v);
    while ((step *= count) < power) {
        const int64_t left = power / step;
        count = left == 2 * MOST ? MOST / 2 : std::min(MOST, left);  // rather 4 x 4 than 8 x 2
        if (finish && count == left) return pass_of<From::BUFFER, true, Float>(count, job, begin, size, step, v);
        pass_of<From::BUFFER, false, Float>(count, job, begin, size, step, v);
    }
}

template <typename Float>
INLINE void transform_powers(const Job& job, int64_t begin, int64_t size, int64_t power, bool finish, float* v) {
    job.signs == nullptr ? transform_powers<From::X, Float>(job, begin, size, power, finish, v)
                         : transform_powers<From::SIGNED_X, Float>(job, begin, size, power, finish, v);
}

// The same for 2^k shorter than a vector, into v.
INLINE void transform_few(const Job& job, int64_t begin, int64_t size, int64_t power, float* v) {
    const float* signs = job.signs != nullptr ? job.signs + begin % job.sign_count : nullptr;
    for (int64_t i = 0; i < size; ++i) v[i] = load_one(job.type, job.x, begin + i) * (signs != nullptr ? signs[i] : 1.0f);
    for (int64_t distance = 1; distance < power; distance *= 2) {
        for (int64_t i = 0; i < size; ++i) {
            if (i & distance) continue;
            const float a = v[i], b = v[i + distance];
            v[i] = a + b;
            v[i + distance] = a - b;
        }
    }
}

// COUNT vectors of the small matrix times the rows [base, power] of v, from column i on; scaled and rounded.
template <int COUNT, typename Float>
INLINE void multiply_columns(const Job& job, int64_t begin, int64_t power, int64_t i, const float* v) {
    for (int64_t row = 0; row < job.base; ++row) {
        Float total[COUNT];
        for (int k = 0; k < COUNT; ++k) {
            const Float part = load<Float>(v + i + k * LENGTH<Float>);
            total[k] = job.negatives[row] & 1 ? -part : part;
        }
        for (int64_t j = 1; j < job.base; ++j) {
            const float* parts = v + j * power + i;
            if (job.negatives[row] >> j & 1) {
                for (int k = 0; k < COUNT; ++k) total[k] -= load<Float>(parts + k * LENGTH<Float>);
            } else {
                for (int k = 0; k < COUNT; ++k) total[k] += load<Float>(parts + k * LENGTH<Float>);
            }
        }
        for (int k = 0; k < COUNT; ++k) store_as(job.type, job.out, begin + row * power + i + k * LENGTH<Float>, total[k] * job.scale);
    }
}

template <typename Float>
INLINE void multiply_base(const Job& job, int64_t begin, int64_t power, const float* v) {
    int64_t i = 0;
    for (; i + 8 * LENGTH<Float> <= power; i += 8 * LENGTH<Float>) multiply_columns<8, Float>(job, begin, power, i, v);
    for (; i + LENGTH<Float> <= power; i += LENGTH<Float>) multiply_columns<1, Float>(job, begin, power, i, v);
    for (; i < power; ++i) {
        for (int64_t row = 0; row < job.base; ++row) {
            float total = job.negatives[row] & 1 ? -v[i] : v[i];
            for (int64_t j = 1; j < job.base; ++j) {
                total = job.negatives[row] >> j & 1 ? total - v[j * power + i] : total + v[j * power + i];
            }
            store_one(job.type, job.out, begin + row * power + i, total * job.scale);
        }
    }
}

int64_t rows_of_unit(const Job& job) { return std::max<int64_t>(1, UNIT / job.order); }

template <int LANES>
INLINE void transform_unit(const Job& job, int64_t unit) {
    using Float = typename Vector<LANES>::Float;
    alignas(64) float v[LARGEST_ORDER];
    const int64_t power = job.order / job.base, first = unit * rows_of_unit(job);
    const int64_t last = std::min(job.rows, first + rows_of_unit(job));
    const bool same_signs = job.signs == nullptr || job.sign_count == job.order;
    if (job.base == 1 && power >= LANES && power <= 2 * MOST * LANES && same_signs) {
        return transform_powers<Float>(job, first * job.order, (last - first) * job.order, power, true, v);  // all rows in one pass
    }
    for (int64_t begin = first * job.order; begin < last * job.order; begin += job.order) {
        if (power >= LANES) {
            transform_powers<Float>(job, begin, job.order, power, job.base == 1, v);
        } else {
            transform_few(job, begin, job.order, power, v);
        }
        if (job.base > 1 || power < LANES) multiply_base<Float>(job, begin, power, v);
    }
}

VARIANTS(transform_unit, Job)

}  // namespace

// x, out [rows, order] contiguous; type: 0 float32, 1 bfloat16. order = base 2^k <= 32768, base <= 28; bit j of negatives[i] is set where
// the small matrix has -1 in row i, column j. signs [sign_count] or null are repeated over the whole of x.
// instructions: "avx512", "avx2", "portable", or "" for the first of these that the CPU has. Returns a code of variants.h.
extern "C" int32_t hadamard(const void* x, int32_t type, int64_t rows, int64_t order, int64_t base, const uint32_t* negatives, float scale,
                            const float* signs, int64_t sign_count, void* out, int64_t threads, const char* instructions) try {
    const Job job{x, out, static_cast<Type>(type), rows, order, base, negatives, scale, signs, sign_count};
    return run_variant(transform_unit_variants(), instructions, job, (rows + rows_of_unit(job) - 1) / rows_of_unit(job), threads);
} catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
}
