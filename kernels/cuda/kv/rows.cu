// Whole tokens as rows next to each other, on their way to slower memory and back.
//
// Reads and writes each key and value once: memory, of which the bus to the host is the slowest part.
//
// A row has the bytes of a key, then those of a value. Rows of item i and KV head h begin at row `from[i * kv_heads + h]` of
// `rows`. Launch: grid (ceil(most tokens * 2 * dim * bytes / 8 / 256), kv_heads, items), 256 threads: a thread moves 8 bytes.
#include "../common.cuh"

DEVICE uint2* piece_of(const Kv& kv, const Head& head, uint32_t token, uint32_t piece, uint32_t pieces) {
    const bool is_key = piece < pieces;
    uint8_t* half = half_at(kv, is_key ? head.k_whole : head.v_whole, token / BLOCK_TOKENS, piece % pieces == 0);
    return reinterpret_cast<uint2*>(half) + token % BLOCK_TOKENS * pieces + piece % pieces;
}

// The newest `Item::rows` tokens of each head.
extern "C" __global__ void __launch_bounds__(256) rows_out(Kv kv, const Item* items, const uint32_t* from, uint2* rows) {
    const Item item = ld_struct(items + blockIdx.z);
    const Head head = ld_struct(head_of(kv, item, blockIdx.y));
    const uint32_t pieces = kv.dim * bytes_of(kv.format) / 8, i = blockIdx.x * blockDim.x + threadIdx.x;
    const uint32_t n = i / (2 * pieces), piece = i % (2 * pieces), count = min_of(item.rows, head.tokens);
    if (n >= count) return;
    const size_t row = size_t(ld_same(from + blockIdx.z * kv.kv_heads + blockIdx.y, threadIdx.x == 0)) + n;
    st(rows + row * 2 * pieces + piece, ld(piece_of(kv, head, head.tokens - count + n, piece, pieces)));
}
KERNEL(rows_out)

// All `Head::tokens` tokens of each head, with their positions.
extern "C" __global__ void __launch_bounds__(256)
    rows_in(Kv kv, const Item* items, const uint32_t* from, const uint2* rows, const uint32_t* positions) {
    const Item item = ld_struct(items + blockIdx.z);
    const Head head = ld_struct(head_of(kv, item, blockIdx.y));
    const uint32_t pieces = kv.dim * bytes_of(kv.format) / 8, i = blockIdx.x * blockDim.x + threadIdx.x;
    const uint32_t n = i / (2 * pieces), piece = i % (2 * pieces);
    if (n >= head.tokens) return;
    const size_t row = size_t(ld_same(from + blockIdx.z * kv.kv_heads + blockIdx.y, threadIdx.x == 0)) + n;
    st(piece_of(kv, head, n, piece, pieces), ld(rows + row * 2 * pieces + piece));
    if (piece == 0) st(kv.positions + head.meta + n, ld(positions + row));
}
KERNEL(rows_in)
