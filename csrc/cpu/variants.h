// One source, compiled for each instruction set and run by threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#define INLINE static inline __attribute__((always_inline))

constexpr int32_t DONE = 0, OUT_OF_MEMORY = 1, NO_SUCH_INSTRUCTIONS = 2;

template <typename Job>
struct Variant {
    const char* name;
    bool runs_here;
    void (*run)(const Job&, int64_t unit);
};

// Defines NAME_variants(), the functions that treat one unit of a JOB, the widest first, from an INLINE template NAME<LANES>(job, unit).
#if defined(__x86_64__)
#define VARIANTS(NAME, JOB)                                                                                                            \
    void NAME##_portable(const JOB& job, int64_t unit) { NAME<4>(job, unit); }                                                         \
    __attribute__((target("avx2"))) void NAME##_avx2(const JOB& job, int64_t unit) { NAME<8>(job, unit); }                             \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))) void NAME##_avx512(const JOB& job,           \
                                                                                                             int64_t unit) {           \
        NAME<16>(job, unit);                                                                                                           \
    }                                                                                                                                  \
    std::vector<Variant<JOB>> NAME##_variants() {                                                                                      \
        const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&                                 \
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");                                  \
        return {{"avx512", avx512, NAME##_avx512},                                                                                     \
                {"avx2", __builtin_cpu_supports("avx2") != 0, NAME##_avx2},                                                            \
                {"portable", true, NAME##_portable}};                                                                                  \
    }
#else
#define VARIANTS(NAME, JOB)                                                    \
    void NAME##_portable(const JOB& job, int64_t unit) { NAME<4>(job, unit); } \
    std::vector<Variant<JOB>> NAME##_variants() { return {{"portable", true, NAME##_portable}}; }
#endif

// Calls treat(unit) once for every unit, in any order.
template <typename Treat>
void run_units(int64_t units, int64_t threads, const Treat& treat) {
    std::atomic<int64_t> next{0};
    const auto loop = [&] {
        for (int64_t unit; (unit = next++) < units;) treat(unit);
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

// The same with the variant of that name, or with the widest that the CPU can run if the name is empty.
template <typename Job>
int32_t run_variant(const std::vector<Variant<Job>>& variants, const char* name, const Job& job, int64_t units, int64_t threads) {
    const auto fits = [&](const Variant<Job>& v) { return v.runs_here && (*name == '\0' || std::strcmp(name, v.name) == 0); };
    const auto found = std::find_if(variants.begin(), variants.end(), fits);
    if (found == variants.end()) return NO_SUCH_INSTRUCTIONS;
    run_units(units, threads, [&](int64_t unit) { found->run(job, unit); });
    return DONE;
}
