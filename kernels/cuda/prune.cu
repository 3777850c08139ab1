// The channels of keys that matter least to the scores are dropped from the oldest tokens.
//
// `channel_squares` reads every key once, when channels are chosen; `prune` reads the keys that become pruned and writes the
// channels that stay. Memory.
//
// Launch of `channel_squares`: grid (parts, kv_heads, items), 128 threads, 4096 bytes of shared memory, `part` tokens each. Of
// `choose_channels`: grid (kv_heads, items), 256 threads, 1,024 bytes. Of `prune`: grid (ceil(most tokens * dim / 8 / 256),
// heads listed), 256 threads.
#include "cache.cuh"

// Sums of the squares of a part's keys by channel: `partial` [item][kv_head][part][dim].
extern "C" __global__ void __launch_bounds__(128)
    channel_squares(Kv kv, const Item* items, uint32_t part, float* partial) {
    SHARED(float, memory);
    const Item item = ld_struct(items + blockIdx.z);
    const Head head = ld_struct(head_of(kv, item, blockIdx.y));
    const uint32_t lanes = lanes_of(kv.dim), slot = threadIdx.x / lanes, slots = 128 / lanes, c = threadIdx.x % lanes;
    const uint32_t low = blockIdx.x * part, high = min_of(low + part, head.tokens);
    float sums[8] = {};
    for (uint32_t t = low + slot; t < high; t += slots) {
        if (8 * c >= kv.dim) break;
        float k[8];
        key8(kv, head, t, c, k);
#pragma unroll
        for (int j = 0; j < 8; j++) sums[j] = fmaf(k[j], k[j], sums[j]);
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
KERNEL(channel_squares)

// The channels that stay, ascending, and then the place of each channel among them or DROPPED, at `kept` [item][kv_head]
// [dim - drop + dim]: the mean of a channel's squares in the queries of the last `window` rows times that in the keys decides;
// of equal ones the lower goes first, and what is no number stays.
extern "C" __global__ void __launch_bounds__(256)
    choose_channels(Kv kv, const Item* items, Rows qkv, uint32_t heads, uint32_t window, uint32_t drop, uint32_t part,
                    uint32_t most_parts, const float* partial, uint16_t* kept) {
    SHARED(float, scores);
    const Item item = ld_struct(items + blockIdx.y);
    const Head head = ld_struct(head_of(kv, item, blockIdx.x));
    const uint32_t d = threadIdx.x, dim = kv.dim, group = heads / kv.kv_heads, last = min_of(window, item.rows);
    const size_t n = size_t(blockIdx.y) * kv.kv_heads + blockIdx.x;
    float score = 0.0f;
    if (d < dim) {
        float keys = 0.0f, queries = 0.0f;
        for (uint32_t p = 0; p < divided(head.tokens, part); p++) keys += ld(partial + (n * most_parts + p) * dim + d);
        for (uint32_t row = item.first_row + item.rows - last; row < item.first_row + item.rows; row++) {
            for (uint32_t g = 0; g < group; g++) {
                const float q = load1(qkv.type, qkv.data, size_t(row) * qkv.width + (blockIdx.x * group + g) * dim + d);
                queries = fmaf(q, q, queries);
            }
        }
        score = keys / float(max_of(head.tokens, 1)) * (queries * (1.0f / float(max_of(last * group, 1))));
        if (score != score) score = INFINITE;
        scores[d] = score;
    }
    __syncthreads();
    bool stays = false;
    if (d < dim) {
        uint32_t below = 0;
        for (uint32_t e = 0; e < dim; e++) below += scores[e] < score || (scores[e] == score && e < d);
        stays = below >= drop;
    }
    uint32_t all;
    __syncthreads();
    const uint32_t place = block_before(stays, reinterpret_cast<uint32_t*>(scores), &all);
    uint16_t* out = kept + n * (2 * dim - drop);
    if (d < dim) st(out + dim - drop + d, stays ? uint16_t(place) : DROPPED);
    if (stays) st(out + place, uint16_t(d));
}
KERNEL(choose_channels)

// Copies the kept channels of the tokens from `Head::key_narrow` to `to` of each head in `which` to their pruned halves. The
// head names its channels and pruned halves already; its counts are those before.
extern "C" __global__ void __launch_bounds__(256) prune(Kv kv, const uint32_t* which, const uint32_t* to) {
    const Head head = ld_struct(kv.heads + ld_same(which + blockIdx.y, threadIdx.x == 0));
    const uint32_t end = min_of(ld_same(to + blockIdx.y, threadIdx.x == 0), head.tokens), pitch = pitch_of(head.channels);
    const uint32_t C = pitch / 8, i = blockIdx.x * blockDim.x + threadIdx.x, token = head.key_narrow + i / C, c = i % C;
    if (token >= end) return;
    float x[8];
    kept_key8(kv, head, token, c, x);
    uint8_t* half = half_at(kv, head.k_pruned, token / BLOCK_TOKENS, c == 0);
    store8(kv.format, half, size_t(token % BLOCK_TOKENS) * pitch + 8 * c, x);
}
KERNEL(prune)
