// Weights of 4 or 8 bits as numbers for a matrix product.
//
// Reads k bits / 8 + k / 8 bytes a row and writes 2 k: memory. With a few rows of activations, `gemv_codes` multiplies the
// codes where they are instead and spares the writing and the reading again.
//
// Launch of `dequantise`: grid (ceil(n * k / 8 / 256)), 256 threads. Of `gemv_codes`: grid (ceil(n / 8), ceil(m / 4)), 256
// threads: a warp has a column of the output and four rows of x, which it reads from a cache; k is a multiple of 32.
#include "../codes.cuh"

extern "C" __global__ void __launch_bounds__(256)
    dequantise(const uint8_t* codes, const uint32_t* levels, uint32_t bits, uint32_t n, Rows out) {
    const uint32_t C = out.width / 8;
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= size_t(n) * C) return;
    float x[8];
    weights8(codes, levels, bits, out.width, uint32_t(i / C), uint32_t(i % C), x);
    store8(out.type, out.data, i * 8, x);
}
KERNEL(dequantise)

// y = x W^T (+ bias, + y).
extern "C" __global__ void __launch_bounds__(256)
    gemv_codes(Rows x, uint32_t m, const uint8_t* codes, const uint32_t* levels, uint32_t bits, uint32_t n,
               const float* bias, uint32_t accumulate, Rows y) {
    const uint32_t lane = threadIdx.x % 32, column = blockIdx.x * 8 + threadIdx.x / 32, first = blockIdx.y * 4;
    const uint32_t rows = min_of(m - first, 4);
    float sums[4] = {};
    if (column < n) {
        for (uint32_t c = lane; 8 * c < x.width; c += 32) {
            float w[8], a[8];
            weights8(codes, levels, bits, x.width, column, c, w);
#pragma unroll
            for (uint32_t r = 0; r < 4; r++) {
                if (r >= rows) continue;
                load8(x.type, x.data, size_t(first + r) * x.width + 8 * c, a, threadIdx.x < 32);
#pragma unroll
                for (int j = 0; j < 8; j++) sums[r] = fmaf(a[j], w[j], sums[r]);
            }
        }
    }
#pragma unroll
    for (uint32_t r = 0; r < 4; r++) {
        float sum = sum_of(sums[r]);
        if (lane != r || r >= rows || column >= n) continue;
        if (bias != nullptr) sum += ld(bias + column);
        const size_t at = size_t(first + r) * y.width + column;
        store1(y.type, y.data, at, accumulate ? load1(y.type, y.data, at) + sum : sum);
    }
}
KERNEL(gemv_codes)
