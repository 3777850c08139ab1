// Keys that have moved up in the cache turn to their new place.
//
// Reads and writes the rotated channels of the keys that moved, and their angles (from a cache); six FLOPs a pair. Memory.
// It follows `evict_compact`, which moves columns apart, where a pair may lie in two.
//
// Launch: grid (ceil(most kept * pairs / 256), kv_heads, items), 256 threads. `table` as rope.cu has it; the factor that it
// holds is in the keys already, so `inverse` is one over it.
#include "../common.cuh"

extern "C" __global__ void __launch_bounds__(256)
    evict_turn(Kv kv, const Item* items, const uint32_t* keep, const uint32_t* kept, const float* table, uint32_t pairs,
               uint32_t interleaved, float inverse) {
    const Item item = ld_struct(items + blockIdx.z);
    const Head head = ld_struct(head_of(kv, item, blockIdx.y));
    const uint32_t stay = ld_same(keep + blockIdx.z * kv.kv_heads + blockIdx.y, threadIdx.x == 0);
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x, to = i / pairs, pair = i % pairs;
    if (stay >= head.tokens || to >= stay) return;
    const uint32_t by = ld_same(kept + head.meta + to, pair == 0) - to;
    if (by == 0) return;
    const float* angles = table + size_t(by) * 2 * pairs;
    const float cos = ld(angles + pair) * inverse, sin = -ld(angles + pairs + pair) * inverse;
    uint8_t* half = half_at(kv, head.k_whole, to / BLOCK_TOKENS, pair == 0);
    const size_t row = size_t(to % BLOCK_TOKENS) * kv.dim;
    const size_t a = row + (interleaved ? 2 * pair : pair), b = interleaved ? a + 1 : a + pairs;
    const float x = load1(kv.format, half, a), y = load1(kv.format, half, b);
    store1(kv.format, half, a, x * cos - y * sin);
    store1(kv.format, half, b, y * cos + x * sin);
}
KERNEL(evict_turn)
