// Products of e4m3 numbers, which devices from 8.9 on have: a scale for each row of activations and for each row of weights
// (a column of the result), so that what a row comes to depends on itself alone.
//
// `narrow_rows`: out[r] = x[r] / s[r] in e4m3, s[r] = largest |x[r]| / 448; a row of zeros has the scale 0. Reads each number once
// (rows of up to 4 x 8 x threads numbers stay in registers, longer ones are read again, from a cache) and writes a byte of it and four
// of the scale. `scale_rows`: y[r] = sums[r] s[r] w (+ bias, + y): reads and writes each number once (y twice where it is added
// to). Memory, both. Scaling whole tensors inside of cuBLASLt would spare the second, but then a row's numbers would depend on
// what else is in its batch.
//
// Launch of `narrow_rows`: grid (rows), 128 threads up to a width of 4,096, else 256; 64 bytes of shared memory; widths in
// multiples of 8. Of `scale_rows`: grid (ceil(rows n / 8 / 256)), 256 threads; n a multiple of 8.
#include "../common.cuh"

extern "C" __global__ void __launch_bounds__(256) narrow_rows(Rows in, uint8_t* out, float* scales) {
    SHARED(float, memory);
    const size_t row = size_t(blockIdx.x) * in.width;
    float held[HELD][8], most = 0.0f;
    row_seen(in, row, held, [&](const float* x) {
#pragma unroll
        for (int j = 0; j < 8; j++) most = fmaxf(most, fabsf(x[j]));
    });
    most = block_most(most, memory);
    const float by = most > 0.0f ? 448.0f / most : 0.0f;
    if (threadIdx.x == 0) st(scales + blockIdx.x, most / 448.0f);
    row_again(in, row, held, [&](uint32_t c, const float* x) {
        float y[8];
#pragma unroll
        for (int j = 0; j < 8; j++) y[j] = x[j] * by;
        store8<FP8>(out + row + 8 * c, y);
    });
}
KERNEL(narrow_rows)

extern "C" __global__ void __launch_bounds__(256)
    scale_rows(const float* sums, const float* scales, const float* of_columns, uint32_t rows, uint32_t n, const float* bias,
               uint32_t accumulate, Rows y) {
    const uint32_t C = n / 8;
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= size_t(rows) * C) return;
    const size_t row = i / C;
    const uint32_t column = uint32_t(i % C) * 8;
    // Neighbours share a row's scale, and rows the columns'.
    const float scale = ld_same(scales + row, column == 0);
    float x[8], w[8], b[8] = {}, before[8] = {};
    load8<F32>(sums + row * n + column, x);
    load8<F32>(of_columns + column, w, row == 0);
    if (bias != nullptr) load8<F32>(bias + column, b, row == 0);
    const size_t at = row * y.width + column;
    if (accumulate) load8(y.type, y.data, at, before);
#pragma unroll
    for (int j = 0; j < 8; j++) x[j] = before[j] + fmaf(x[j] * scale, w[j], b[j]);
    store8(y.type, y.data, at, x);
}
KERNEL(scale_rows)
