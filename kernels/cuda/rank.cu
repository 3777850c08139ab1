// Scores of cached tokens from what is known of each: its position, its tally, its neighbours'.
//
// Reads one or two numbers a token (`pool` of them, from a cache, where scores are pooled) and writes one: memory, and so
// little of it that the launch counts.
//
// Launch of all: grid (ceil(most tokens / 256), kv_heads, items), 256 threads. Scores and tallies lie by `Head::meta`.
#include "common.cuh"

#define TOKEN                                                                   \
    const Item item = ld_struct(items + blockIdx.z);                            \
    const Head head = ld_struct(head_of(kv, item, blockIdx.y));                 \
    const uint32_t t = blockIdx.x * blockDim.x + threadIdx.x;                   \
    if (t >= head.tokens) return;                                               \
    const size_t at = size_t(head.meta) + t;

extern "C" __global__ void __launch_bounds__(256) rank_recency(Kv kv, const Item* items, float* scores) {
    TOKEN
    st(scores + at, float(ld(kv.positions + at)));
}
KERNEL(rank_recency)

// One step of SplitMix64.
DEVICE uint64_t mixed(uint64_t x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

extern "C" __global__ void __launch_bounds__(256)
    rank_chance(Kv kv, const Item* items, uint32_t seed, uint32_t layer, float* scores) {
    TOKEN
    const uint64_t draw = mixed(mixed(seed) ^ (uint64_t(layer) << 32 | blockIdx.y));
    st(scores + at, float(mixed(draw ^ ld(kv.positions + at)) >> 40) / 16777216.0f);
}
KERNEL(rank_chance)

// The tally; divided by the number of tokens that could attend to it if `mean`. The newest `fresh` tokens have none yet.
extern "C" __global__ void __launch_bounds__(256)
    rank_tallied(Kv kv, const Item* items, const float* tally, uint32_t fresh, uint32_t mean, float* scores) {
    TOKEN
    float score = t < head.tokens - min_of(fresh, head.tokens) ? ld(tally + at) : 0.0f;
    if (mean) {
        const uint32_t p = ld(kv.positions + at);
        score /= float(item.seen > p + 1 ? item.seen - p : 1);
    }
    st(scores + at, score);
}
KERNEL(rank_tallied)

// Each of the first `end` numbers pooled with its neighbours among them, `pool` with itself: their mean, where missing ones
// count as zero, or the largest.
DEVICE float pooled(const float* values, uint32_t i, uint32_t end, uint32_t pool, bool largest) {
    const uint32_t first = i > pool / 2 ? i - pool / 2 : 0;
    const uint32_t last = min_of(i + pool - pool / 2, end);
    float result = largest ? -INFINITE : 0.0f;
    for (uint32_t n = first; n < last; n++) {
        const float x = ld_same(values + n, n == i);
        result = largest ? fmaxf(result, x) : result + x;
    }
    return largest ? result : result / float(pool);
}

// Pooled tallies. With `exclude` the tokens of the last `exclude` positions stay as they are and are nobody's neighbours.
extern "C" __global__ void __launch_bounds__(256)
    rank_window(Kv kv, const Item* items, const float* tally, uint32_t exclude, uint32_t pool, uint32_t largest,
                float* scores) {
    TOKEN
    uint32_t end = head.tokens;
    if (exclude > 0) {
        const uint32_t bound = item.seen > exclude ? item.seen - exclude : 0;
        const uint32_t* positions = kv.positions + head.meta;
        uint32_t low = 0;
        while (low < end) {
            const uint32_t middle = (low + end) / 2;
            if (ld_same(positions + middle, threadIdx.x == 0) < bound) low = middle + 1;
            else end = middle;
        }
    }
    st(scores + at, t < end ? pooled(tally + head.meta, t, end, pool, largest != 0) : ld(tally + at));
}
KERNEL(rank_window)

// The largest over the group's heads, whose sums are `plane` numbers apart, and over neighbours; nothing for the newest.
extern "C" __global__ void __launch_bounds__(256)
    rank_newest(Kv kv, const Item* items, const float* sums, uint64_t plane, uint32_t group, uint32_t pool, float* scores) {
    TOKEN
    const uint32_t others = head.tokens - 1;
    float most = 0.0f;
    if (t < others) {
        for (uint32_t g = 0; g < group; g++) {
            most = fmaxf(most, pooled(sums + g * plane + head.meta, t, others, pool, true));
        }
    }
    st(scores + at, most);
}
KERNEL(rank_newest)

// The mean of all KV heads' sums at a token's position; heads that have dropped it give it none.
extern "C" __global__ void __launch_bounds__(256) rank_last(Kv kv, const Item* items, const float* sums, float* scores) {
    TOKEN
    const uint32_t position = ld(kv.positions + at);
    float sum = 0.0f;
    for (uint32_t h = 0; h < kv.kv_heads; h++) {
        const Head* other = head_of(kv, item, h);
        const uint32_t meta = ld_same(&other->meta, threadIdx.x == 0);
        uint32_t low = 0, high = ld_same(&other->tokens, threadIdx.x == 0);
        const uint32_t end = high;
        // Where it would be if this head had dropped nothing is the first guess.
        if (t < end && ld(kv.positions + meta + t) == position) low = high = t;
        while (low < high) {
            const uint32_t middle = (low + high) / 2;
            if (ld(kv.positions + meta + middle) < position) low = middle + 1;
            else high = middle;
        }
        if (low < end && ld(kv.positions + meta + low) == position) sum += ld(sums + meta + low);
    }
    st(scores + at, sum * (1.0f / float(kv.kv_heads)));
}
KERNEL(rank_last)

// Replaces the numbers of listed tokens: those of a partial cache, which stand at the front of it in the order of `list`
// [item][kv_head][most], go where the tokens stand in the cache. Grid (ceil(most / 256), kv_heads, items), 256 threads.
extern "C" __global__ void __launch_bounds__(256)
    rank_put(Kv kv, Kv part, const Item* items, const uint32_t* list, uint32_t most, const uint32_t* counts,
             const float* from, float* sums) {
    const Item item = ld_struct(items + blockIdx.z);
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x, place = blockIdx.z * kv.kv_heads + blockIdx.y;
    if (i >= ld_same(counts + place, threadIdx.x == 0)) return;
    const uint32_t meta = ld_same(&head_of(kv, item, blockIdx.y)->meta, threadIdx.x == 0);
    const uint32_t source = ld_same(&head_of(part, item, blockIdx.y)->meta, threadIdx.x == 0);
    st(sums + meta + ld(list + size_t(place) * most + i), ld(from + source + i));
}
KERNEL(rank_put)
