// What is left of dropped tokens: a state of constant size per KV head, which attention reads beside the cache (LESS).
//
// The state of a head is [rank][dim] floats and then [rank]. `state_psi` and `state_read` run two small networks per dropped
// token or query head: 2 hidden (dim + rank) FLOPs each, whose weights are read once per eight of them (from a cache): FLOPs in
// large batches, the weights' bytes in small ones. `state_fold` adds rank (dim + 1) products a token.
//
// Networks of a head lie one after the other: first [dim][hidden], second [hidden][rank], and for keys mix [rank][rank], scale
// [rank], gate [rank]. Launch of `state_psi`: grid (ceil(most tokens / 8), kv_heads, items), 128 threads, 32 (dim + hidden +
// 2 rank) bytes of shared memory. Of `state_fold`: grid (rank, kv_heads, items), threads for dim + 1, whole warps; it adds
// tokens in their order. Of `state_read`: grid (ceil(rows / 8), heads), 128 threads, 32 (dim + hidden + rank) bytes.
#include "cache.cuh"

constexpr uint32_t AT_ONCE = 8;

DEVICE float gelu(float x) { return 0.5f * x * (1.0f + tanhf(0.7978846f * (x + 0.044715f * x * x * x))); }

// y = x A for eight vectors in shared memory, A of [from][to] in global.
template <class Then>
DEVICE void multiply(const float* x, uint32_t from, const float* a, uint32_t to, float* y, const Then& then) {
    for (uint32_t j = threadIdx.x; j < to; j += blockDim.x) {
        float sums[AT_ONCE] = {};
        for (uint32_t i = 0; i < from; i++) {
            const float w = ld(a + size_t(i) * to + j);
#pragma unroll
            for (uint32_t n = 0; n < AT_ONCE; n++) sums[n] = fmaf(x[n * from + i], w, sums[n]);
        }
#pragma unroll
        for (uint32_t n = 0; n < AT_ONCE; n++) y[n * to + j] = then(sums[n], j, n);
    }
    __syncthreads();
}

// Tokens that stay, ascending, are at `kept` by the head's meta.
DEVICE bool stays(const uint32_t* kept, uint32_t count, uint32_t t) {
    uint32_t low = 0, high = count;
    while (low < high) {
        const uint32_t middle = (low + high) / 2;
        if (ld(kept + middle) < t) low = middle + 1;
        else high = middle;
    }
    return low < count && ld(kept + low) == t;
}

// psi of every token that goes: `psi` [meta + token][rank].
extern "C" __global__ void __launch_bounds__(128)
    state_psi(Kv kv, const Item* items, const uint32_t* keep, const uint32_t* kept, const float* maps, uint32_t hidden,
              uint32_t rank, float* psi) {
    SHARED(float, memory);
    const Item item = ld_struct(items + blockIdx.z);
    const Head head = ld_struct(head_of(kv, item, blockIdx.y));
    const uint32_t stay = ld_same(keep + blockIdx.z * kv.kv_heads + blockIdx.y, threadIdx.x == 0);
    const uint32_t token = blockIdx.x * AT_ONCE, dim = kv.dim, C = dim / 8;
    if (stay >= head.tokens || token >= head.tokens) return;
    float *keys = memory, *inner = keys + AT_ONCE * dim, *first = inner + AT_ONCE * hidden, *out = first + AT_ONCE * rank;
    for (uint32_t i = threadIdx.x; i < AT_ONCE * C; i += blockDim.x) {
        float x[8] = {};
        if (token + i / C < head.tokens) key8(kv, head, token + i / C, i % C, x);
#pragma unroll
        for (int j = 0; j < 8; j++) keys[i * 8 + j] = x[j];
    }
    __syncthreads();
    const float* map = maps + blockIdx.y * (size_t(dim) * hidden + size_t(hidden) * rank + size_t(rank) * rank + 2 * rank);
    const float* second = map + size_t(dim) * hidden;
    const float* mix = second + size_t(hidden) * rank;
    const float *scale = mix + size_t(rank) * rank, *gate = scale + rank;
    multiply(keys, dim, map, hidden, inner, [&](float x, uint32_t, uint32_t) { return gelu(x); });
    multiply(inner, hidden, second, rank, first, [&](float x, uint32_t j, uint32_t) { return gelu(x) * fabsf(ld(scale + j)); });
    multiply(first, rank, mix, rank, out,
             [&](float x, uint32_t j, uint32_t n) { return fabsf(first[n * rank + j] + x * ld(gate + j)); });
    for (uint32_t i = threadIdx.x; i < AT_ONCE * rank; i += blockDim.x) {
        const uint32_t t = token + i / rank;
        if (t < head.tokens && !stays(kept + head.meta, stay, t)) st(psi + size_t(head.meta + t) * rank + i % rank, out[i]);
    }
}
KERNEL(state_psi)

extern "C" __global__ void __launch_bounds__(288)
    state_fold(Kv kv, const Item* items, const uint32_t* keep, const uint32_t* kept, uint32_t rank, const float* psi) {
    const Item item = ld_struct(items + blockIdx.z);
    const Head head = ld_struct(head_of(kv, item, blockIdx.y));
    const uint32_t stay = ld_same(keep + blockIdx.z * kv.kv_heads + blockIdx.y, threadIdx.x == 0);
    const uint32_t r = blockIdx.x, d = threadIdx.x;
    if (stay >= head.tokens || d > kv.dim) return;
    float* state = reinterpret_cast<float*>(kv.pool + size_t(head.state) * UNIT);
    float* own = d < kv.dim ? state + size_t(r) * kv.dim + d : state + size_t(rank) * kv.dim + r;
    float sum = ld(own);
    uint32_t next = 0;
    for (uint32_t t = 0; t < head.tokens; t++) {
        if (next < stay && ld_same(kept + head.meta + next, d == 0) == t) {
            next++;
            continue;
        }
        const float weight = ld_same(psi + size_t(head.meta + t) * rank + r, d == 0);
        float v = 1.0f;
        if (d < kv.dim) {
            const uint32_t block = t / BLOCK_TOKENS, row = t % BLOCK_TOKENS;
            v = t < head.value_packed
                    ? packed1(kv, half_at(kv, head.v_packed, block, d == 0), kv.dim, false, row, d)
                    : load1(kv.format, half_at(kv, head.v_whole, block, d == 0), size_t(row) * kv.dim + d);
        }
        sum = fmaf(weight, v, sum);
    }
    st(own, sum);
}
KERNEL(state_fold)

// Joins what queries find in the states of their heads to their outputs, of which `lse` are the logarithms of the
// denominators. `item_of` has the item of each row.
extern "C" __global__ void __launch_bounds__(128)
    state_read(Kv kv, const Item* items, const uint32_t* item_of, Rows qkv, uint32_t rows, const float* maps,
               uint32_t hidden, uint32_t rank, Rows out, const float* lse) {
    SHARED(float, memory);
    const uint32_t heads = gridDim.y, h = blockIdx.y, first = blockIdx.x * AT_ONCE, dim = kv.dim, C = dim / 8;
    float *queries = memory, *inner = queries + AT_ONCE * dim, *phi = inner + AT_ONCE * hidden;
    for (uint32_t i = threadIdx.x; i < AT_ONCE * C; i += blockDim.x) {
        const uint32_t row = first + i / C;
        float x[8] = {};
        if (row < rows) load8(qkv.type, qkv.data, size_t(row) * qkv.width + h * dim + 8 * (i % C), x);
#pragma unroll
        for (int j = 0; j < 8; j++) queries[i * 8 + j] = x[j];
    }
    __syncthreads();
    const float* map = maps + h * (size_t(dim) * hidden + size_t(hidden) * rank);
    multiply(queries, dim, map, hidden, inner, [&](float x, uint32_t, uint32_t) { return gelu(x); });
    multiply(inner, hidden, map + size_t(dim) * hidden, rank, phi,
             [&](float x, uint32_t, uint32_t) { return fabsf(gelu(x)); });
    for (uint32_t i = threadIdx.x; i < AT_ONCE * C; i += blockDim.x) {
        const uint32_t n = i / C, row = first + n, at = 8 * (i % C);
        if (row >= rows) continue;
        const Item item = ld_struct(items + ld(item_of + row));
        const Head* head = head_of(kv, item, h / (heads / kv.kv_heads));
        const float* state = reinterpret_cast<const float*>(kv.pool + size_t(ld(&head->state)) * UNIT);
        float weight = 0.0f, sums[8] = {};
        for (uint32_t r = 0; r < rank; r++) {
            weight = fmaf(ld_same(state + size_t(rank) * dim + r, at == 0), phi[n * rank + r], weight);
        }
        // Zero where nothing has been dropped; what is no number must not spread.
        if (!(weight > 0.0f && weight < INFINITE)) continue;
        const float base = ld_same(lse + size_t(row) * heads + h, at == 0), log = logf(weight), most = fmaxf(log, base);
        const float total = most + logf(expf(log - most) + expf(base - most));
        const float share = expf(log - total) / weight, stays = expf(base - total);
        for (uint32_t r = 0; r < rank; r++) {
            float x[8];
            load8<F32>(state + size_t(r) * dim + at, x);
#pragma unroll
            for (int j = 0; j < 8; j++) sums[j] = fmaf(share * phi[n * rank + r], x[j], sums[j]);
        }
        float y[8];
        load8(out.type, out.data, size_t(row) * out.width + h * dim + at, y);
#pragma unroll
        for (int j = 0; j < 8; j++) y[j] = y[j] * stays + sums[j];
        store8(out.type, out.data, size_t(row) * out.width + h * dim + at, y);
    }
}
KERNEL(state_read)
