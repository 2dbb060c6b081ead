// AdamP (Heo et al., ICLR 2021, arXiv:2006.08217, algorithm 2) on float32 tensors, in one or two passes over memory.
//
// Pass 1 reads p, g, m, v and writes m, v and four sums of each row; if asked, it also changes p as if nothing was projected. The caller
// decides from the sums which rows are projected, and how far. Pass 2 reads p, m, v and writes p, only of rows that have to change.
//
// Both passes compute the update u from the moments, which takes less memory, and no more time, than storing it between them.
//
// No bit of the result depends on the number of threads or on the instruction set: sums run over 16 fixed lanes, blocks and tiles, which
// are added in their order in float64, and the build forbids contraction to fused multiply-adds.

#include <cmath>
#include <new>

#include "variants.h"

namespace {

constexpr int64_t LANES = 16;
constexpr int64_t BLOCK = 1024;   // values summed in float32 before they are added to the float64 sums
constexpr int64_t TILE = 16384;   // values of a row that one thread treats in one go
constexpr int64_t AHEAD = 256;
constexpr int64_t UNIT = 65536;   // values, about, that a thread takes at a time
constexpr int64_t SUMS = 4;       // of a row: g.p, g.g, p.p, p.u

struct Rule {
    float beta1, one_minus_beta1, beta2, one_minus_beta2, eps, inverse_root;
    bool nesterov;
};

// p <- p + growth p + slope u
struct Change {
    float growth, slope;
    bool nothing() const { return growth == 0 && slope == 0; }
};

struct Tile {
    float* p;
    const float* g;
    float* m;
    float* v;
    int64_t size;
};

template <bool NESTEROV>
INLINE float update(const Rule& rule, float g, float m, float v) {
    const float numerator = NESTEROV ? rule.beta1 * m + rule.one_minus_beta1 * g : m;
    return numerator / (sqrtf(v) * rule.inverse_root + rule.eps);
}

// Asks for what will be needed AHEAD values later: the hardware stops looking ahead at every border of a page, which rows often are.
template <bool GRADIENT>
INLINE void prefetch(const Tile& t, int64_t i) {
    __builtin_prefetch(t.p + i + AHEAD);
    if (GRADIENT) __builtin_prefetch(t.g + i + AHEAD);
    __builtin_prefetch(t.m + i + AHEAD);
    __builtin_prefetch(t.v + i + AHEAD);
}

INLINE float changed(const Change& change, float p, float u) { return p + (change.growth * p + change.slope * u); }

// Pass 1 on LANES values; adds the products to sums [SUMS, LANES]. All in one loop, so that roots and divisions overlap with the memory.
template <bool NESTEROV, bool CHANGE>
INLINE void first_lanes(const Rule& rule, const Change& change, float* __restrict p, const float* __restrict g, float* __restrict m,
                        float* __restrict v, float (*__restrict sums)[LANES]) {
    for (int64_t i = 0; i < LANES; ++i) {
        m[i] = rule.beta1 * m[i] + rule.one_minus_beta1 * g[i];
        v[i] = rule.beta2 * v[i] + rule.one_minus_beta2 * (g[i] * g[i]);
        const float u = update<NESTEROV>(rule, g[i], m[i], v[i]);
        sums[0][i] += g[i] * p[i];
        sums[1][i] += g[i] * g[i];
        sums[2][i] += p[i] * p[i];
        sums[3][i] += p[i] * u;
        if (CHANGE) p[i] = changed(change, p[i], u);
    }
}

INLINE double total(const float* of_lanes) {
    double sums[LANES];
    for (int64_t lane = 0; lane < LANES; ++lane) sums[lane] = of_lanes[lane];
    for (int64_t width = LANES / 2; width > 0; width /= 2) {
        for (int64_t lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
    }
    return sums[0];
}

template <bool NESTEROV, bool CHANGE>
INLINE void first_body(const Rule& rule, const Change& change, const Tile& t, double* sums) {
    std::fill(sums, sums + SUMS, 0.0);
    for (int64_t begin = 0; begin < t.size; begin += BLOCK) {
        const int64_t end = std::min(begin + BLOCK, t.size);
        float of_lanes[SUMS][LANES] = {};
        int64_t i = begin;
        for (; i + LANES <= end; i += LANES) {
            prefetch<true>(t, i);
            first_lanes<NESTEROV, CHANGE>(rule, change, t.p + i, t.g + i, t.m + i, t.v + i, of_lanes);
        }
        if (i < end) {
            float p[LANES] = {}, g[LANES] = {}, m[LANES] = {}, v[LANES];
            std::fill(v, v + LANES, 1.0f);  // so that no lane without a value divides by zero
            std::copy(t.p + i, t.p + end, p);
            std::copy(t.g + i, t.g + end, g);
            std::copy(t.m + i, t.m + end, m);
            std::copy(t.v + i, t.v + end, v);
            first_lanes<NESTEROV, CHANGE>(rule, change, p, g, m, v, of_lanes);
            if (CHANGE) std::copy(p, p + (end - i), t.p + i);
            std::copy(m, m + (end - i), t.m + i);
            std::copy(v, v + (end - i), t.v + i);
        }
        for (int64_t sum = 0; sum < SUMS; ++sum) sums[sum] += total(of_lanes[sum]);
    }
}

template <bool NESTEROV>
INLINE void first_of(const Rule& rule, const Change& change, const Tile& t, double* sums) {
    change.nothing() ? first_body<NESTEROV, false>(rule, change, t, sums) : first_body<NESTEROV, true>(rule, change, t, sums);
}

template <bool NESTEROV>
INLINE void second_body(const Rule& rule, const Change& change, const Tile& t) {
    float *__restrict p = t.p, *__restrict m = t.m, *__restrict v = t.v;
    const auto treat = [&](int64_t i) __attribute__((always_inline)) {
        p[i] = changed(change, p[i], update<NESTEROV>(rule, t.g[i], m[i], v[i]));
    };
    int64_t begin = 0;
    for (; begin + LANES <= t.size; begin += LANES) {
        prefetch<NESTEROV>(t, begin);
        for (int64_t i = begin; i < begin + LANES; ++i) treat(i);
    }
    for (int64_t i = begin; i < t.size; ++i) treat(i);
}

// The same code for each instruction set; the loops are vectorized by the compiler.
#define VARIANT(NAME, TARGET)                                                                                              \
    TARGET void first_##NAME(const Rule& rule, const Change& change, const Tile& t, double* sums) {                        \
        rule.nesterov ? first_of<true>(rule, change, t, sums) : first_of<false>(rule, change, t, sums);                    \
    }                                                                                                                      \
    TARGET void second_##NAME(const Rule& rule, const Change& change, const Tile& t) {                                     \
        rule.nesterov ? second_body<true>(rule, change, t) : second_body<false>(rule, change, t);                          \
    }

struct Passes {
    const char* name;
    bool runs_here;
    void (*first)(const Rule&, const Change&, const Tile&, double*);
    void (*second)(const Rule&, const Change&, const Tile&);
};

VARIANT(portable, )
#if defined(__x86_64__)
VARIANT(avx2, __attribute__((target("avx2"))))
VARIANT(avx512, __attribute__((target("avx512f,prefer-vector-width=512"))))
#endif

// Finds the variant of that name, or the widest if the name is empty. False if this CPU cannot run it.
bool find_variant(const char* name, Passes* found) {
    const Passes variants[] = {
#if defined(__x86_64__)
        {"avx512", __builtin_cpu_supports("avx512f") != 0, first_avx512, second_avx512},
        {"avx2", __builtin_cpu_supports("avx2") != 0, first_avx2, second_avx2},
#endif
        {"portable", true, first_portable, second_portable},
    };
    for (const Passes& candidate : variants) {
        if (candidate.runs_here && (*name == '\0' || std::strcmp(name, candidate.name) == 0)) {
            *found = candidate;
            return true;
        }
    }
    return false;
}

// Matrices as lists of rows, rows as tiles, tiles in units of work. Vectors are one row.
class Work {
public:
    Work(int64_t count, const int64_t* rows, const int64_t* widths) : rows_(rows), widths_(widths) {
        for (int64_t n = 0; n < count; ++n) {
            row_begin_.push_back(row_begin_.back() + rows[n]);
            tile_begin_.push_back(tile_begin_.back() + rows[n] * tiles_a_row(n));
            unit_begin_.push_back(unit_begin_.back() + (rows[n] * tiles_a_row(n) + tiles_a_unit(n) - 1) / tiles_a_unit(n));
        }
    }

    int64_t tiles() const { return tile_begin_.back(); }

    // Calls treat(matrix, row over all matrices, offset in the matrix, size, tile over all matrices) for every tile, from the last
    // to the first if `backwards`.
    template <typename Treat>
    void run(int64_t threads, bool backwards, const Treat& treat) const {
        const int64_t units = unit_begin_.back();
        run_units(units, threads, [&](int64_t unit) { run_unit(backwards ? units - 1 - unit : unit, treat); });
    }

    // Adds the sums of the tiles of each row, in their order.
    void add_tiles(const std::vector<double>& of_tiles, double* of_rows) const {
        const double* tile = of_tiles.data();
        for (size_t n = 0; n + 1 < row_begin_.size(); ++n) {
            for (int64_t row = row_begin_[n]; row < row_begin_[n + 1]; ++row) {
                std::fill(of_rows + row * SUMS, of_rows + (row + 1) * SUMS, 0.0);
                for (int64_t t = 0; t < tiles_a_row(n); ++t, tile += SUMS) {
                    for (int64_t sum = 0; sum < SUMS; ++sum) of_rows[row * SUMS + sum] += tile[sum];
                }
            }
        }
    }

private:
    int64_t tiles_a_row(int64_t n) const { return (widths_[n] + TILE - 1) / TILE; }
    int64_t tiles_a_unit(int64_t n) const { return std::max<int64_t>(1, UNIT / std::min(TILE, std::max<int64_t>(1, widths_[n]))); }

    template <typename Treat>
    void run_unit(int64_t unit, const Treat& treat) const {
        const int64_t n = std::upper_bound(unit_begin_.begin(), unit_begin_.end(), unit) - unit_begin_.begin() - 1;
        const int64_t tiles = rows_[n] * tiles_a_row(n), first = (unit - unit_begin_[n]) * tiles_a_unit(n);
        for (int64_t tile = first; tile < std::min(tiles, first + tiles_a_unit(n)); ++tile) {
            const int64_t row = tile / tiles_a_row(n), column = tile % tiles_a_row(n) * TILE;
            treat(n, row_begin_[n] + row, row * widths_[n] + column, std::min(TILE, widths_[n] - column), tile_begin_[n] + tile);
        }
    }

    const int64_t *rows_, *widths_;
    std::vector<int64_t> row_begin_{0}, tile_begin_{0}, unit_begin_{0};
};

Rule make_rule(double beta1, double beta2, double eps, double root_correction, int32_t nesterov) {
    const auto f = [](double x) { return static_cast<float>(x); };
    return {f(beta1), f(1 - beta1), f(beta2), f(1 - beta2), f(eps), f(1 / root_correction), nesterov != 0};
}

}  // namespace

// Both functions take `count` matrices of rows[n] x widths[n] contiguous values, and return a code of variants.h.
// instructions: "avx512", "avx2", "portable", or "" for the first of these that the CPU has.

// Pass 1: moments of this step, and sums [all rows, 4] of g.p, g.g, p.p and p.u before p <- p + growth p + slope u; p stays if both are 0.
extern "C" int32_t adamp_first_f32(
    int64_t count, const int64_t* rows, const int64_t* widths,
    float* const* p, float* const* g, float* const* m, float* const* v,
    double beta1, double beta2, double eps, double root_correction, int32_t nesterov, int64_t threads,
    const char* instructions, double growth, double slope, double* sums) try {
    Passes variant;
    if (!find_variant(instructions, &variant)) return NO_SUCH_INSTRUCTIONS;
    const Rule rule = make_rule(beta1, beta2, eps, root_correction, nesterov);
    const Change change{static_cast<float>(growth), static_cast<float>(slope)};
    const Work work(count, rows, widths);
    std::vector<double> of_tiles(work.tiles() * SUMS);
    work.run(threads, false, [&](int64_t n, int64_t, int64_t at, int64_t size, int64_t tile) {
        variant.first(rule, change, {p[n] + at, g[n] + at, m[n] + at, v[n] + at, size}, &of_tiles[tile * SUMS]);
    });
    work.add_tiles(of_tiles, sums);
    return DONE;
} catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
}

// Pass 2: p <- p + growth p + slope u with changes [all rows, 2] of growth and slope. Rows whose two are 0 are not touched.
extern "C" int32_t adamp_second_f32(
    int64_t count, const int64_t* rows, const int64_t* widths,
    float* const* p, float* const* g, float* const* m, float* const* v,
    double beta1, double beta2, double eps, double root_correction, int32_t nesterov, int64_t threads,
    const char* instructions, const double* changes) try {
    Passes variant;
    if (!find_variant(instructions, &variant)) return NO_SUCH_INSTRUCTIONS;
    const Rule rule = make_rule(beta1, beta2, eps, root_correction, nesterov);
    // Backwards, because what pass 1 touched last is still in the caches.
    Work(count, rows, widths).run(threads, true, [&](int64_t n, int64_t row, int64_t at, int64_t size, int64_t) {
        const Change change{static_cast<float>(changes[2 * row]), static_cast<float>(changes[2 * row + 1])};
        if (!change.nothing()) variant.second(rule, change, {p[n] + at, g[n] + at, m[n] + at, v[n] + at, size});
    });
    return DONE;
} catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
}
