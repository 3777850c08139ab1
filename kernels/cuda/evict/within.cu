// How many tokens may go before the newest query's attention loses too much.
//
// `evict_order` sorts the tokens of a head by who leaves first; `evict_within` halves the number of those that go until the
// rest keeps enough, and sums the squared weights of the rest each time: some 17 passes over 4 bytes a token and query head,
// from a cache. Latency; it runs once an eviction.
//
// Launch of `evict_order`: grid (kv_heads, items), 256 to 1,024 threads, 128 bytes of shared memory; `order` and `other` lie
// by `Head::meta`. Of `evict_within`: grid (items), 256 or 512 threads, 8 bytes of shared memory a thread.
#include "../order.cuh"

extern "C" __global__ void __launch_bounds__(1024)
    evict_order(Kv kv, const Item* items, const float* scores, Protect protect, uint32_t* order, uint32_t* other) {
    SHARED(uint32_t, scratch);
    const Item item = ld_struct(items + blockIdx.y);
    const Head head = ld_struct(head_of(kv, item, blockIdx.x));
    const auto of = [&](uint32_t t) {
        return ordinal_of(ld(scores + head.meta + t), ld(kv.positions + head.meta + t), item.seen, protect);
    };
    // Of equal ones the later leaves first; of the recent ones, which are the last, the earlier.
    uint32_t mine = 0, recent;
    for (uint32_t t = threadIdx.x; t < head.tokens; t += blockDim.x) mine += of(t) == RECENT;
    block_before(mine, scratch, &recent);
    const uint32_t others = head.tokens - recent;
    for (uint32_t t = threadIdx.x; t < head.tokens; t += blockDim.x) {
        st(order + head.meta + t, t < others ? others - 1 - t : t);
    }
    sort(head.tokens, order + head.meta, other + head.meta, scratch, of);
}
KERNEL(evict_order)

DEVICE double block_sum(double x, double* scratch) {
    __syncthreads();
    scratch[threadIdx.x] = x;
    __syncthreads();
    for (uint32_t half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) scratch[threadIdx.x] += scratch[threadIdx.x + half];
        __syncthreads();
    }
    return scratch[0];
}

// `weights` are those of the newest row, `plane` numbers between the heads of a group (`mass`). Tokens that stay in every
// head of each item: the fewest at which the Euclidean length of the weights, sinks apart, keeps 1 - loss of itself, the
// mean over query heads; at least one that is no sink, at most `most`. The threads are a power of two.
extern "C" __global__ void __launch_bounds__(512, 1)
    evict_within(Kv kv, const Item* items, const float* weights, uint64_t plane, uint32_t group, const uint32_t* order,
                 uint32_t sinks, double loss, const uint32_t* most, uint32_t* keep) {
    SHARED(double, scratch);
    const Item item = ld_struct(items + blockIdx.x);
    const Head first = ld_struct(head_of(kv, item, 0));
    // Sinks are the last in every order. Heads hold the same number of tokens, but not the same ones.
    uint32_t candidates = 0xffffffff;
    for (uint32_t h = 0; h < kv.kv_heads; h++) {
        const Head head = ld_struct(head_of(kv, item, h));
        uint32_t low = 0, high = head.tokens;
        while (low < high) {
            const uint32_t middle = (low + high) / 2;
            if (ld_same(kv.positions + head.meta + middle, threadIdx.x == 0) < sinks) low = middle + 1;
            else high = middle;
        }
        candidates = min_of(candidates, head.tokens - low);
    }
    const auto length_without = [&](uint32_t gone) {
        double sum = 0.0;
        for (uint32_t h = 0; h < kv.kv_heads; h++) {
            const Head head = ld_struct(head_of(kv, item, h));
            uint32_t low = 0, high = head.tokens;
            while (low < high) {
                const uint32_t middle = (low + high) / 2;
                if (ld_same(kv.positions + head.meta + middle, threadIdx.x == 0) < sinks) low = middle + 1;
                else high = middle;
            }
            for (uint32_t g = 0; g < group; g++) {
                double squares = 0.0;
                for (uint32_t i = gone + threadIdx.x; i < head.tokens - low; i += blockDim.x) {
                    const uint32_t t = ld(order + head.meta + i);
                    const double w = ld(weights + g * plane + head.meta + t);
                    squares += w * w;
                }
                sum += sqrt(block_sum(squares, scratch));
            }
        }
        return sum;
    };
    const double full = length_without(0);
    uint32_t low = 0, high = candidates > 0 ? candidates - 1 : 0;
    while (low < high) {
        const uint32_t gone = (low + high + 1) / 2;
        const double lost = full > 0.0 ? (full - length_without(gone)) / full : 0.0;
        if (lost <= loss) low = gone;
        else high = gone - 1;
    }
    const uint32_t stay = min_of(first.tokens - low, ld_same(most + blockIdx.x, threadIdx.x == 0));
    for (uint32_t h = threadIdx.x; h < kv.kv_heads; h += blockDim.x) st(keep + blockIdx.x * kv.kv_heads + h, stay);
}
KERNEL(evict_within)
