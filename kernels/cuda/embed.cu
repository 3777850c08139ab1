// Rows of the embedding table, times a scale.
//
// Reads and writes a row's numbers once. Memory.
//
// Launch: grid (ceil(rows * width / 8 / 256)), 256 threads. `embed_codes` reads a table of codes as `gemm/codes.cu`
// describes them.
#include "codes.cuh"

extern "C" __global__ void __launch_bounds__(256)
    embed(Rows table, const uint32_t* ids, uint32_t rows, float scale, Rows out) {
    const uint32_t C = out.width / 8;
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= size_t(rows) * C) return;
    const uint32_t row = uint32_t(i / C), c = uint32_t(i % C);
    float x[8];
    load8(table.type, table.data, size_t(ld_same(ids + row, c == 0)) * table.width + 8 * c, x);
#pragma unroll
    for (int j = 0; j < 8; j++) x[j] *= scale;
    store8(out.type, out.data, size_t(row) * out.width + 8 * c, x);
}
KERNEL(embed)

extern "C" __global__ void __launch_bounds__(256)
    embed_codes(const uint8_t* codes, const uint32_t* levels, uint32_t bits, const uint32_t* ids, uint32_t rows, float scale,
                Rows out) {
    const uint32_t C = out.width / 8;
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= size_t(rows) * C) return;
    const uint32_t row = uint32_t(i / C), c = uint32_t(i % C);
    float x[8];
    weights8(codes, levels, bits, out.width, ld_same(ids + row, c == 0), c, x);
#pragma unroll
    for (int j = 0; j < 8; j++) x[j] *= scale;
    store8(out.type, out.data, size_t(row) * out.width + 8 * c, x);
}
KERNEL(embed_codes)
