// Scores that come from the keys alone: -|k|, and -cos(k, mean direction).
//
// `rank_norms` reads each key once; `rank_differences` again after `key_directions`: memory (2 to 4 FLOPs a number).
//
// Launch of `rank_norms` and `rank_differences`: grid (ceil(most tokens * lanes / 128), kv_heads, items), 128 threads, for
// `lanes` 8, 16 or 32 that hold a key of 8 channels each. Of `key_directions`: grid (parts, kv_heads, items), 128 threads,
// 4096 bytes of shared memory; a part is `part` tokens whatever the batch, its sums are added in order.
#include "../cache.cuh"

DEVICE float length_of(const float* k, uint32_t lanes) {
    float squares = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; j++) squares = fmaf(k[j], k[j], squares);
    return sqrtf(sum_of(squares, lanes));
}

extern "C" __global__ void __launch_bounds__(128) rank_norms(Kv kv, const Item* items, float* scores) {
    const Item item = ld_struct(items + blockIdx.z);
    const Head head = ld_struct(head_of(kv, item, blockIdx.y));
    const uint32_t lanes = lanes_of(kv.dim), all = blockIdx.x * blockDim.x + threadIdx.x, t = all / lanes, c = all % lanes;
    float k[8] = {};
    const uint32_t channels = t < head.key_narrow ? head.channels : kv.dim;
    if (t < head.tokens && 8 * c < channels) {
        stored_key8(kv, head, t, c, k);
        // Codes behind the last kept channel stand for almost nothing, not for nothing.
#pragma unroll
        for (uint32_t j = 0; j < 8; j++) {
            if (8 * c + j >= channels) k[j] = 0.0f;
        }
    }
    const float length = length_of(k, lanes);
    if (t < head.tokens && c == 0) st(scores + head.meta + t, -length);
}
KERNEL(rank_norms)

// Sums of the directions of a part's keys: `partial` [item][kv_head][part][dim].
extern "C" __global__ void __launch_bounds__(128)
    key_directions(Kv kv, const Item* items, uint32_t part, float* partial) {
    SHARED(float, memory);
    const Item item = ld_struct(items + blockIdx.z);
    const Head head = ld_struct(head_of(kv, item, blockIdx.y));
    const uint32_t lanes = lanes_of(kv.dim), slot = threadIdx.x / lanes, slots = 128 / lanes, c = threadIdx.x % lanes;
    const uint32_t low = blockIdx.x * part, high = min_of(low + part, head.tokens);
    float sums[8] = {};
    for (uint32_t first = low; first < high; first += slots) {
        const uint32_t t = first + slot;
        float k[8] = {};
        if (t < high && 8 * c < kv.dim) key8(kv, head, t, c, k);
        const float length = length_of(k, lanes), by = length > 0.0f ? 1.0f / length : 0.0f;
#pragma unroll
        for (int j = 0; j < 8; j++) sums[j] += k[j] * by;
    }
#pragma unroll
    for (int j = 0; j < 8; j++) memory[(slot * lanes + c) * 8 + j] = sums[j];
    __syncthreads();
    float* out = partial + ((blockIdx.z * size_t(kv.kv_heads) + blockIdx.y) * gridDim.x + blockIdx.x) * kv.dim;
    for (uint32_t d = threadIdx.x; d < kv.dim; d += blockDim.x) {
        float sum = 0.0f;
        for (uint32_t s = 0; s < slots; s++) sum += memory[s * lanes * 8 + d];
        st(out + d, sum);
    }
}
KERNEL(key_directions)

extern "C" __global__ void __launch_bounds__(128)
    rank_differences(Kv kv, const Item* items, uint32_t part, uint32_t most_parts, const float* partial, float* scores) {
    const Item item = ld_struct(items + blockIdx.z);
    const Head head = ld_struct(head_of(kv, item, blockIdx.y));
    const uint32_t lanes = lanes_of(kv.dim), all = blockIdx.x * blockDim.x + threadIdx.x, t = all / lanes, c = all % lanes;
    const float* from = partial + (blockIdx.z * size_t(kv.kv_heads) + blockIdx.y) * most_parts * kv.dim;
    float anchor[8] = {}, k[8] = {};
    if (8 * c < kv.dim) {
        for (uint32_t p = 0; p < divided(head.tokens, part); p++) {
            float one[8];
            load8<F32>(from + p * kv.dim + 8 * c, one, threadIdx.x < lanes);
#pragma unroll
            for (int j = 0; j < 8; j++) anchor[j] += one[j];
        }
        if (t < head.tokens) key8(kv, head, t, c, k);
    }
    float dot = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        anchor[j] /= float(max_of(head.tokens, 1));
        dot = fmaf(k[j], anchor[j], dot);
    }
    const float along = length_of(anchor, lanes), length = length_of(k, lanes);
    dot = sum_of(dot, lanes);
    if (t < head.tokens && c == 0) {
        const float scale = length > 0.0f ? 1.0f / length : 0.0f;
        st(scores + head.meta + t, dot * scale * (along > 0.0f ? -1.0f / along : 0.0f));
    }
}
KERNEL(rank_differences)
