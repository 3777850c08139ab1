// CUDA on a CPU, for tests: the threads of a block are fibers of one thread, and every access to memory is checked and
// counted. What it shows: missing and divergent barriers, deadlock, accesses outside of buffers and shared memory, vectors
// that are not aligned, dependence on the order of threads and blocks, bytes moved. What it does not: races between
// blocks that run at once, limits of a launch, speed.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __launch_bounds__(...)

struct Dim {
    unsigned x, y, z;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

// Of the fiber that runs.
extern thread_local Dim threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

struct Buffer {
    uintptr_t begin, end;
    uint64_t writable;
};

// How a test launches a kernel; the layout is known to the tests.
struct Launch {
    uint32_t grid[3];
    uint32_t block, shared_bytes;
    uint32_t order;  // 0: forward, 1: backward, else the seed of a shuffle
    const Buffer* buffers;  // sorted by address
    uint64_t buffer_count;
    uint64_t loaded, stored;  // bytes; results
    char error[248];          // empty if none; result
};

using Body = void (*)(void** arguments);
void run(Launch* launch, Body body, void** arguments);
void barrier(int line);
// Lanes of a warp show each other up to 64 bytes; the returned array has 64 bytes for each of 32 lanes.
const unsigned char* exchange(const void* own, size_t bytes, int line);
unsigned char* shared();
void check(const void* p, size_t bytes, bool writes, bool counts);

template <class... A, size_t... I>
void apply(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::decay_t<A>*>(arguments[I])...);
}
template <class... A>
void apply(void (*kernel)(A...), void** arguments) {
    apply(kernel, arguments, std::index_sequence_for<A...>{});
}
// Bytes of argument i, 0 behind the last one.
template <class... A>
size_t argument_bytes(void (*)(A...), size_t i) {
    const size_t sizes[] = {sizeof(A)..., 0};
    return i < sizeof...(A) ? sizes[i] : 0;
}

template <class T>
T of_lane(T value, unsigned lane, int line) {
    static_assert(sizeof(T) <= 64);
    const unsigned char* all = exchange(&value, sizeof(T), line);
    T result;
    std::memcpy(&result, all + lane * 64, sizeof(T));
    return result;
}

inline unsigned lane() { return threadIdx.x % 32; }

template <class T>
T down(T value, unsigned by, int line) {
    return of_lane(value, lane() + by < 32 ? lane() + by : lane(), line);
}

inline unsigned ballot(bool vote, int line) {
    unsigned char own = vote;
    const unsigned char* all = exchange(&own, 1, line);
    unsigned bits = 0;
    for (unsigned i = 0; i < 32; i++) bits |= unsigned(all[i * 64]) << i;
    return bits;
}

}  // namespace shim

// Makes a kernel known under its name: an entry that takes a launch and an argument vector as `cuLaunchKernel` does.
#define KERNEL(name)                                                                                   \
    extern "C" void launch_##name(shim::Launch* launch, void** arguments) {                            \
        shim::run(launch, [](void** a) { shim::apply(name, a); }, arguments);                          \
    }                                                                                                  \
    extern "C" size_t bytes_##name(size_t i) { return shim::argument_bytes(name, i); }
#define DEVICE static inline
#define SHARED(type, name) type* name = reinterpret_cast<type*>(shim::shared())

#define __syncthreads() shim::barrier(__LINE__)
#define __syncwarp() (void)shim::exchange("", 1, __LINE__)
#define __shfl_sync(mask, value, from) shim::of_lane(value, (from) % 32u, __LINE__)
#define __shfl_xor_sync(mask, value, by) shim::of_lane(value, shim::lane() ^ (by), __LINE__)
#define __shfl_down_sync(mask, value, by) shim::down(value, by, __LINE__)
#define __ballot_sync(mask, vote) shim::ballot(vote, __LINE__)

template <class T>
T ld(const T* p) {
    shim::check(p, sizeof(T), false, true);
    return *p;
}
template <class T>
T ld_same(const T* p, bool first) {
    shim::check(p, sizeof(T), false, first);
    return *p;
}
template <class T>
void st(T* p, T value) {
    shim::check(p, sizeof(T), true, true);
    *p = value;
}
// Fibers take turns, so plain additions are atomic.
template <class T>
T atomicAdd(T* p, T value) {
    T old = *p;
    *p = old + value;
    return old;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline float __uint_as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }

float half_to_float(uint16_t bits);
uint16_t float_to_half(float x);
// d += a b for 16 x 8 += 16 x 16 by 16 x 8 numbers of 16 bits, held by the lanes of a warp as `mma.m16n8k16` says.
void mma_16816(float d[4], const unsigned a[4], const unsigned b[2], bool brain);
void ldmatrix_transposed(unsigned b[2], const uint16_t* row);
