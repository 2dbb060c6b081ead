// As much of CUDA as the kernels of csrc/cuda need, on the CPU and compiled by g++: it shows what they compute, not how fast.
//
// The threads of a block are coroutines that take turns at every barrier and shuffle; blocks run one after another. All threads of a block
// have to meet the same barriers and shuffles, which the kernels do. Reading what another thread has not yet written gives a wrong result
// here too, because threads run far ahead of each other between barriers: in one order, and with `emulated_backwards` in the other.

#pragma once

#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __shared__
#define __launch_bounds__(...)

struct uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned x = 1) : x(x) {}
};

inline uint4 shared_memory[(228 << 10) / sizeof(uint4)];
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

extern "C" {
int emulated_backwards = 0;
}

namespace emulated {

constexpr size_t STACK = 64 << 10;
inline ucontext_t scheduler;
inline std::vector<ucontext_t> threads;
inline std::vector<char> stacks, finished;
inline std::vector<uint64_t> exchanged;
inline std::function<void()> body;

inline void run_thread() {
    body();
    finished[threadIdx.x] = 1;
}

inline void wait() {
    const unsigned self = threadIdx.x;
    swapcontext(&threads[self], &scheduler);
}

inline void run_block(unsigned count) {
    threads.assign(count, {});
    finished.assign(count, 0);
    exchanged.assign(count, 0);
    if (stacks.size() < count * STACK) stacks.resize(count * STACK);
    for (unsigned i = 0; i < count; ++i) {
        getcontext(&threads[i]);
        threads[i].uc_stack.ss_sp = &stacks[i * STACK];
        threads[i].uc_stack.ss_size = STACK;
        threads[i].uc_link = &scheduler;
        makecontext(&threads[i], run_thread, 0);
    }
    for (bool left = true; left;) {
        left = false;
        for (unsigned i = 0; i < count; ++i) {
            threadIdx = dim3(emulated_backwards ? count - 1 - i : i);
            if (finished[threadIdx.x]) continue;
            left = true;
            swapcontext(&scheduler, &threads[threadIdx.x]);
        }
    }
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait(); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    const unsigned self = threadIdx.x;
    memcpy(&emulated::exchanged[self], &value, sizeof value);
    emulated::wait();
    T other;
    memcpy(&other, &emulated::exchanged[self ^ static_cast<unsigned>(mask)], sizeof other);
    emulated::wait();
    return other;
}

inline int atomicMax(int* at, int value) {
    const int before = *at;
    *at = before < value ? value : before;
    return before;
}

using cudaError_t = int;
using cudaStream_t = void*;
constexpr int cudaSuccess = 0, cudaErrorInvalidValue = 1;
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int bytes) {
    return static_cast<size_t>(bytes) > sizeof shared_memory ? cudaErrorInvalidValue : cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), const Arguments&... arguments) {
    gridDim = config->gridDim;
    blockDim = config->blockDim;
    emulated::body = [&] { kernel(arguments...); };
    for (unsigned block = 0; block < config->gridDim.x; ++block) {
        blockIdx = dim3(block);
        memset(shared_memory, 0xa5, config->dynamicSmemBytes);  // whatever was there before
        emulated::run_block(config->blockDim.x);
    }
    return cudaSuccess;
}
