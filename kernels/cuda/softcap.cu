// x becomes cap * tanh(x / cap), in place.
//
// Reads and writes each number once. Memory.
//
// Launch: grid (ceil(count / 8 / 256)), 256 threads; the last few numbers go one by one.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256) softcap(void* data, uint32_t type, uint64_t count, float cap) {
    const size_t at = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    if (at >= count) return;
    if (at + 8 <= count) {
        float x[8];
        load8(type, data, at, x);
#pragma unroll
        for (int j = 0; j < 8; j++) x[j] = cap * tanhf(x[j] / cap);
        store8(type, data, at, x);
    } else {
        for (size_t i = at; i < count; i++) store1(type, data, i, cap * tanhf(load1(type, data, i) / cap));
    }
}
KERNEL(softcap)
