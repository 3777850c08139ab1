// Root-mean-square norms: x / sqrt(mean(x^2) + eps) * weight.
//
// Reads and writes each number once (and the output before, where it is added to); three FLOPs a number. Memory. Rows of up
// to 4 x 8 x threads numbers stay in registers between the sum and the product; longer ones are read twice, the second time
// from a cache.
//
// Launch of `rms_norm`: grid (rows), 128 threads up to a width of 4,096, else 256; 64 bytes of shared memory. Of `qk_norm`:
// grid (ceil(rows * heads * lanes / 128)), 128 threads, for `lanes` 8, 16 or 32 that hold a head of 8 channels each.
#include "cache.cuh"

extern "C" __global__ void __launch_bounds__(256)
    rms_norm(Rows in, const void* weight, uint32_t weight_type, float eps, uint32_t accumulate, Rows out) {
    SHARED(float, memory);
    const size_t from = size_t(blockIdx.x) * in.width, to = size_t(blockIdx.x) * out.width;
    float held[HELD][8], squares = 0.0f;
    row_seen(in, from, held, [&](const float* x) {
#pragma unroll
        for (int j = 0; j < 8; j++) squares = fmaf(x[j], x[j], squares);
    });
    const float factor = 1.0f / sqrtf(block_sum(squares, memory) / float(in.width) + eps);
    row_again(in, from, held, [&](uint32_t c, const float* x) {
        float w[8], y[8] = {};
        load8(weight_type, weight, 8 * c, w, blockIdx.x == 0);
        if (accumulate) load8(out.type, out.data, to + 8 * c, y);
#pragma unroll
        for (int j = 0; j < 8; j++) y[j] = accumulate ? y[j] + x[j] * factor * w[j] : x[j] * factor * w[j];
        store8(out.type, out.data, to + 8 * c, y);
    });
}
KERNEL(rms_norm)

// In place, for each of `heads` heads from column `offset` of every row.
extern "C" __global__ void __launch_bounds__(128)
    qk_norm(Rows qkv, uint32_t rows, uint32_t offset, uint32_t heads, uint32_t dim, const void* weight,
            uint32_t weight_type, float eps) {
    const uint32_t lanes = lanes_of(dim), all = blockIdx.x * blockDim.x + threadIdx.x;
    const uint32_t head = all / lanes, c = all % lanes;
    const bool mine = head < rows * heads && 8 * c < dim;
    const size_t at = size_t(head / heads) * qkv.width + offset + head % heads * dim + 8 * c;
    float x[8] = {}, w[8], squares = 0.0f;
    if (mine) load8(qkv.type, qkv.data, at, x);
#pragma unroll
    for (int j = 0; j < 8; j++) squares = fmaf(x[j], x[j], squares);
    squares = sum_of(squares, lanes);
    if (!mine) return;
    load8(weight_type, weight, 8 * c, w, head == 0);
    const float factor = 1.0f / sqrtf(squares / float(dim) + eps);
#pragma unroll
    for (int j = 0; j < 8; j++) x[j] = x[j] * factor * w[j];
    store8(qkv.type, qkv.data, at, x);
}
KERNEL(qk_norm)
