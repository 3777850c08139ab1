// Attention of several query rows per sequence over its paged cache, causal inside the step.
//
// Computes 4 dim FLOPs for each query and each key that it sees; moves keys and values once per 32 queries, so 32 rows of a
// KV head with G query heads take 2 x 32 G dim FLOPs a byte in 16 bits and less: FLOPs. This version multiplies in single
// precision on the ordinary units, for any form of the cache, and is the one that others are held to.
//
// Launch: grid (ceil(most rows of an item * group / 32), kv_heads, items), 128 threads, 4 (64 (dim + 4) + 32 x 34 + 96) bytes
// of shared memory. The softmax is rescaled block by block; where a query sees none of a block nothing of it changes, so that
// its output does not depend on the others of its tile, nor on how a prompt is cut into chunks.
#include "tile.cuh"

extern "C" __global__ void __launch_bounds__(TILE_THREADS, 2)
    attend_prefill(Kv kv, const Item* items, Rows qkv, uint32_t heads, float scale, float softcap, uint32_t window,
                   const uint32_t* at, Rows out, float* lse) {
    SHARED(float, memory);
    const Item item = ld_struct(items + blockIdx.z);
    const uint32_t group = heads / kv.kv_heads, dim = kv.dim, tid = threadIdx.x, C = dim / 8;
    const uint32_t first = blockIdx.x * SIDE, all = item.rows * group;
    if (first >= all) return;
    const Queries q{first, min_of(all - first, SIDE), group, item.first_row, blockIdx.y * group};
    const Head head = ld_struct(head_of(kv, item, blockIdx.y));
    float* queries = memory;                          // [32][dim + 4]
    float* block = queries + SIDE * tile_stride(dim);  // [32][dim + 4]: keys, then values
    float* scores = block + SIDE * tile_stride(dim);   // [32][33]
    float* factors = scores + SIDE * (SIDE + 1);       // [32]
    uint32_t* starts = reinterpret_cast<uint32_t*>(factors + SIDE);  // [32]
    uint32_t* ends = starts + SIDE;                                  // [32]
    load_queries(qkv, q, dim, queries);
    if (tid < SIDE) {
        const Seen seen = tid < q.count ? seen_by(kv, head, item, (first + tid) / group, at, window) : Seen{0, 0};
        starts[tid] = seen.start;
        ends[tid] = seen.end;
    }
    __syncthreads();
    uint32_t low = 0xffffffff, high = 0;
    for (uint32_t m = 0; m < q.count; m++) {
        if (starts[m] < ends[m]) low = min_of(low, starts[m]);
        high = max_of(high, ends[m]);
    }

    // A thread has two queries and the pieces tid % 8 + 8 i of their channels; of the softmax, lane tid % 4 of query tid / 4.
    float acc[2][4][8];
#pragma unroll
    for (int r = 0; r < 2; r++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int j = 0; j < 8; j++) acc[r][i][j] = 0.0f;
        }
    }
    const uint32_t mine = tid / 4, two = tid / 8 * 2;
    float most = -INFINITE, total = 0.0f;
    for (uint32_t token = low / SIDE * SIDE; token < high; token += SIDE) {
        __syncthreads();
        load_block(kv, head, true, token, high, block);
        __syncthreads();
        float sums[2][4];
        products(queries, block, dim, sums);
#pragma unroll
        for (int r = 0; r < 2; r++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const uint32_t t = tid % 8 + 8 * j;
                const bool sees = token + t >= starts[two + r] && token + t < ends[two + r];
                scores[(two + r) * (SIDE + 1) + t] = sees ? to_score(sums[r][j], scale, softcap) : -INFINITE;
            }
        }
        __syncthreads();
        load_block(kv, head, false, token, high, block);
        float* row = scores + mine * (SIDE + 1);
        float peak = -INFINITE, sum = 0.0f;
        for (uint32_t t = tid % 4; t < SIDE; t += 4) peak = fmaxf(peak, row[t]);
        peak = fmaxf(most, most_of(peak, 4));
        // A query that has seen nothing yet has no maximum to subtract.
        const float factor = most == peak ? 1.0f : expf(most - peak);
        for (uint32_t t = tid % 4; t < SIDE; t += 4) {
            const float weight = row[t] == -INFINITE ? 0.0f : expf(row[t] - peak);
            row[t] = weight;
            sum += weight;
        }
        total = total * factor + sum_of(sum, 4);
        most = peak;
        if (tid % 4 == 0) factors[mine] = factor;
        __syncthreads();
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float by = factors[two + r];
            if (by == 1.0f) continue;
#pragma unroll
            for (int i = 0; i < 4; i++) {
#pragma unroll
                for (int j = 0; j < 8; j++) acc[r][i][j] *= by;
            }
        }
        for (uint32_t t = 0; t < SIDE; t++) {
            const float a = scores[two * (SIDE + 1) + t], b = scores[(two + 1) * (SIDE + 1) + t];
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) {
                const uint32_t c = tid % 8 + 8 * i;
                if (c >= C) continue;
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    const float v = block[t * tile_stride(dim) + 8 * c + j];
                    acc[0][i][j] = fmaf(a, v, acc[0][i][j]);
                    acc[1][i][j] = fmaf(b, v, acc[1][i][j]);
                }
            }
        }
    }
    __syncthreads();
    if (tid % 4 == 0) {
        factors[mine] = total > 0.0f ? 1.0f / total : 0.0f;
        if (mine < q.count && lse != nullptr) {
            const size_t to = size_t(item.first_row + (first + mine) / group) * heads + q.h + (first + mine) % group;
            st(lse + to, total > 0.0f ? most + logf(total) : -INFINITE);
        }
    }
    __syncthreads();
#pragma unroll
    for (uint32_t r = 0; r < 2; r++) {
        if (two + r >= q.count) continue;
        const uint32_t n = first + two + r;
        const size_t to = size_t(item.first_row + n / group) * out.width + (q.h + n % group) * dim;
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            const uint32_t c = tid % 8 + 8 * i;
            if (c >= C) continue;
#pragma unroll
            for (int j = 0; j < 8; j++) acc[r][i][j] = acc[r][i][j] * factors[two + r] + 0.0f;
            store8(out.type, out.data, to + 8 * c, acc[r][i]);
        }
    }
}
KERNEL(attend_prefill)
