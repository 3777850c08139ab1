// Rotates queries and keys by their rows' positions.
//
// Reads and writes the rotated channels of each row once, and a cosine and a sine per pair and row; six FLOPs a pair.
// Memory.
//
// Launch: grid (ceil(rows * heads * pieces / 256)), 256 threads, where a piece is eight pairs if the pairs are a multiple of
// eight, else one pair. `table` has the cosines, then the sines of each position: [position][2][pairs] floats, worked out by
// the host in double precision (angles of large positions need it).
#include "common.cuh"

DEVICE void turn(float& x, float& y, float cos, float sin) {
    const float a = x, b = y;
    x = a * cos - b * sin;
    y = b * cos + a * sin;
}

// The first `heads` heads of each row; `interleaved`: channels 2i and 2i + 1 form a pair, else i and i + pairs.
extern "C" __global__ void __launch_bounds__(256)
    rope(Rows qkv, uint32_t rows, uint32_t heads, uint32_t dim, const uint32_t* positions, const float* table,
         uint32_t pairs, uint32_t interleaved) {
    const bool wide = pairs % 8 == 0;
    const uint32_t pieces = wide ? pairs / 8 : pairs, i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= rows * heads * pieces) return;
    const uint32_t row = i / (heads * pieces), h = i / pieces % heads, piece = i % pieces;
    const float* cosines = table + size_t(ld_same(positions + row, h == 0 && piece == 0)) * 2 * pairs;
    const size_t base = size_t(row) * qkv.width + h * dim;
    if (!wide) {
        const size_t a = base + (interleaved ? 2 * piece : piece), b = interleaved ? a + 1 : a + pairs;
        float x = load1(qkv.type, qkv.data, a), y = load1(qkv.type, qkv.data, b);
        turn(x, y, ld_same(cosines + piece, h == 0), ld_same(cosines + pairs + piece, h == 0));
        store1(qkv.type, qkv.data, a, x);
        store1(qkv.type, qkv.data, b, y);
        return;
    }
    float cos[8], sin[8], x[16];
    load8<F32>(cosines + 8 * piece, cos, h == 0);
    load8<F32>(cosines + pairs + 8 * piece, sin, h == 0);
    const size_t a = base + (interleaved ? 16 * piece : 8 * piece), b = interleaved ? a + 8 : a + pairs;
    load8(qkv.type, qkv.data, a, x);
    load8(qkv.type, qkv.data, b, x + 8);
#pragma unroll
    for (int j = 0; j < 8; j++) {
        if (interleaved) turn(x[2 * j], x[2 * j + 1], cos[j], sin[j]);
        else turn(x[j], x[8 + j], cos[j], sin[j]);
    }
    store8(qkv.type, qkv.data, a, x);
    store8(qkv.type, qkv.data, b, x + 8);
}
KERNEL(rope)
