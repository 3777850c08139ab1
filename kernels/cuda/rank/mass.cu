// The attention that cached tokens receive from query rows of a step, worked out again from queries, keys and the softmax's
// denominators: what is tallied, and what rankings by attention look at.
//
// Reads the keys once and the queries once per 32 tokens (from a cache, as all tokens need them); computes 2 dim FLOPs and an
// exponential for each query that counts and each token that it sees. Memory while few rows count (decode steps, windows of
// 32), FLOPs where whole prompts are tallied.
//
// Launch: grid (ceil(most tokens / 32), kv_heads, items), 128 threads, 4 (64 (dim + 4) + 32 x 33 + 96) bytes of shared memory.
// Rows are added to a token's sum one by one, so chunks of a prompt give what the whole does.
#include "../attend/tile.cuh"

// What counts of an item.
struct Counted {
    uint32_t last;   // its last rows
    uint32_t fresh;  // its newest tokens, whose sums begin at zero; all of them: sums begin anew
    float weight;    // of each row and head
    uint32_t unused;
};

// Adds to `sums` [meta + token], over the group's heads; with `plane` numbers between them if it is not 0, each head's apart.
extern "C" __global__ void __launch_bounds__(TILE_THREADS, 2)
    mass(Kv kv, const Item* items, const Counted* counted, Rows qkv, uint32_t heads, float scale, float softcap,
         uint32_t window, const float* lse, float* sums, uint64_t plane) {
    SHARED(float, memory);
    const Item item = ld_struct(items + blockIdx.z);
    const Counted what = ld_struct(counted + blockIdx.z);
    const Head head = ld_struct(head_of(kv, item, blockIdx.y));
    const uint32_t token = blockIdx.x * SIDE, dim = kv.dim, tid = threadIdx.x, all = heads / kv.kv_heads;
    if (token >= head.tokens) return;
    float* queries = memory;
    float* block = queries + SIDE * tile_stride(dim);
    float* scores = block + SIDE * tile_stride(dim);  // [32][33]
    float* bases = scores + SIDE * (SIDE + 1);         // [32]
    uint32_t* starts = reinterpret_cast<uint32_t*>(bases + SIDE);
    uint32_t* ends = starts + SIDE;
    load_block(kv, head, true, token, head.tokens, block);
    const uint32_t groups = plane != 0 ? all : 1, group = plane != 0 ? 1 : all;
    for (uint32_t g = 0; g < groups; g++) {
        const bool adds = tid < SIDE && token + tid < head.tokens;
        float* own = sums + g * plane + head.meta + token + tid;
        const uint32_t known = head.tokens - min_of(what.fresh, head.tokens);
        float sum = adds && token + tid < known ? ld(own) : 0.0f;
        const uint32_t skipped = (item.rows - min_of(what.last, item.rows)) * group, end = item.rows * group;
        for (uint32_t first = skipped; first < end; first += SIDE) {
            const Queries q{first, min_of(end - first, SIDE), group, item.first_row, blockIdx.y * all + g};
            __syncthreads();
            load_queries(qkv, q, dim, queries);
            if (tid < SIDE) {
                const uint32_t n = first + tid;
                const bool there = tid < q.count;
                const Seen seen = there ? seen_by(kv, head, item, n / group, nullptr, window) : Seen{0, 0};
                starts[tid] = seen.start;
                ends[tid] = seen.end;
                bases[tid] = there ? ld(lse + size_t(item.first_row + n / group) * heads + q.h + n % group) : 0.0f;
            }
            __syncthreads();
            float product[2][4];
            products(queries, block, dim, product);
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const uint32_t m = tid / 8 * 2 + r;
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const uint32_t t = tid % 8 + 8 * j;
                    const bool sees = token + t >= starts[m] && token + t < ends[m];
                    const float score = to_score(product[r][j], scale, softcap);
                    scores[m * (SIDE + 1) + t] = sees ? expf(score - bases[m]) : 0.0f;
                }
            }
            __syncthreads();
            if (adds) {
                for (uint32_t m = 0; m < q.count; m++) sum = fmaf(scores[m * (SIDE + 1) + tid], what.weight, sum);
            }
        }
        if (adds) st(own, sum);
    }
}
KERNEL(mass)
