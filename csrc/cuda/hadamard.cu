// Hadamard transforms of orders b 2^k of float32 or bfloat16 in shared memory, up to four stages in a pass.
//
// A block of threads takes one row, or as many as fit into 4096 values. The order of the additions is that of the definition: distances
// 1, 2, 4 ... in the 2^k neighbours, then the columns of the small matrix.

#include "butterflies.h"
#include "launch.h"

namespace {

constexpr int64_t UNIT = 4096;  // values that a block of threads takes at least
constexpr int LARGEST_BASE = 28, MOST = 16, FEW_THREADS = 256, MANY_THREADS = 1024;

template <typename T>
struct Job {
    const T* x;
    T* out;
    int64_t rows;
    int order, power;
    bool aligned;  // whether x begins at a multiple of 16 bytes
    float scale;
    const float* signs;  // null if there are none
    int64_t sign_count;
    uint32_t negatives[LARGEST_BASE];
};

// Where value j lies: a gap after every 16, so that threads a power of two apart use different banks.
DEVICE float& value(int j) { return reinterpret_cast<float*>(shared_memory)[j + j / 16]; }

// The stages of distances below COUNT, from x.
template <int COUNT, typename T>
DEVICE void first_pass(const Job<T>& job, int64_t begin, int size) {
    for (int j = threadIdx.x * COUNT; j < size; j += blockDim.x * COUNT) {
        float v[COUNT];
        if (job.aligned) {
            load_floats<COUNT>(job.x + begin + j, v);
        } else {
            UNROLL
            for (int i = 0; i < COUNT; ++i) v[i] = value_of(job.x[begin + j + i]);
        }
        if (job.signs != nullptr) {
            const float* signs = job.signs + (begin + j) % job.sign_count;
            UNROLL
            for (int i = 0; i < COUNT; ++i) v[i] *= signs[i];
        }
        butterflies<COUNT>(v);
        UNROLL
        for (int i = 0; i < COUNT; ++i) value(j + i) = v[i];
    }
}

// The stages of distances step, 2 step ... < COUNT step.
template <int COUNT>
DEVICE void next_pass(int size, int step) {
    for (int item = threadIdx.x; item < size / COUNT; item += blockDim.x) {
        const int j = item / step * step * COUNT + item % step;
        float v[COUNT];
        UNROLL
        for (int i = 0; i < COUNT; ++i) v[i] = value(j + i * step);
        butterflies<COUNT>(v);
        UNROLL
        for (int i = 0; i < COUNT; ++i) value(j + i * step) = v[i];
    }
}

template <typename T>
DEVICE void transform_powers(const Job<T>& job, int64_t begin, int size) {
    switch (job.power < MOST ? job.power : MOST) {
        case 1: first_pass<1>(job, begin, size); break;
        case 2: first_pass<2>(job, begin, size); break;
        case 4: first_pass<4>(job, begin, size); break;
        case 8: first_pass<8>(job, begin, size); break;
        default: first_pass<MOST>(job, begin, size);
    }
    __syncthreads();
    for (int step = MOST; step < job.power; step *= MOST) {
        switch (job.power / step) {
            case 1: break;
            case 2: next_pass<2>(size, step); break;
            case 4: next_pass<4>(size, step); break;
            case 8: next_pass<8>(size, step); break;
            default: next_pass<MOST>(size, step);
        }
        __syncthreads();
    }
}

// Scaled and rounded, two values at a time. A unit begins at an even place.
template <typename T>
DEVICE void store_values(const Job<T>& job, int64_t begin, int size) {
    for (int j = threadIdx.x * 2; j < size; j += blockDim.x * 2) {
        const float pair[2] = {value(j) * job.scale, j + 1 < size ? value(j + 1) * job.scale : 0.0f};
        if (j + 1 < size) {
            store_floats<2>(job.out + begin + j, pair);
        } else {
            job.out[begin + j] = as<T>(pair[0]);
        }
    }
}

// The same of the small matrix times the rows [BASE, power].
template <int BASE, typename T>
DEVICE void multiply_base(const Job<T>& job, int64_t begin, int size) {
    for (int item = threadIdx.x; item < size / BASE; item += blockDim.x) {
        const int first = item / job.power * job.order + item % job.power;
        float parts[BASE];
        UNROLL
        for (int j = 0; j < BASE; ++j) parts[j] = value(first + j * job.power);
#pragma unroll 1
        for (int i = 0; i < BASE; ++i) {
            const uint32_t negatives = job.negatives[i];
            float total = negatives & 1 ? -parts[0] : parts[0];
#pragma unroll
            for (int j = 1; j < BASE; ++j) total += negatives >> j & 1 ? -parts[j] : parts[j];
            job.out[begin + first + i * job.power] = as<T>(total * job.scale);
        }
    }
}

HOST_DEVICE int64_t rows_of_unit(int order) { return order < UNIT ? UNIT / order : 1; }

template <typename T, int BASE>
__global__ void __launch_bounds__(MANY_THREADS) transform(const Job<T> job) {
    const int64_t rows = rows_of_unit(job.order), first = blockIdx.x * rows, begin = first * job.order;
    const int size = static_cast<int>(smaller(rows, job.rows - first)) * job.order;
    transform_powers(job, begin, size);
    if constexpr (BASE == 1) {
        store_values(job, begin, size);
    } else {
        multiply_base<BASE>(job, begin, size);
    }
}

template <typename T>
auto kernel_of(int64_t base) {
    return base == 1 ? transform<T, 1> : base == 12 ? transform<T, 12> : base == 20 ? transform<T, 20> : transform<T, LARGEST_BASE>;
}

}  // namespace

// Arguments as of csrc/cpu/hadamard.cpp, with a stream; base is 1, 12, 20 or 28, negatives in the memory of the host. Returns an error code
// of CUDA.
extern "C" int32_t hadamard(const void* x, int32_t type, int64_t rows, int64_t order, int64_t base, const uint32_t* negatives, float scale,
                            const float* signs, int64_t sign_count, void* out, void* stream) {
    return with_type(type, [&](auto number) {
        using T = decltype(number);
        Job<T> job{static_cast<const T*>(x), static_cast<T*>(out), rows, static_cast<int>(order), static_cast<int>(order / base),
                   reinterpret_cast<uintptr_t>(x) % 16 == 0, scale, signs, sign_count, {}};
        memcpy(job.negatives, negatives, base * sizeof(uint32_t));
        const int64_t unit = rows_of_unit(job.order), size = unit * order;
        const int threads = size <= UNIT ? FEW_THREADS : MANY_THREADS;
        return launch(kernel_of<T>(base), (rows + unit - 1) / unit, threads, (size + size / 16 + 1) * sizeof(float), stream, job);
    });
}
