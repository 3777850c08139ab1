// Rows that go on to the upper layers, where not all do, and queries compared over time.
//
// `forward_choose` reads kv_heads numbers a row five times (four from a cache); `forward_rows` reads and writes a residual row
// each that goes on. `compare` reads the queries of a row and a noted one a sequence. Memory.
//
// Launch of `forward_choose`: grid (items), 256 threads, 1,152 bytes of shared memory. Of `forward_rows`: grid
// (ceil(most kept * width / 8 / 256), items), 256 threads. Of `compare`: grid (items), 256 threads, 2,048 bytes.
#include "order.cuh"

// The best `keep` rows of each item by the sum of the scores of its KV heads, which lie by `Head::meta` and row; the rows of
// the last `recent` positions in any case. `chosen` [item][most], ascending.
extern "C" __global__ void __launch_bounds__(256)
    forward_choose(Kv kv, const Item* items, const float* scores, const uint32_t* positions, const uint32_t* keep,
                   uint32_t recent, uint32_t most, uint32_t* chosen) {
    SHARED(uint32_t, memory);
    const Item item = ld_struct(items + blockIdx.x);
    const uint32_t wanted = min_of(ld_same(keep + blockIdx.x, threadIdx.x == 0), item.rows);
    if (item.rows == 0) return;
    const uint32_t* own = positions + item.first_row;
    const uint32_t seen = ld_same(own + item.rows - 1, threadIdx.x == 0) + 1;
    const auto of = [&](uint32_t row) {
        float sum = 0.0f;
        for (uint32_t h = 0; h < kv.kv_heads; h++) {
            const Head* head = head_of(kv, item, h);
            sum += ld(scores + ld_same(&head->meta, threadIdx.x == 0) + row);
        }
        return ordinal_of(sum, ld(own + row), seen, Protect{0, recent});
    };
    choose(item.rows, wanted, memory, memory + 256, of, [&](uint32_t place, uint32_t row) {
        st(chosen + size_t(blockIdx.x) * most + place, row);
    });
}
KERNEL(forward_choose)

// The chosen rows of each item, next to each other from row `to[item]` of `out` on, and their positions.
extern "C" __global__ void __launch_bounds__(256)
    forward_rows(const Item* items, const uint32_t* chosen, uint32_t most, const uint32_t* keep, const uint32_t* to, Rows in,
                 const uint32_t* positions, Rows out, uint32_t* out_positions) {
    const Item item = ld_struct(items + blockIdx.y);
    const uint32_t C = in.width / 8, i = blockIdx.x * blockDim.x + threadIdx.x, n = i / C, c = i % C;
    if (n >= min_of(ld_same(keep + blockIdx.y, threadIdx.x == 0), item.rows)) return;
    const uint32_t from = item.first_row + ld_same(chosen + size_t(blockIdx.y) * most + n, c == 0);
    const size_t target = size_t(ld_same(to + blockIdx.y, threadIdx.x == 0)) + n;
    float x[8];
    load8(in.type, in.data, size_t(from) * in.width + 8 * c, x);
    store8(out.type, out.data, target * out.width + 8 * c, x);
    if (c == 0) st(out_positions + target, ld(positions + from));
}
KERNEL(forward_rows)

// Notes each sequence's query, the sum over the heads of its newest row, at `now` [sequence][dim], and says whether its cosine
// with `noted` [sequence][dim] is below `below` or it has none there (`known` [sequence] is 0). A vector without length is
// like all others.
extern "C" __global__ void __launch_bounds__(256)
    compare(const Item* items, Rows qkv, uint32_t heads, uint32_t dim, double below, const uint32_t* known,
            const float* noted, float* now, uint32_t* stale) {
    SHARED(double, sums);
    const Item item = ld_struct(items + blockIdx.x);
    const uint32_t d = threadIdx.x;
    const bool has = ld_same(known + item.sequence, d == 0) != 0;
    float mine = 0.0f;
    double other = 0.0;
    if (d < dim) {
        const size_t row = size_t(item.first_row + item.rows - 1) * qkv.width;
        for (uint32_t h = 0; h < heads; h++) mine += load1(qkv.type, qkv.data, row + h * dim + d);
        st(now + size_t(item.sequence) * dim + d, mine);
        if (has) other = ld(noted + size_t(item.sequence) * dim + d);
    }
    const double products[3] = {double(mine) * other, double(mine) * mine, other * other};
    double total[3];
    for (int i = 0; i < 3; i++) {
        __syncthreads();
        sums[d] = products[i];
        __syncthreads();
        for (uint32_t half = blockDim.x / 2; half > 0; half /= 2) {
            if (d < half) sums[d] += sums[d + half];
            __syncthreads();
        }
        total[i] = sums[0];
    }
    if (d == 0) {
        const double length = sqrt(total[1] * total[2]), cosine = length > 0.0 ? total[0] / length : 1.0;
        st(stale + blockIdx.x, uint32_t(!has || cosine < below));
    }
}
KERNEL(compare)
