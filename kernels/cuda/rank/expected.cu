// The attention that cached tokens may expect of queries to come, from the distribution of those of this step.
//
// `query_moments` computes dim^2 products a row and query head, `expected_logits` as many a cached token and query head: 2 dim^2
// FLOPs each, with keys, queries and covariances read once per 32 or from a cache: FLOPs. `expected_scores` reads the logits
// three times and the values once: memory.
//
// Launch of `query_moments`: grid (heads, items), 256 threads, 4 (8 dim + 2 dim) bytes of shared memory. Of
// `expected_logits`: grid (ceil(most tokens / 32), heads, items), 128 threads, 4 (33 (dim + 4) + 128) bytes. Of
// `expected_scores`: grid (kv_heads, items), 256 threads, 4 (16 group + 64) bytes.
#include "../attend/tile.cuh"

constexpr uint32_t BATCH = 8;

DEVICE void turn(float& x, float& y, float cos, float sin) {
    const float a = x, b = y;
    x = a * cos - b * sin;
    y = b * cos + a * sin;
}

// Mean and covariance of the queries of each head before their rotation, of the rows at positions from `sinks` on, both turned
// by the mean rotation of the positions ahead: `ahead` [item][2][pairs] has its cosines and sines. `moments` [item][head]
// [dim + dim x dim]. `table` as in rope.cu, `inverse` is one over the square of the factor in it.
extern "C" __global__ void __launch_bounds__(256)
    query_moments(Kv kv, const Item* items, Rows qkv, const uint32_t* positions, uint32_t sinks, const float* table,
                  uint32_t pairs, uint32_t interleaved, float inverse, const float* ahead, float* moments) {
    SHARED(float, memory);
    const Item item = ld_struct(items + blockIdx.y);
    const uint32_t dim = kv.dim, h = blockIdx.x, heads = gridDim.x, tid = threadIdx.x;
    float* batch = memory;               // [BATCH][dim]
    float* mean = batch + BATCH * dim;   // [dim]
    float* out = moments + (size_t(blockIdx.y) * heads + h) * (dim + dim * dim);
    // Positions ascend: the rows that count are the last.
    uint32_t skipped = 0, end = item.rows;
    while (skipped < end) {
        const uint32_t middle = (skipped + end) / 2;
        if (ld_same(positions + item.first_row + middle, tid == 0) < sinks) skipped = middle + 1;
        else end = middle;
    }
    const uint32_t count = item.rows - skipped;
    const auto load = [&](uint32_t first) {
        __syncthreads();
        for (uint32_t i = tid; i < BATCH * dim / 2; i += blockDim.x) {
            const uint32_t n = i / (dim / 2), two = i % (dim / 2), row = item.first_row + skipped + first + n;
            float x = 0.0f, y = 0.0f;
            uint32_t a = 2 * two, b = a + 1;
            if (two < pairs && !interleaved) a = two, b = two + pairs;
            if (first + n < count) {
                const size_t at = size_t(row) * qkv.width + h * dim;
                x = load1(qkv.type, qkv.data, at + a);
                y = load1(qkv.type, qkv.data, at + b);
                if (two < pairs) {
                    const float* angles = table + size_t(ld_same(positions + row, two == 0)) * 2 * pairs;
                    turn(x, y, ld(angles + two) * inverse, -ld(angles + pairs + two) * inverse);
                }
            }
            batch[n * dim + a] = x;
            batch[n * dim + b] = y;
        }
        __syncthreads();
    };
    double sum = 0.0;
    for (uint32_t first = 0; first < count; first += BATCH) {
        load(first);
        if (tid < dim) {
            for (uint32_t n = 0; n < BATCH; n++) sum += batch[n * dim + tid];
        }
    }
    const double share = 1.0 / double(max_of(count, 1));
    if (tid < dim) mean[tid] = float(sum * share);
    for (uint32_t i = tid; i < dim * dim; i += blockDim.x) st(out + dim + i, 0.0f);
    for (uint32_t first = 0; first < count; first += BATCH) {
        load(first);
        for (uint32_t i = tid; i < BATCH * dim; i += blockDim.x) {
            batch[i] = first + i / dim < count ? batch[i] - mean[i % dim] : 0.0f;
        }
        __syncthreads();
        for (uint32_t i = tid; i < dim * dim; i += blockDim.x) {
            float one = ld(out + dim + i);
#pragma unroll
            for (uint32_t n = 0; n < BATCH; n++) one = fmaf(batch[n * dim + i / dim], batch[n * dim + i % dim], one);
            st(out + dim + i, one);
        }
    }
    __syncthreads();
    for (uint32_t i = tid; i < dim * dim; i += blockDim.x) st(out + dim + i, float(double(ld(out + dim + i)) * share));
    __syncthreads();
    const float* turns = ahead + size_t(blockIdx.y) * 2 * pairs;
    // Rows, then columns.
    for (int side = 0; side < 2; side++) {
        for (uint32_t i = tid; i < pairs * dim; i += blockDim.x) {
            const uint32_t pair = i / dim, d = i % dim;
            const uint32_t a = interleaved ? 2 * pair : pair, b = interleaved ? a + 1 : a + pairs;
            float* x = out + dim + (side == 0 ? a * dim + d : d * dim + a);
            float* y = out + dim + (side == 0 ? b * dim + d : d * dim + b);
            float p = ld(x), q = ld(y);
            turn(p, q, ld(turns + pair), ld(turns + pairs + pair));
            st(x, p);
            st(y, q);
        }
        __syncthreads();
    }
    if (tid < pairs) {
        const uint32_t a = interleaved ? 2 * tid : tid, b = interleaved ? a + 1 : a + pairs;
        turn(mean[a], mean[b], ld(turns + tid), ld(turns + pairs + tid));
    }
    __syncthreads();
    if (tid < dim) st(out + tid, mean[tid]);
}
KERNEL(query_moments)

// s k.mu + s^2 k.Sigma k / 2 of each token by each query head of its group, `plane` numbers apart; minus infinity for sinks.
extern "C" __global__ void __launch_bounds__(128)
    expected_logits(Kv kv, const Item* items, uint32_t sinks, float scale, const float* moments, float* logits,
                    uint64_t plane) {
    SHARED(float, memory);
    const Item item = ld_struct(items + blockIdx.z);
    const uint32_t heads = gridDim.y, group = heads / kv.kv_heads, dim = kv.dim, token = blockIdx.x * SIDE;
    const Head head = ld_struct(head_of(kv, item, blockIdx.y / group));
    if (token >= head.tokens) return;
    float* keys = memory;                          // [32][dim + 4]
    float* mean = keys + SIDE * tile_stride(dim);  // [dim]
    float* parts = mean + tile_stride(dim);        // [4][32]
    const float* from = moments + (size_t(blockIdx.z) * heads + blockIdx.y) * (dim + dim * dim);
    load_block(kv, head, true, token, head.tokens, keys);
    for (uint32_t d = threadIdx.x; d < dim; d += blockDim.x) mean[d] = ld(from + d);
    __syncthreads();
    // A lane has a token, a warp every fourth piece of eight columns.
    const uint32_t t = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float* k = keys + t * tile_stride(dim);
    float sum = 0.0f;
    for (uint32_t c = warp; 8 * c < dim; c += 4) {
        float product[8] = {};
        for (uint32_t d = 0; d < dim; d++) {
            float row[8];
            load8<F32>(from + dim + size_t(d) * dim + 8 * c, row, t == 0);
#pragma unroll
            for (int j = 0; j < 8; j++) product[j] = fmaf(k[d], row[j], product[j]);
        }
#pragma unroll
        for (int j = 0; j < 8; j++) {
            sum = fmaf(0.5f * scale * scale * product[j], k[8 * c + j], sum);
            sum = fmaf(scale * mean[8 * c + j], k[8 * c + j], sum);
        }
    }
    parts[warp * 32 + t] = sum;
    __syncthreads();
    if (warp == 0 && token + t < head.tokens) {
        const size_t at = size_t(head.meta) + token + t;
        const bool sink = ld(kv.positions + at) < sinks;
        const float logit = parts[t] + parts[32 + t] + parts[64 + t] + parts[96 + t];
        st(logits + blockIdx.y % group * plane + at, sink ? -INFINITE : logit);
    }
}
KERNEL(expected_logits)

// The mean over the group's heads of the softmax of the logits, times the length of the value; infinite for sinks.
extern "C" __global__ void __launch_bounds__(256)
    expected_scores(Kv kv, const Item* items, uint32_t group, const float* logits, uint64_t plane, float* scores) {
    SHARED(float, memory);
    const Item item = ld_struct(items + blockIdx.y);
    const Head head = ld_struct(head_of(kv, item, blockIdx.x));
    float* stats = memory + 32;  // [group][2]
    for (uint32_t g = 0; g < group; g++) {
        const float* own = logits + g * plane + head.meta;
        float most = -INFINITE, total = 0.0f;
        for (uint32_t t = threadIdx.x; t < head.tokens; t += blockDim.x) most = fmaxf(most, ld(own + t));
        most = block_most(most, memory);
        if (most != -INFINITE) {
            for (uint32_t t = threadIdx.x; t < head.tokens; t += blockDim.x) total += expf(ld(own + t) - most);
        }
        total = block_sum(total, memory);
        if (threadIdx.x == 0) stats[2 * g] = most, stats[2 * g + 1] = total;
    }
    __syncthreads();
    const uint32_t lanes = lanes_of(kv.dim), slot = threadIdx.x / lanes, slots = blockDim.x / lanes, c = threadIdx.x % lanes;
    for (uint32_t first = 0; first < head.tokens; first += slots) {
        const uint32_t t = first + slot;
        float v[8] = {}, squares = 0.0f;
        if (t < head.tokens && 8 * c < kv.dim) value8(kv, head, t, c, v);
#pragma unroll
        for (int j = 0; j < 8; j++) squares = fmaf(v[j], v[j], squares);
        squares = sum_of(squares, lanes);
        if (t >= head.tokens || c != 0) continue;
        float sum = 0.0f;
        bool sink = true;
        for (uint32_t g = 0; g < group; g++) {
            const float logit = ld(logits + g * plane + head.meta + t);
            if (logit == -INFINITE) continue;
            sink = false;
            sum += expf(logit - stats[2 * g]) / stats[2 * g + 1];
        }
        st(scores + head.meta + t, sink ? INFINITE : sum / float(group) * sqrtf(squares));
    }
}
KERNEL(expected_scores)
