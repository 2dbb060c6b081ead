// AdamP (Heo et al., ICLR 2021, arXiv:2006.08217, algorithm 2) on float32 tensors in two passes over memory: 40 bytes a value.
//
// Pass 1 reads p, g, m, v and writes m, v and four sums of each row; the caller decides from the sums which rows are projected, and how
// far; pass 2 reads p, m, v and writes p. Both compute the update u from the moments, which costs less than storing it between them.
//
// No bit of the result depends on the number of threads or on the instruction set: sums run over 16 fixed lanes, blocks and tiles, which
// are added in their order in float64, and the build forbids contraction to fused multiply-adds.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#define INLINE static inline __attribute__((always_inline))

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

// Pass 1 on LANES values; adds the products to sums [SUMS, LANES]. All in one loop, so that roots and divisions overlap with the memory.
template <bool NESTEROV>
INLINE void moments_lanes(const Rule& rule, const float* __restrict p, const float* __restrict g, float* __restrict m,
                          float* __restrict v, float (*__restrict sums)[LANES]) {
    for (int64_t i = 0; i < LANES; ++i) {
        m[i] = rule.beta1 * m[i] + rule.one_minus_beta1 * g[i];
        v[i] = rule.beta2 * v[i] + rule.one_minus_beta2 * (g[i] * g[i]);
        sums[0][i] += g[i] * p[i];
        sums[1][i] += g[i] * g[i];
        sums[2][i] += p[i] * p[i];
        sums[3][i] += p[i] * update<NESTEROV>(rule, g[i], m[i], v[i]);
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

template <bool NESTEROV>
INLINE void moments_body(const Rule& rule, const Tile& t, double* sums) {
    std::fill(sums, sums + SUMS, 0.0);
    for (int64_t begin = 0; begin < t.size; begin += BLOCK) {
        const int64_t end = std::min(begin + BLOCK, t.size);
        float of_lanes[SUMS][LANES] = {};
        int64_t i = begin;
        for (; i + LANES <= end; i += LANES) {
            prefetch<true>(t, i);
            moments_lanes<NESTEROV>(rule, t.p + i, t.g + i, t.m + i, t.v + i, of_lanes);
        }
        if (i < end) {
            float p[LANES] = {}, g[LANES] = {}, m[LANES] = {}, v[LANES];
            std::fill(v, v + LANES, 1.0f);  // so that no lane without a value divides by zero
            std::copy(t.p + i, t.p + end, p);
            std::copy(t.g + i, t.g + end, g);
            std::copy(t.m + i, t.m + end, m);
            std::copy(t.v + i, t.v + end, v);
            moments_lanes<NESTEROV>(rule, p, g, m, v, of_lanes);
            std::copy(m, m + (end - i), t.m + i);
            std::copy(v, v + (end - i), t.v + i);
        }
        for (int64_t sum = 0; sum < SUMS; ++sum) sums[sum] += total(of_lanes[sum]);
    }
}

template <bool NESTEROV>
INLINE void update_body(const Rule& rule, const Tile& t, float coefficient, float decay, float step_size) {
    float* __restrict p = t.p;
    const auto change = [&](int64_t i) __attribute__((always_inline)) {
        p[i] = p[i] * decay - step_size * (update<NESTEROV>(rule, t.g[i], t.m[i], t.v[i]) - coefficient * p[i]);
    };
    int64_t begin = 0;
    for (; begin + LANES <= t.size; begin += LANES) {
        prefetch<NESTEROV>(t, begin);
        for (int64_t i = begin; i < begin + LANES; ++i) change(i);
    }
    for (int64_t i = begin; i < t.size; ++i) change(i);
}

// The same code for each instruction set; the loops are vectorized by the compiler.
#define VARIANT(NAME, TARGET)                                                                                             \
    TARGET void moments_##NAME(const Rule& rule, const Tile& t, double* sums) {                                            \
        rule.nesterov ? moments_body<true>(rule, t, sums) : moments_body<false>(rule, t, sums);                            \
    }                                                                                                                      \
    TARGET void update_##NAME(const Rule& rule, const Tile& t, float coefficient, float decay, float step_size) {          \
        rule.nesterov ? update_body<true>(rule, t, coefficient, decay, step_size)                                          \
                      : update_body<false>(rule, t, coefficient, decay, step_size);                                        \
    }

struct Variant {
    const char* name;
    bool runs_here;
    void (*moments)(const Rule&, const Tile&, double*);
    void (*update)(const Rule&, const Tile&, float, float, float);
};

VARIANT(portable, )
#if defined(__x86_64__)
VARIANT(avx2, __attribute__((target("avx2"))))
VARIANT(avx512, __attribute__((target("avx512f,prefer-vector-width=512"))))
#endif

// Finds the variant of that name, or the widest if the name is empty. False if this CPU cannot run it.
bool find_variant(const char* name, Variant* found) {
    const Variant variants[] = {
#if defined(__x86_64__)
        {"avx512", __builtin_cpu_supports("avx512f") != 0, moments_avx512, update_avx512},
        {"avx2", __builtin_cpu_supports("avx2") != 0, moments_avx2, update_avx2},
#endif
        {"portable", true, moments_portable, update_portable},
    };
    for (const Variant& candidate : variants) {
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
        std::atomic<int64_t> next{0};
        const auto loop = [&] {
            for (int64_t unit; (unit = next++) < units;) run_unit(backwards ? units - 1 - unit : unit, treat);
        };
        std::vector<std::thread> helpers;
        try {
            while (static_cast<int64_t>(helpers.size()) + 1 < std::min(threads, units)) helpers.emplace_back(loop);
        } catch (const std::system_error&) {
            // The system has no more threads: those that started do the work, with the same result.
        }
        loop();
        for (std::thread& helper : helpers) helper.join();
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

constexpr int32_t DONE = 0, OUT_OF_MEMORY = 1, NO_SUCH_INSTRUCTIONS = 2;

}  // namespace

// Both functions take `count` matrices of rows[n] x widths[n] contiguous values, and return DONE or one of the errors above.
// instructions: "avx512", "avx2", "portable", or "" for the first of these that the CPU has.

// Pass 1: moments of this step, and sums [all rows, 4] of g.p, g.g, p.p and p.u.
extern "C" int32_t adamp_moments_f32(
    int64_t count, const int64_t* rows, const int64_t* widths,
    float* const* p, float* const* g, float* const* m, float* const* v,
    double beta1, double beta2, double eps, double root_correction, int32_t nesterov, int64_t threads,
    const char* instructions, double* sums) try {
    Variant variant;
    if (!find_variant(instructions, &variant)) return NO_SUCH_INSTRUCTIONS;
    const Rule rule = make_rule(beta1, beta2, eps, root_correction, nesterov);
    const Work work(count, rows, widths);
    std::vector<double> of_tiles(work.tiles() * SUMS);
    work.run(threads, false, [&](int64_t n, int64_t, int64_t at, int64_t size, int64_t tile) {
        variant.moments(rule, {p[n] + at, g[n] + at, m[n] + at, v[n] + at, size}, &of_tiles[tile * SUMS]);
    });
    work.add_tiles(of_tiles, sums);
    return DONE;
} catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
}

// Pass 2: p <- p decays[n] - step_size (u - coefficients[row] p).
extern "C" int32_t adamp_update_f32(
    int64_t count, const int64_t* rows, const int64_t* widths,
    float* const* p, float* const* g, float* const* m, float* const* v,
    double beta1, double beta2, double eps, double root_correction, int32_t nesterov, int64_t threads,
    const char* instructions, const double* coefficients, const double* decays, double step_size) try {
    Variant variant;
    if (!find_variant(instructions, &variant)) return NO_SUCH_INSTRUCTIONS;
    const Rule rule = make_rule(beta1, beta2, eps, root_correction, nesterov);
    // Backwards, because what pass 1 touched last is still in the caches.
    Work(count, rows, widths).run(threads, true, [&](int64_t n, int64_t row, int64_t at, int64_t size, int64_t) {
        variant.update(rule, {p[n] + at, g[n] + at, m[n] + at, v[n] + at, size}, static_cast<float>(coefficients[row]),
                       static_cast<float>(decays[n]), static_cast<float>(step_size));
    });
    return DONE;
} catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
}
