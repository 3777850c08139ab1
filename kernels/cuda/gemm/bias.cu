// y[r] = bias, or y[r] += bias, of the first n numbers of every row: what a product then adds itself to, where cuBLASLt
// takes no bias in single precision beside results of another type.
//
// Writes each number once (reads it, too, where it adds); n floats of bias, which the caches hold. Memory.
//
// Launch: grid (ceil(rows n / 256)), 256 threads.
#include "../common.cuh"

extern "C" __global__ void __launch_bounds__(256) bias_rows(Rows y, uint32_t rows, uint32_t n, const float* bias, uint32_t accumulate) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= size_t(rows) * n) return;
    const size_t row = i / n, column = i % n, at = row * y.width + column;
    const float add = ld_same(bias + column, row == 0);
    store1(y.type, y.data, at, accumulate ? load1(y.type, y.data, at) + add : add);
}
KERNEL(bias_rows)
