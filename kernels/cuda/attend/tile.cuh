// Products of 32 queries with the 32 keys of a block, in shared memory: what attention over prompts and the attention that
// tokens receive are made of. For blocks of 128 threads.
//
// A query is a row of the step and a head of the KV head's group: number m of an item is row m / group, head m % group.
#pragma once

#include "../cache.cuh"

constexpr uint32_t SIDE = 32, TILE_THREADS = 128;

// Floats of a row in shared memory: four more than it has, so that the same channels of neighbouring rows lie in different
// banks.
DEVICE uint32_t tile_stride(uint32_t dim) { return dim + 4; }

struct Queries {
    uint32_t first;          // number of the first
    uint32_t count;          // up to 32
    uint32_t group;          // heads that count
    uint32_t first_row, h;   // first row of the item, first query head
};

// The queries to `out` [32][stride]; zeros for those that are not there.
DEVICE void load_queries(const Rows& qkv, const Queries& q, uint32_t dim, float* out) {
    const uint32_t C = dim / 8;
    for (uint32_t i = threadIdx.x; i < SIDE * C; i += TILE_THREADS) {
        const uint32_t m = i / C, c = i % C, n = q.first + m;
        float x[8] = {};
        if (m < q.count) {
            load8(qkv.type, qkv.data, size_t(q.first_row + n / q.group) * qkv.width + (q.h + n % q.group) * dim + 8 * c, x);
        }
#pragma unroll
        for (int j = 0; j < 8; j++) out[m * tile_stride(dim) + 8 * c + j] = x[j];
    }
}

// Keys or values of the block from `token` on to `out` [32][stride]; zeros behind `end`.
DEVICE void load_block(const Kv& kv, const Head& head, bool keys, uint32_t token, uint32_t end, float* out) {
    const uint32_t C = kv.dim / 8;
    for (uint32_t i = threadIdx.x; i < SIDE * C; i += TILE_THREADS) {
        const uint32_t t = token + i / C, c = i % C;
        float x[8] = {};
        if (t < end) {
            if (keys) key8(kv, head, t, c, x);
            else value8(kv, head, t, c, x);
        }
#pragma unroll
        for (int j = 0; j < 8; j++) out[i / C * tile_stride(kv.dim) + 8 * c + j] = x[j];
    }
}

// scores[m][t] for this thread's two queries and four keys: queries 2 (i / 8) and one more, keys i % 8 + 8 j for thread i.
DEVICE void products(const float* queries, const float* keys, uint32_t dim, float sums[2][4]) {
    const float* q = queries + 2 * (threadIdx.x / 8) * tile_stride(dim);
    const float* k = keys + threadIdx.x % 8 * tile_stride(dim);
#pragma unroll
    for (int r = 0; r < 2; r++) {
#pragma unroll
        for (int j = 0; j < 4; j++) sums[r][j] = 0.0f;
    }
    for (uint32_t d = 0; d < dim; d++) {
        const float a = q[d], b = q[tile_stride(dim) + d];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float x = k[8 * j * tile_stride(dim) + d];
            sums[0][j] = fmaf(a, x, sums[0][j]);
            sums[1][j] = fmaf(b, x, sums[1][j]);
        }
    }
}

// The cached tokens that row `row` of an item sees: those up to its own, which are the last of the cache, or, where `at` has
// the positions of rows that stand anywhere, those up to that.
struct Seen {
    uint32_t start, end;
};
DEVICE Seen seen_by(const Kv& kv, const Head& head, const Item& item, uint32_t row, const uint32_t* at, uint32_t window) {
    const uint32_t after = item.rows - 1 - row;
    uint32_t end = head.tokens > after ? head.tokens - after : 0;
    const uint32_t* positions = kv.positions + head.meta;
    if (at != nullptr) {
        const uint32_t own = ld(at + item.first_row + row);
        uint32_t low = 0, high = head.tokens;
        while (low < high) {
            const uint32_t middle = (low + high) / 2;
            if (ld(positions + middle) <= own) low = middle + 1;
            else high = middle;
        }
        end = low;
    }
    uint32_t start = 0;
    if (window != 0 && end != 0) {
        const uint32_t own = ld(positions + end - 1);
        uint32_t high = end - 1;
        while (start < high) {
            const uint32_t middle = (start + high) / 2;
            if (uint64_t(ld(positions + middle)) + window <= own) start = middle + 1;
            else high = middle;
        }
    }
    return {start, end};
}
