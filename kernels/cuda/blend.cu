// Caches that are put together from stored rows (CacheBlend), and how far values of theirs are from new ones.
//
// `deviate` reads a new value and a stored one each and writes a number a row and KV head. `blend` reads a stored (or new) key
// and value a token and writes it to the cache, and reads angles (from a cache). Memory.
//
// A stored row has the keys of all KV heads, then their values. Launch of `deviate`: grid (ceil(most rows * lanes / 128),
// kv_heads, items), 128 threads, lanes as in rank/keys.cu. Of `blend`: grid (ceil(most tokens * dim / 256), kv_heads, items),
// 256 threads: a thread has two channels of a key or of a value.
#include "cache.cuh"

// Squared distances, by `Head::meta` and row, of the first `known` rows of an item; 0 for the others. New values are rounded
// as the cache would. Item i's stored rows begin at row `stored_from[i]`.
extern "C" __global__ void __launch_bounds__(128)
    deviate(Kv kv, const Item* items, Rows qkv, uint32_t value_offset, Rows stored, const uint32_t* stored_from,
            const uint32_t* known, float* scores) {
    const Item item = ld_struct(items + blockIdx.z);
    const uint32_t h = blockIdx.y, lanes = lanes_of(kv.dim), i = (blockIdx.x * blockDim.x + threadIdx.x) / lanes;
    const uint32_t c = threadIdx.x % lanes, compared = ld_same(known + blockIdx.z, threadIdx.x == 0);
    float sum = 0.0f;
    if (i < min_of(item.rows, compared) && 8 * c < kv.dim) {
        float a[8], b[8];
        load8(qkv.type, qkv.data, size_t(item.first_row + i) * qkv.width + value_offset + h * kv.dim + 8 * c, a);
        const size_t row = ld_same(stored_from + blockIdx.z, threadIdx.x == 0) + i;
        load8(stored.type, stored.data, row * stored.width + (kv.kv_heads + h) * kv.dim + 8 * c, b);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float far = rounded(kv.format, a[j]) - b[j];
            sum = fmaf(far, far, sum);
        }
    }
    sum = sum_of(sum, lanes);
    if (i < item.rows && c == 0) st(scores + ld_same(&head_of(kv, item, h)->meta, threadIdx.x == 0) + i, sum);
}
KERNEL(deviate)

// Fills a cache with `Head::tokens` tokens: stored rows, whose keys turn on by the place where their chunk begins, and new
// rows (keys and values at `key_offset`) in the places of theirs: `row_of` [stored_from + token] has the row of the step or
// 0xffffffff. Positions are 0 and up. `factor` is what `table` (as in rope.cu) holds beside the rotation.
extern "C" __global__ void __launch_bounds__(256)
    blend(Kv kv, const Item* items, Rows qkv, uint32_t key_offset, Rows stored, const uint32_t* stored_from,
          const uint32_t* row_of, uint32_t chunk, const float* table, uint32_t pairs, uint32_t interleaved, float factor) {
    const Item item = ld_struct(items + blockIdx.z);
    const Head head = ld_struct(head_of(kv, item, blockIdx.y));
    const uint32_t dim = kv.dim, i = blockIdx.x * blockDim.x + threadIdx.x, token = i / dim, two = i % (dim / 2);
    if (token >= head.tokens) return;
    const bool is_key = i % dim < dim / 2, turns = is_key && two < pairs;
    const size_t from = size_t(ld_same(stored_from + blockIdx.z, threadIdx.x == 0)) + token;
    const uint32_t row = ld_same(row_of + from, i % dim == 0);
    const bool fresh = row != 0xffffffff;
    uint32_t a = 2 * two, b = a + 1;
    if (turns && !interleaved) a = two, b = two + pairs;
    // Channels behind the rotated ones, in twos.
    const Rows& source = fresh ? qkv : stored;
    const size_t at = fresh ? size_t(row) * qkv.width + key_offset : from * stored.width;
    const size_t base = at + ((is_key ? 0 : kv.kv_heads) + blockIdx.y) * dim;
    float x = load1(source.type, source.data, base + a), y = load1(source.type, source.data, base + b);
    if (turns && !fresh) {
        const float* angles = table + size_t(token / chunk * chunk) * 2 * pairs;
        const float cos = ld(angles + two), sin = ld(angles + pairs + two), x0 = x;
        x = (x * cos - y * sin) / factor;
        y = (y * cos + x0 * sin) / factor;
    }
    uint8_t* half = half_at(kv, is_key ? head.k_whole : head.v_whole, token / BLOCK_TOKENS, two == 0);
    store1(kv.format, half, size_t(token % BLOCK_TOKENS) * dim + a, x);
    store1(kv.format, half, size_t(token % BLOCK_TOKENS) * dim + b, y);
    if (is_key && two == 0) st(kv.positions + head.meta + token, token);
}
KERNEL(blend)
