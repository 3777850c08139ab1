// Extremes of the keys of neighbouring tokens, and the choice of pages by them.
//
// `page_index` reads the new keys once and reads and writes the extremes of their pages, 8 dim bytes each. `page_bounds`
// reads all extremes once per KV head: 8 dim bytes a page against 2 dim bytes a token, so with pages of 16 a quarter of the
// keys in 16 bits. Memory. The choices read a number a page or a token five times, from a cache.
//
// Extremes of head n = sequence * kv_heads + h lie at `low` and `high` [n][most_pages][dim]. Launch of `page_index`: grid
// (ceil(most pages with new tokens * lanes / 128), kv_heads, items), 128 threads, lanes as in rank/keys.cu. Of `page_bounds`:
// grid (ceil(most pages * lanes / 128), kv_heads, items), 128 threads. Of the choices: grid (sets, items), 256 threads,
// 1,152 bytes of shared memory; `select_shares` 4 (2 dim + 16) more.
#include "../cache.cuh"
#include "../order.cuh"

// `fresh`: an item's newest tokens that the index does not have; all of them: it is built anew.
extern "C" __global__ void __launch_bounds__(128)
    page_index(Kv kv, const Item* items, uint32_t page, const uint32_t* fresh, uint32_t most_pages, float* low, float* high) {
    const Item item = ld_struct(items + blockIdx.z);
    const Head head = ld_struct(head_of(kv, item, blockIdx.y));
    const uint32_t lanes = lanes_of(kv.dim), i = (blockIdx.x * blockDim.x + threadIdx.x) / lanes;
    const uint32_t c = threadIdx.x % lanes, more = min_of(ld_same(fresh + blockIdx.z, threadIdx.x == 0), head.tokens);
    const uint32_t from = head.tokens - more, p = from / page + i, first = p * page;
    const uint32_t start = max_of(first, from), end = min_of(first + page, head.tokens);
    if (8 * c >= kv.dim || start >= end) return;
    const size_t at = ((size_t(item.sequence) * kv.kv_heads + blockIdx.y) * most_pages + p) * kv.dim + 8 * c;
    float least[8], most[8];
    if (start > first) {
        load8<F32>(low + at, least);
        load8<F32>(high + at, most);
    }
    for (uint32_t t = start; t < end; t++) {
        float k[8];
        key8(kv, head, t, c, k);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            least[j] = t == first ? k[j] : fminf(least[j], k[j]);
            most[j] = t == first ? k[j] : fmaxf(most[j], k[j]);
        }
    }
    store8<F32>(low + at, least);
    store8<F32>(high + at, most);
}
KERNEL(page_index)

// What a product with a key of a page can be at most, summed over the group's heads or (`apart`) of each: `bounds`
// [item][set][most_pages].
extern "C" __global__ void __launch_bounds__(128)
    page_bounds(Kv kv, const Item* items, Rows qkv, uint32_t heads, uint32_t apart, uint32_t page, uint32_t most_pages,
                const float* low, const float* high, float* bounds) {
    const Item item = ld_struct(items + blockIdx.z);
    const Head head = ld_struct(head_of(kv, item, blockIdx.y));
    const uint32_t lanes = lanes_of(kv.dim), p = (blockIdx.x * blockDim.x + threadIdx.x) / lanes, c = threadIdx.x % lanes;
    const uint32_t group = heads / kv.kv_heads, pages = divided(head.tokens, page);
    const bool mine = p < pages && 8 * c < kv.dim;
    const size_t at = ((size_t(item.sequence) * kv.kv_heads + blockIdx.y) * most_pages + p) * kv.dim + 8 * c;
    float least[8] = {}, most[8] = {}, sum = 0.0f;
    if (mine) {
        load8<F32>(low + at, least);
        load8<F32>(high + at, most);
    }
    for (uint32_t g = 0; g < group; g++) {
        float q[8] = {};
        const uint32_t query = blockIdx.y * group + g;
        if (mine) {
            load8(qkv.type, qkv.data, size_t(item.first_row) * qkv.width + query * kv.dim + 8 * c, q, threadIdx.x < lanes);
        }
        float one = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; j++) one += fmaxf(q[j] * least[j], q[j] * most[j]);
        one = sum_of(one, lanes);
        sum += one;
        if (apart && c == 0 && p < pages) st(bounds + (size_t(blockIdx.z) * heads + query) * most_pages + p, one);
    }
    if (!apart && c == 0 && p < pages) st(bounds + (size_t(blockIdx.z) * kv.kv_heads + blockIdx.y) * most_pages + p, sum);
}
KERNEL(page_bounds)

DEVICE uint32_t ordinal(float x) { return ordinal_of(x, 0, 1, Protect{0, 0}); }

// The tokens of the best pages, as many whole pages as `tokens` holds, one at least; with `newest` the last page is one of
// them. `chosen` [item][set][most], ascending, and their number in `counts`.
extern "C" __global__ void __launch_bounds__(256)
    select_pages(Kv kv, const Item* items, const uint32_t* tokens, const float* bounds, uint32_t page, uint32_t most_pages,
                 uint32_t newest, uint32_t most, uint32_t* chosen, uint32_t* counts) {
    SHARED(uint32_t, memory);
    const Item item = ld_struct(items + blockIdx.y);
    const uint32_t sets = gridDim.x, set = blockIdx.x;
    const Head head = ld_struct(head_of(kv, item, set * kv.kv_heads / sets));
    const uint32_t wanted = ld_same(tokens + blockIdx.y, threadIdx.x == 0), pages = divided(head.tokens, page);
    const size_t place = size_t(blockIdx.y) * sets + set;
    const float* own = bounds + place * most_pages;
    uint32_t* out = chosen + place * most;
    if (wanted >= head.tokens) {
        for (uint32_t t = threadIdx.x; t < head.tokens; t += blockDim.x) st(out + t, t);
        if (threadIdx.x == 0) st(counts + place, head.tokens);
        return;
    }
    const uint32_t keep = min_of(max_of(wanted / page, 1), pages);
    const auto of = [&](uint32_t p) { return newest && p + 1 == pages ? SINK : ordinal(ld(own + p)); };
    // The last page alone may be short, and stands behind all others.
    const auto take = [&](uint32_t place, uint32_t p) {
        for (uint32_t t = p * page; t < min_of((p + 1) * page, head.tokens); t++) st(out + place * page + t - p * page, t);
        if (place + 1 == keep) st(counts + blockIdx.y * sets + set, (keep - 1) * page + min_of(page, head.tokens - p * page));
    };
    choose(pages, keep, memory, memory + 256, of, take);
}
KERNEL(select_pages)

// The tokens with the largest shares of attention, estimated with their page's extremes over the `channels` in which the
// group's queries are largest, added up over the group. All tokens of a page have the same share; the lower come first.
// `shares` [item][kv_head][most_pages] is scratch space. Other arguments as `select_pages`.
extern "C" __global__ void __launch_bounds__(256)
    select_shares(Kv kv, const Item* items, Rows qkv, uint32_t heads, const uint32_t* tokens, uint32_t channels,
                  uint32_t page, uint32_t most_pages, const float* low, const float* high, float* shares, uint32_t most,
                  uint32_t* chosen, uint32_t* counts) {
    SHARED(uint32_t, memory);
    const Item item = ld_struct(items + blockIdx.y);
    const Head head = ld_struct(head_of(kv, item, blockIdx.x));
    uint32_t* scratch = memory + 256;                             // [32]
    float* sizes = reinterpret_cast<float*>(scratch + 32);        // [dim]
    uint32_t* used = reinterpret_cast<uint32_t*>(sizes + kv.dim);  // [dim], the sign of their sum in the highest bit
    const uint32_t group = heads / kv.kv_heads, dim = kv.dim, pages = divided(head.tokens, page);
    const uint32_t wanted = ld_same(tokens + blockIdx.y, threadIdx.x == 0);
    const size_t place = size_t(blockIdx.y) * kv.kv_heads + blockIdx.x;
    const size_t index = (size_t(item.sequence) * kv.kv_heads + blockIdx.x) * most_pages * dim;
    const size_t queries = size_t(item.first_row) * qkv.width + blockIdx.x * group * dim;
    float* own = shares + place * most_pages;
    const uint32_t count = min_of(max_of(channels, 1), dim);
    for (uint32_t d = threadIdx.x; d < dim; d += blockDim.x) {
        float size = 0.0f;
        for (uint32_t g = 0; g < group; g++) size += fabsf(load1(qkv.type, qkv.data, queries + g * dim + d));
        sizes[d] = size;
    }
    __syncthreads();
    const auto size_of = [&](uint32_t d) { return ordinal(sizes[d]); };
    choose(dim, count, memory, scratch, size_of, [&](uint32_t place, uint32_t d) {
        float sum = 0.0f;
        for (uint32_t g = 0; g < group; g++) sum += load1(qkv.type, qkv.data, queries + g * dim + d);
        used[place] = d | (sum > 0.0f ? 1u << 31 : 0);
    });
    __syncthreads();
    for (uint32_t p = threadIdx.x; p < pages; p += blockDim.x) st(own + p, 0.0f);
    float* floats = reinterpret_cast<float*>(scratch);
    for (uint32_t g = 0; g < group; g++) {
        float all = 0.0f, some = 0.0f;
        for (uint32_t d = threadIdx.x; d < dim; d += blockDim.x) {
            all += fabsf(load1(qkv.type, qkv.data, queries + g * dim + d));
        }
        for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) {
            some += fabsf(load1(qkv.type, qkv.data, queries + g * dim + (used[i] & 0xffff)));
        }
        all = block_sum(all, floats);
        some = block_sum(some, floats);
        const float temperature = fmaxf(all > 0.0f ? sqrtf(float(dim) * some / all) : 1.0f, 1.17549435e-38f);
        const auto estimate = [&](uint32_t p) {
            float sum = 0.0f;
            for (uint32_t i = 0; i < count; i++) {
                const uint32_t d = used[i] & 0xffff;
                const float x = ld((used[i] >> 31 ? high : low) + index + size_t(p) * dim + d);
                sum = fmaf(load1(qkv.type, qkv.data, queries + g * dim + d), x, sum);
            }
            return sum / temperature;
        };
        float peak = -INFINITE, total = 0.0f;
        for (uint32_t p = threadIdx.x; p < pages; p += blockDim.x) peak = fmaxf(peak, estimate(p));
        peak = block_most(peak, floats);
        for (uint32_t p = threadIdx.x; p < pages; p += blockDim.x) {
            total += expf(estimate(p) - peak) * float(min_of(page, head.tokens - p * page));
        }
        total = block_sum(total, floats);
        for (uint32_t p = threadIdx.x; p < pages; p += blockDim.x) st(own + p, ld(own + p) + expf(estimate(p) - peak) / total);
    }
    __syncthreads();
    const uint32_t keep = min_of(wanted, head.tokens);
    const auto of = [&](uint32_t t) { return ordinal(ld(own + t / page)); };
    choose(head.tokens, keep, memory, scratch, of, [&](uint32_t at, uint32_t t) { st(chosen + place * most + at, t); });
    if (threadIdx.x == 0) st(counts + place, keep);
}
KERNEL(select_shares)
