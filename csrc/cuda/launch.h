// How kernels are launched, and what numbers they read and write.

#pragma once

#include <cuda_runtime.h>

#include "host_device.h"

#if defined(__CUDACC__)
#define DEVICE __device__ __forceinline__
#else
#define DEVICE inline
#endif

extern __shared__ uint4 shared_memory[];

template <typename Shared>
DEVICE Shared& shared_as() {
    return *reinterpret_cast<Shared*>(shared_memory);
}

// Returns an error code of CUDA.
template <typename... Parameters, typename... Arguments>
int32_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared, void* stream, const Arguments&... arguments) {
    if (blocks == 0) return cudaSuccess;
    if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)))
        return error;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared;
    config.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

struct Bfloat16 {
    uint16_t bits;
};

DEVICE float value_of(float x) { return x; }
DEVICE float value_of(Bfloat16 x) { return float_of_bfloat16(x.bits); }

template <typename T>
DEVICE T as(float x);
template <>
DEVICE float as<float>(float x) {
    return x;
}
template <>
DEVICE Bfloat16 as<Bfloat16>(float x) {
    return {static_cast<uint16_t>(bfloat16_of(x))};
}

template <typename T>
DEVICE float rounded_to(float x) {
    return value_of(as<T>(x));
}

// Calls `use` with a number of the type that has this number in the C interface.
template <typename Use>
int32_t with_type(int32_t type, const Use& use) {
    return type == 0 ? use(float{}) : use(Bfloat16{});
}

// COUNT numbers from or to memory that is aligned to 16 bytes, or to their size if that is less.
template <int COUNT, typename T>
struct alignas(COUNT * sizeof(T) < 16 ? COUNT * sizeof(T) : 16) Pack {
    T values[COUNT];
};

template <int COUNT, typename T>
DEVICE void load_floats(const T* from, float* v) {
    const auto pack = *reinterpret_cast<const Pack<COUNT, T>*>(from);
    UNROLL
    for (int i = 0; i < COUNT; ++i) v[i] = value_of(pack.values[i]);
}

template <int COUNT, typename T>
DEVICE void store_floats(T* to, const float* v) {
    Pack<COUNT, T> pack;
    UNROLL
    for (int i = 0; i < COUNT; ++i) pack.values[i] = as<T>(v[i]);
    *reinterpret_cast<Pack<COUNT, T>*>(to) = pack;
}
