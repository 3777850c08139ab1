// Attention over some keys joined with attention over others.
//
// `attend_join` reads dim + 2 floats a part and query head and writes dim numbers: a few per cent of what the parts read of
// the cache. `attend_merge` reads two outputs and writes one. Memory.
#include "../cache.cuh"

// The parts of each head, put together in order. Grid (heads, items), 32 threads: a lane has eight channels.
extern "C" __global__ void __launch_bounds__(32)
    attend_join(Kv kv, const Item* items, uint32_t heads, uint32_t part, uint32_t most_parts, const float* partial, Rows out,
                float* lse) {
    const Item item = ld_struct(items + blockIdx.y);
    const uint32_t query = blockIdx.x, dim = kv.dim, at = 8 * threadIdx.x;
    const Head head = ld_struct(head_of(kv, item, query / (heads / kv.kv_heads)));
    const uint32_t parts = divided(head.tokens, part);
    if (parts < 2) return;
    const float* from = partial + (blockIdx.y * size_t(heads) + query) * most_parts * (dim + 8);
    float most = -INFINITE;
    for (uint32_t p = 0; p < parts; p++) most = fmaxf(most, ld_same(from + p * (dim + 8) + dim, threadIdx.x == 0));
    float sums[8] = {}, total = 0.0f;
    for (uint32_t p = 0; p < parts; p++) {
        const float* one = from + p * (dim + 8);
        const float peak = ld_same(one + dim, threadIdx.x == 0), whole = ld_same(one + dim + 1, threadIdx.x == 0);
        if (!(whole > 0.0f)) continue;
        const float weight = expf(peak - most);
        total = fmaf(whole, weight, total);
        if (at >= dim) continue;
        float v[8];
        load8<F32>(one + at, v);
#pragma unroll
        for (int j = 0; j < 8; j++) sums[j] = fmaf(v[j], weight, sums[j]);
    }
    const size_t row = item.first_row;
    if (at < dim) {
        const float factor = total > 0.0f ? 1.0f / total : 0.0f;
#pragma unroll
        for (int j = 0; j < 8; j++) sums[j] = sums[j] * factor + 0.0f;
        store8(out.type, out.data, row * out.width + query * dim + at, sums);
    }
    if (at == 0 && lse != nullptr) st(lse + row * heads + query, total > 0.0f ? most + logf(total) : -INFINITE);
}
KERNEL(attend_join)


// Joins outputs over other keys to `out`, in place, as their softmax's denominators say. What saw no keys weighs nothing.
// Grid (heads, rows), 32 threads.
extern "C" __global__ void __launch_bounds__(32)
    attend_merge(Rows out, float* lse, Rows other, const float* other_lse, uint32_t dim) {
    const size_t query = blockIdx.x, row = blockIdx.y, place = row * gridDim.x + query;
    const float more = ld_same(other_lse + place, threadIdx.x == 0);
    if (more == -INFINITE) return;
    const float mine = ld_same(lse + place, threadIdx.x == 0), most = fmaxf(mine, more);
    const float a = expf(mine - most), b = expf(more - most), sum = a + b;
    const uint32_t at = 8 * threadIdx.x;
    if (at < dim) {
        float x[8], y[8];
        load8(out.type, out.data, row * out.width + query * dim + at, x);
        load8(other.type, other.data, row * other.width + query * dim + at, y);
#pragma unroll
        for (int j = 0; j < 8; j++) x[j] = x[j] * (a / sum) + y[j] * (b / sum);
        store8(out.type, out.data, row * out.width + query * dim + at, x);
    }
    // All lanes have read the old one.
    __syncwarp();
    if (threadIdx.x == 0) st(lse + place, most + logf(sum));
}
KERNEL(attend_merge)
