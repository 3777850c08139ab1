// Chosen tokens, copied next to each other: attention over them is then ordinary attention, to the bit.
//
// Reads and writes the keys and values of chosen tokens once. Memory. Attention that reads them where they are would spare
// the copy, but a set per query head leaves no group to share a read, and its pages are read for several heads anyhow.
//
// Launch: grid (ceil(most chosen * 2 * dim / 8 / 256), sets, items), 256 threads. `from` are the caches, all of whole
// tokens or not; `to` the scratch caches (or partial ones), whole, with `sets` heads per item and `Item::sequence` counted by
// item: head item * sets + set. Set s is of KV head s * kv_heads / sets. The list of a set lies at `chosen` [item][set][most],
// or by the meta of its cache if `most` is 0; `counts` [item][set], at most the tokens of the cache.
#include "cache.cuh"

extern "C" __global__ void __launch_bounds__(256, 2)
    gather(Kv from, Kv to, const Item* items, const uint32_t* chosen, uint32_t most, const uint32_t* counts) {
    const Item item = ld_struct(items + blockIdx.z);
    const uint32_t sets = to.kv_heads, set = blockIdx.y, place = blockIdx.z * sets + set;
    const Head head = ld_struct(head_of(from, item, set * from.kv_heads / sets));
    const Head target = ld_struct(to.heads + place);
    const uint32_t C = from.dim / 8, i = blockIdx.x * blockDim.x + threadIdx.x, token = i / (2 * C), c = i % C;
    if (token >= min_of(ld_same(counts + place, threadIdx.x == 0), head.tokens)) return;
    const uint32_t* list = most == 0 ? chosen + head.meta : chosen + size_t(place) * most;
    const bool is_key = i / C % 2 == 0;
    const uint32_t source = ld_same(list + token, c == 0);
    float x[8];
    if (is_key) key8(from, head, source, c, x);
    else value8(from, head, source, c, x);
    uint8_t* half = half_at(to, is_key ? target.k_whole : target.v_whole, token / BLOCK_TOKENS, c == 0);
    store8(to.format, half, size_t(token % BLOCK_TOKENS) * to.dim + 8 * c, x);
    if (is_key && c == 0) st(to.positions + target.meta + token, ld(from.positions + head.meta + source));
}
KERNEL(gather)
