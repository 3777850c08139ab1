// Eviction: the best tokens of each head stay, in place and in order.
//
// `evict_choose` reads a score and a position a token five times (four from a cache) and writes the places of those that
// stay, all of them where nothing has to go. `evict_compact` reads and writes the keys and values behind the first gap once,
// 16 bytes at a time: all of its time.
// FLOPs: none worth counting. Memory.
//
// Launch of `evict_choose`: grid (kv_heads, items), 256 to 1,024 threads, 1,152 bytes of shared memory. Of `evict_compact`:
// grid (ceil(row bytes / 64), 2 kv_heads, items), 256 threads. Of `evict_numbers`: grid (kv_heads, items), 256 threads. All
// take `keep`, a number per item and KV head, and `kept`, which lies by `Head::meta`. `Head::tokens` is what it was before;
// the caller changes it and takes the blocks back.
//
// A token never moves to a later place, so what a stretch of targets overwrites lies in front of everything that later
// stretches read: a stretch is read, then written. Columns of 64 bytes don't depend on each other, which gives a small batch
// blocks enough; moving to fresh halves instead would need memory in the moment that it is short.
#include "order.cuh"

extern "C" __global__ void __launch_bounds__(1024)
    evict_choose(Kv kv, const Item* items, const float* scores, const uint32_t* keep, Protect protect, uint32_t* kept) {
    SHARED(uint32_t, counts);
    uint32_t* scratch = counts + 256;
    const Item item = ld_struct(items + blockIdx.y);
    const Head head = ld_struct(head_of(kv, item, blockIdx.x));
    const uint32_t stay = ld_same(keep + blockIdx.y * kv.kv_heads + blockIdx.x, threadIdx.x == 0);
    const auto of = [&](uint32_t t) {
        return ordinal_of(ld(scores + head.meta + t), ld(kv.positions + head.meta + t), item.seen, protect);
    };
    const auto take = [&](uint32_t place, uint32_t t) { st(kept + head.meta + place, t); };
    choose(head.tokens, min_of(stay, head.tokens), counts, scratch, of, take);
}
KERNEL(evict_choose)

// The first of the tokens that stay which moves.
DEVICE uint32_t first_moved(const uint32_t* kept, uint32_t stay) {
    uint32_t low = 0, high = stay;
    while (low < high) {
        const uint32_t middle = (low + high) / 2;
        if (ld_same(kept + middle, threadIdx.x == 0) == middle) low = middle + 1;
        else high = middle;
    }
    return low;
}

template <class Piece>
DEVICE void compact(const Kv& kv, uint32_t table, uint32_t stay, const uint32_t* kept, uint32_t bytes) {
    constexpr uint32_t AT_ONCE = 4, WIDTH = UNIT / sizeof(Piece);
    const uint32_t column = blockIdx.x * WIDTH + threadIdx.x % WIDTH, slot = threadIdx.x / WIDTH;
    const uint32_t slots = blockDim.x / WIDTH;
    const bool mine = column * sizeof(Piece) < bytes;
    const auto place = [&](uint32_t token) {
        // Neighbours share an entry of the table.
        const bool first = threadIdx.x % WIDTH == 0 && token % BLOCK_TOKENS == 0;
        uint8_t* half = half_at(kv, table, token / BLOCK_TOKENS, first);
        return reinterpret_cast<Piece*>(half + size_t(token % BLOCK_TOKENS) * bytes) + column;
    };
    for (uint32_t first = first_moved(kept, stay); first < stay; first += AT_ONCE * slots) {
        Piece held[AT_ONCE];
#pragma unroll
        for (uint32_t i = 0; i < AT_ONCE; i++) {
            const uint32_t to = first + slot + i * slots;
            if (mine && to < stay) held[i] = ld(place(ld_same(kept + to, threadIdx.x % WIDTH == 0)));
        }
        __syncthreads();
#pragma unroll
        for (uint32_t i = 0; i < AT_ONCE; i++) {
            const uint32_t to = first + slot + i * slots;
            if (mine && to < stay) st(place(to), held[i]);
        }
        __syncthreads();
    }
}

// Keys and values of heads with nothing but whole tokens.
extern "C" __global__ void __launch_bounds__(256)
    evict_compact(Kv kv, const Item* items, const uint32_t* keep, const uint32_t* kept) {
    const Item item = ld_struct(items + blockIdx.z);
    const uint32_t h = blockIdx.y / 2, bytes = kv.dim * bytes_of(kv.format);
    const Head head = ld_struct(head_of(kv, item, h));
    const uint32_t stay = ld_same(keep + blockIdx.z * kv.kv_heads + h, threadIdx.x == 0);
    if (stay >= head.tokens) return;
    const uint32_t table = blockIdx.y % 2 == 0 ? head.k_whole : head.v_whole;
    if (bytes % 16 == 0) compact<uint4>(kv, table, stay, kept + head.meta, bytes);
    else compact<uint2>(kv, table, stay, kept + head.meta, bytes);
}
KERNEL(evict_compact)

// A number per token: positions, tallies. The newest `fresh` tokens have none yet and get `none`.
extern "C" __global__ void __launch_bounds__(256)
    evict_numbers(Kv kv, const Item* items, const uint32_t* keep, const uint32_t* kept, uint32_t* numbers, uint32_t fresh,
                  uint32_t none) {
    const Item item = ld_struct(items + blockIdx.y);
    const Head head = ld_struct(head_of(kv, item, blockIdx.x));
    const uint32_t stay = ld_same(keep + blockIdx.y * kv.kv_heads + blockIdx.x, threadIdx.x == 0);
    if (stay >= head.tokens) return;
    const uint32_t known = head.tokens - min_of(fresh, head.tokens);
    for (uint32_t first = 0; first < stay; first += blockDim.x) {
        const uint32_t to = first + threadIdx.x;
        uint32_t held = none;
        if (to < stay) {
            const uint32_t from = ld(kept + head.meta + to);
            if (from < known) held = ld(numbers + head.meta + from);
        }
        __syncthreads();
        if (to < stay) st(numbers + head.meta + to, held);
        __syncthreads();
    }
}
KERNEL(evict_numbers)

// How many tokens each head of an item keeps if they share `kv_heads * mean`: every head its `guaranteed` best, then the
// best of all heads together, among equals those of the lower head. A bound is found bit by bit, each time counting what
// lies above. Grid (items), 256 to 1,024 threads, 256 bytes of shared memory.
extern "C" __global__ void __launch_bounds__(1024)
    evict_share(Kv kv, const Item* items, const float* scores, const uint32_t* mean, const uint32_t* guaranteed,
                Protect protect, uint32_t* keep) {
    SHARED(uint32_t, scratch);
    const Item item = ld_struct(items + blockIdx.x);
    const uint32_t each = ld_same(mean + blockIdx.x, threadIdx.x == 0);
    const uint32_t sure_of_all = min_of(ld_same(guaranteed + blockIdx.x, threadIdx.x == 0), each);
    const auto sure_of = [&](const Head& head) { return min_of(sure_of_all, head.tokens); };
    // Tokens of a head at or above a bound, beside those that it keeps in any case.
    const auto above = [&](const Head& head, uint64_t least) {
        uint32_t mine = 0, all;
        for (uint32_t t = threadIdx.x; t < head.tokens; t += blockDim.x) {
            const float score = ld(scores + head.meta + t);
            mine += ordinal_of(score, ld(kv.positions + head.meta + t), item.seen, protect) >= least;
        }
        block_before(mine, scratch, &all);
        __syncthreads();
        const uint32_t sure = sure_of(head);
        return all > sure ? all - sure : 0;
    };
    uint32_t left = kv.kv_heads * each, tokens = 0;
    for (uint32_t h = 0; h < kv.kv_heads; h++) {
        const Head head = ld_struct(head_of(kv, item, h));
        left -= min_of(left, sure_of(head));
        tokens += head.tokens - sure_of(head);
    }
    left = min_of(left, tokens);
    uint32_t bound = 0;
    for (uint32_t bit = 1u << 31; bit > 0; bit >>= 1) {
        uint32_t count = 0;
        for (uint32_t h = 0; h < kv.kv_heads; h++) count += above(ld_struct(head_of(kv, item, h)), bound | bit);
        if (count >= left) bound |= bit;
    }
    uint32_t taken = 0;
    for (uint32_t h = 0; h < kv.kv_heads; h++) taken += above(ld_struct(head_of(kv, item, h)), uint64_t(bound) + 1);
    for (uint32_t h = 0; h < kv.kv_heads; h++) {
        const Head head = ld_struct(head_of(kv, item, h));
        const uint32_t more = above(head, uint64_t(bound) + 1), equal = above(head, bound) - more;
        const uint32_t ties = min_of(equal, left - min_of(taken, left));
        taken += ties;
        if (threadIdx.x == 0) st(keep + blockIdx.x * kv.kv_heads + h, sure_of(head) + min_of(more, left) + ties);
    }
}
KERNEL(evict_share)
