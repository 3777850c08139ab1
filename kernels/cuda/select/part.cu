// Partial caches: who leaves them when, and the newest token into the place of who does.
//
// `evict_choose` with the newest token protected and `gather` fill a partial cache. `part_order` reads and writes a number a
// token 32 times, once a refresh. `append_part` moves a token's keys and values. Memory.
//
// Launch of `part_order`: grid (kv_heads, items), 256 threads, 128 bytes of shared memory. Of `append_part`: grid
// (kv_heads, items), 64 threads.
#include "../cache.cuh"
#include "../order.cuh"

// `order` and `other` [item][kv_head][room]: the places in the partial cache, the first to leave first, the newest last. Of
// equal ones the later leaves first. `kept` and `scores` lie by the meta of the cache; `counts` [item][kv_head].
extern "C" __global__ void __launch_bounds__(256)
    part_order(Kv kv, const Item* items, const float* scores, const uint32_t* kept, const uint32_t* counts, uint32_t room,
               uint32_t* order, uint32_t* other) {
    SHARED(uint32_t, scratch);
    const Item item = ld_struct(items + blockIdx.y);
    const uint32_t place = blockIdx.y * kv.kv_heads + blockIdx.x;
    const Head head = ld_struct(head_of(kv, item, blockIdx.x));
    const uint32_t count = min_of(ld_same(counts + place, threadIdx.x == 0), head.tokens);
    if (count == 0) return;
    uint32_t* own = order + size_t(place) * room;
    for (uint32_t i = threadIdx.x; i + 1 < count; i += blockDim.x) st(own + i, count - 2 - i);
    if (threadIdx.x == 0) st(own + count - 1, count - 1);
    const auto of = [&](uint32_t slot) {
        return ordinal_of(ld(scores + head.meta + ld(kept + head.meta + slot)), 0, 1, Protect{0, 0});
    };
    sort(count - 1, own, other + size_t(place) * room, scratch, of);
}
KERNEL(part_order)

// Copies the newest token of each cache into its partial cache (`to`, head item * kv_heads + h), of which `filled` tokens came
// with the last refresh and `added` since, so many in all items' heads: behind the others while there is room for `room`,
// then in the place of the first to leave, who is the last to leave from then on.
extern "C" __global__ void __launch_bounds__(64)
    append_part(Kv from, Kv to, const Item* items, const uint32_t* filled, const uint32_t* added, uint32_t room,
                uint32_t* order) {
    const Item item = ld_struct(items + blockIdx.y);
    const uint32_t place = blockIdx.y * from.kv_heads + blockIdx.x, C = from.dim / 8;
    const Head head = ld_struct(head_of(from, item, blockIdx.x)), target = ld_struct(to.heads + place);
    const uint32_t first = ld_same(filled + place, threadIdx.x == 0), since = ld_same(added + place, threadIdx.x == 0);
    const bool grows = first + since < room;
    uint32_t* own = order + size_t(place) * room;
    // The order turns like a ring: who takes a place stands behind the others.
    const uint32_t slot = grows ? first + since : ld_same(own + (first + since - room) % room, threadIdx.x == 0);
    const uint32_t token = head.tokens - 1, c = threadIdx.x % C;
    if (threadIdx.x < 2 * C) {
        const bool is_key = threadIdx.x < C;
        float x[8];
        if (is_key) key8(from, head, token, c, x);
        else value8(from, head, token, c, x);
        uint8_t* half = half_at(to, is_key ? target.k_whole : target.v_whole, slot / BLOCK_TOKENS, c == 0);
        store8(to.format, half, size_t(slot % BLOCK_TOKENS) * to.dim + 8 * c, x);
    }
    if (threadIdx.x == 0) {
        st(to.positions + target.meta + slot, ld(from.positions + head.meta + token));
        if (grows) st(own + slot, slot);
    }
}
KERNEL(append_part)
