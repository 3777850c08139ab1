// Keys in clusters, by whose centres tokens are chosen.
//
// `cluster_assign` multiplies every key by every centre: 2 dim FLOPs a pair, keys and centres read once per 32 of the other
// (from a cache): FLOPs. `cluster_update` reads the keys once and the labels once per cluster. Both run `rounds` times in a
// prompt; `cluster_select` reads the centres once per query head and a label and a place a token. Memory.
//
// Of head n = item * kv_heads + h: `centres` [n][most][dim], `labels` and `places` by `Head::meta` of the tokens. The first
// `sinks` tokens belong to no cluster.
//
// Launch of `cluster_start`: grid (most clusters, kv_heads, items), 32 threads; of
// `cluster_assign`: grid (ceil(most tokens / 32), kv_heads, items), 128 threads, 4 (64 (dim + 4) + 32 x 33 + 32) bytes of shared
// memory; of `cluster_update`: grid (most clusters, kv_heads, items), 128 threads, 4096 bytes; of `cluster_places` the same
// grid, 128 threads, 128 bytes; of `cluster_select`: grid (heads, items), 128 threads, 128 + 8 most bytes.
#include "../attend/tile.cuh"
#include "../order.cuh"

DEVICE uint32_t clusters_of(uint32_t wanted, uint32_t tokens) { return max_of(min_of(wanted, max_of(tokens, 1)), 1); }

#define CLUSTERS                                                                                 \
    const Item item = ld_struct(items + blockIdx.z);                                             \
    const Head head = ld_struct(head_of(kv, item, blockIdx.y));                                  \
    const uint32_t dim = kv.dim, front = min_of(sinks, head.tokens), tokens = head.tokens - front; \
    const uint32_t count = clusters_of(ld_same(wanted + blockIdx.z, threadIdx.x == 0), tokens);  \
    float* own = centres + (size_t(blockIdx.z) * kv.kv_heads + blockIdx.y) * most * dim;

// The first centres: keys evenly spread.
extern "C" __global__ void __launch_bounds__(32)
    cluster_start(Kv kv, const Item* items, uint32_t sinks, const uint32_t* wanted, uint32_t most, float* centres) {
    CLUSTERS
    if (blockIdx.x >= count || tokens == 0 || 8 * threadIdx.x >= dim) return;
    float k[8];
    key8(kv, head, front + uint32_t(uint64_t(blockIdx.x) * tokens / count), threadIdx.x, k);
    store8<F32>(own + size_t(blockIdx.x) * dim + 8 * threadIdx.x, k);
}
KERNEL(cluster_start)

// The centre with the largest cosine for each key, the lower among equals; the key's own length changes nothing.
extern "C" __global__ void __launch_bounds__(TILE_THREADS, 2)
    cluster_assign(Kv kv, const Item* items, uint32_t sinks, const uint32_t* wanted, uint32_t most, float* centres,
                   uint32_t* labels) {
    SHARED(float, memory);
    CLUSTERS
    const uint32_t first = front + blockIdx.x * SIDE, tid = threadIdx.x, C = dim / 8;
    if (first >= head.tokens) return;
    float* tile = memory;                              // 32 centres
    float* block = tile + SIDE * tile_stride(dim);     // 32 keys
    float* scores = block + SIDE * tile_stride(dim);   // [32][33]
    float* lengths = scores + SIDE * (SIDE + 1);       // [32]
    load_block(kv, head, true, first, head.tokens, block);
    float best = -INFINITE;
    uint32_t label = 0;
    for (uint32_t from = 0; from < count; from += SIDE) {
        const uint32_t here = min_of(count - from, SIDE);
        __syncthreads();
        for (uint32_t i = tid; i < SIDE * C; i += TILE_THREADS) {
            float x[8] = {};
            if (i / C < here) load8<F32>(own + size_t(from + i / C) * dim + 8 * (i % C), x);
#pragma unroll
            for (int j = 0; j < 8; j++) tile[i / C * tile_stride(dim) + 8 * (i % C) + j] = x[j];
        }
        __syncthreads();
        if (tid < SIDE) {
            float squares = 0.0f;
            const float* centre = tile + tid * tile_stride(dim);
            for (uint32_t d = 0; d < dim; d++) squares = fmaf(centre[d], centre[d], squares);
            lengths[tid] = sqrtf(squares);
        }
        float product[2][4];
        products(tile, block, dim, product);
#pragma unroll
        for (int r = 0; r < 2; r++) {
#pragma unroll
            for (int j = 0; j < 4; j++) scores[(tid / 8 * 2 + r) * (SIDE + 1) + tid % 8 + 8 * j] = product[r][j];
        }
        __syncthreads();
        if (tid < SIDE) {
            for (uint32_t m = 0; m < here; m++) {
                const float cosine = lengths[m] > 0.0f ? scores[m * (SIDE + 1) + tid] / lengths[m] : 0.0f;
                if (cosine > best) best = cosine, label = from + m;
            }
        }
    }
    if (tid < SIDE && first + tid < head.tokens) st(labels + head.meta + first + tid, label);
}
KERNEL(cluster_assign)

// The mean of a cluster's keys; one that has lost all of them stays where it is.
extern "C" __global__ void __launch_bounds__(128)
    cluster_update(Kv kv, const Item* items, uint32_t sinks, const uint32_t* wanted, uint32_t most, float* centres,
                   const uint32_t* labels) {
    SHARED(float, memory);
    CLUSTERS
    if (blockIdx.x >= count) return;
    const uint32_t lanes = lanes_of(dim), slots = 128 / lanes, slot = threadIdx.x / lanes, c = threadIdx.x % lanes;
    float sums[8] = {};
    uint32_t members = 0;
    for (uint32_t t = front + slot; t < head.tokens; t += slots) {
        if (ld_same(labels + head.meta + t, c == 0) != blockIdx.x) continue;
        members++;
        if (8 * c >= dim) continue;
        float k[8];
        key8(kv, head, t, c, k);
#pragma unroll
        for (int j = 0; j < 8; j++) sums[j] += k[j];
    }
#pragma unroll
    for (int j = 0; j < 8; j++) memory[(slot * lanes + c) * 8 + j] = sums[j];
    __syncthreads();
    float sum[2] = {};
    for (uint32_t d = threadIdx.x, i = 0; d < dim; d += 128, i++) {
        for (uint32_t s = 0; s < slots; s++) sum[i] += memory[s * lanes * 8 + d];
    }
    uint32_t* scratch = reinterpret_cast<uint32_t*>(memory);
    uint32_t all;
    __syncthreads();
    block_before(c == 0 ? members : 0, scratch, &all);
    if (all == 0) return;
    for (uint32_t d = threadIdx.x, i = 0; d < dim; d += 128, i++) st(own + size_t(blockIdx.x) * dim + d, sum[i] / float(all));
}
KERNEL(cluster_update)

// Where each token stands among those of its cluster, and how many those are: `sizes` [n][most].
extern "C" __global__ void __launch_bounds__(128)
    cluster_places(Kv kv, const Item* items, uint32_t sinks, const uint32_t* wanted, uint32_t most, float* centres,
                   const uint32_t* labels, uint32_t* places, uint32_t* sizes) {
    SHARED(uint32_t, scratch);
    CLUSTERS
    if (blockIdx.x >= count) return;
    uint32_t next = 0;
    for (uint32_t first = front; first < head.tokens; first += blockDim.x) {
        const uint32_t t = first + threadIdx.x;
        const bool mine = t < head.tokens && ld(labels + head.meta + t) == blockIdx.x;
        uint32_t all;
        const uint32_t before = block_before(mine, scratch, &all);
        if (mine) st(places + head.meta + t, next + before);
        next += all;
    }
    if (threadIdx.x == 0) st(sizes + (own - centres) / dim + blockIdx.x, next);
}
KERNEL(cluster_places)

// What a query head reads: the sinks, the `budget` tokens of the clusters whose centres it likes best (the last cluster cut to
// its first), and all from `end` on, which came after the clusters. `chosen` [item][head][room], `counts` [item][head].
extern "C" __global__ void __launch_bounds__(128)
    cluster_select(Kv kv, const Item* items, Rows qkv, uint32_t sinks, const uint32_t* wanted, uint32_t most, float* centres,
                   const uint32_t* labels, const uint32_t* places, const uint32_t* sizes, const uint32_t* ends,
                   const uint32_t* budgets, uint32_t* order, uint32_t* other, uint32_t room, uint32_t* chosen,
                   uint32_t* counts) {
    SHARED(uint32_t, memory);
    const uint32_t heads = gridDim.x, set = blockIdx.x, dim = kv.dim;
    const Item item = ld_struct(items + blockIdx.y);
    const uint32_t h = set / (heads / kv.kv_heads), end_of = ld_same(ends + blockIdx.y, threadIdx.x == 0);
    const Head head = ld_struct(head_of(kv, item, h));
    const uint32_t end = min_of(end_of, head.tokens), front = min_of(sinks, end);
    const uint32_t count = clusters_of(ld_same(wanted + blockIdx.y, threadIdx.x == 0), end - front);
    const size_t n = size_t(blockIdx.y) * kv.kv_heads + h, place = size_t(blockIdx.y) * heads + set;
    uint32_t* scratch = memory;                             // [32]
    uint32_t* taken = memory + 32;                          // [most]
    float* likes = reinterpret_cast<float*>(taken + most);  // [most]
    const size_t query = size_t(item.first_row) * qkv.width + set * dim;
    for (uint32_t m = threadIdx.x / 32; m < count; m += blockDim.x / 32) {
        float sum = 0.0f;
        for (uint32_t c = threadIdx.x % 32; 8 * c < dim; c += 32) {
            float q[8], x[8];
            load8(qkv.type, qkv.data, query + 8 * c, q, m == 0);
            load8<F32>(centres + (n * most + m) * dim + 8 * c, x);
#pragma unroll
            for (int j = 0; j < 8; j++) sum = fmaf(q[j], x[j], sum);
        }
        sum = sum_of(sum);
        if (threadIdx.x % 32 == 0) likes[m] = sum;
    }
    __syncthreads();
    uint32_t* mine = order + place * most;
    // Sorted ascending and read from behind: of equal ones the lower comes first.
    for (uint32_t m = threadIdx.x; m < count; m += blockDim.x) st(mine + m, count - 1 - m);
    const auto of = [&](uint32_t m) { return ordinal_of(likes[m], 0, 1, Protect{0, 0}); };
    sort(count, mine, other + place * most, scratch, of);
    if (threadIdx.x == 0) {
        uint32_t left = ld(budgets + place);
        for (uint32_t i = count; i > 0; i--) {
            const uint32_t m = ld(mine + i - 1);
            taken[m] = min_of(left, ld(sizes + n * most + m));
            left -= taken[m];
        }
    }
    __syncthreads();
    uint32_t next = 0;
    for (uint32_t first = 0; first < head.tokens; first += blockDim.x) {
        const uint32_t t = first + threadIdx.x;
        bool reads = t < head.tokens && (t < front || t >= end);
        if (t >= front && t < end) reads = ld(places + head.meta + t) < taken[ld(labels + head.meta + t)];
        uint32_t all;
        const uint32_t before = block_before(reads, scratch, &all);
        if (reads) st(chosen + place * room + next + before, t);
        next += all;
    }
    if (threadIdx.x == 0) st(counts + place, next);
}
KERNEL(cluster_select)
