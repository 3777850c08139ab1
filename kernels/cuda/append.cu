// Writes the step's keys and values, already rotated, into the caches.
//
// Reads 2 kv_heads dim numbers a row and writes as many in the cache's format: nothing but memory.
//
// Launch: grid (ceil(most rows of an item * kv_heads * 2 * dim / 8 / 256), items), 256 threads. A thread moves eight
// channels. `Head::tokens` counts the new tokens already (`advance_heads`), which stand at the end; halves are there for them.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256)
    append(Kv kv, const Item* items, Rows qkv, uint32_t key_offset, uint32_t value_offset, const uint32_t* positions) {
    const Item item = ld_struct(items + blockIdx.y);
    const uint32_t C = kv.dim / 8, per_row = 2 * kv.kv_heads * C, i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= item.rows * per_row) return;
    const uint32_t row = i / per_row, c = i % C, h = i / C % kv.kv_heads;
    const bool is_key = i % per_row < per_row / 2;
    const Head* head = head_of(kv, item, h);
    const bool first = c == 0 && row == 0;
    const uint32_t tokens = ld_same(&head->tokens, first), token = tokens - item.rows + row;
    const uint32_t table = ld_same(is_key ? &head->k_whole : &head->v_whole, first);
    uint8_t* half = half_at(kv, table, token / BLOCK_TOKENS, c == 0);
    const size_t from = size_t(item.first_row + row) * qkv.width + (is_key ? key_offset : value_offset) + h * kv.dim;
    float x[8];
    load8(qkv.type, qkv.data, from + 8 * c, x);
    store8(kv.format, half, size_t(token % BLOCK_TOKENS) * kv.dim + 8 * c, x);
    if (is_key && c == 0) {
        st(kv.positions + ld_same(&head->meta, first) + token, ld(positions + item.first_row + row));
    }
}
KERNEL(append)

// Counts the rows of a step as tokens of the heads of `layers` layers, whose heads lie `stride` apart. Grid
// (items, layers), 32 threads: a launch for all of a step.
extern "C" __global__ void __launch_bounds__(32)
    advance_heads(Head* heads, const Item* items, uint32_t kv_heads, uint32_t stride) {
    const Item item = ld_struct(items + blockIdx.x);
    for (uint32_t h = threadIdx.x; h < kv_heads; h += blockDim.x) {
        Head* head = heads + size_t(blockIdx.y) * stride + item.sequence * kv_heads + h;
        st(&head->tokens, ld(&head->tokens) + item.rows);
    }
}
KERNEL(advance_heads)
