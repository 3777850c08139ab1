// The next token of each sequence from its logits.
//
// `argmax` reads each logit once: memory. `top_p` reads them some forty times, from a cache (a row is 0.2 to 1 MB): one
// pass for the largest, 31 to find the least weight that belongs to the set, bit by bit, the rest to draw; it is a few
// microseconds more in a step of milliseconds, where a sort would need memory of its own.
//
// Launch: grid (rows), 1,024 threads; shared memory as stated at each.
#include "common.cuh"

DEVICE float logit(const Rows& logits, size_t i) {
    const float x = load1(logits.type, logits.data, size_t(blockIdx.x) * logits.width + i);
    return x != x ? -INFINITE : x;
}

// The largest of a block, the lowest id among equals.
DEVICE void best_of(float& best, uint32_t& id, float& second, float* scratch) {
    uint32_t* ids = reinterpret_cast<uint32_t*>(scratch + 32);
    for (uint32_t by = 16; by > 0; by /= 2) {
        const float other = __shfl_xor_sync(ALL_LANES, best, by), next = __shfl_xor_sync(ALL_LANES, second, by);
        const uint32_t other_id = __shfl_xor_sync(ALL_LANES, id, by);
        const bool takes = other > best || (other == best && other_id < id);
        second = fmaxf(fmaxf(second, next), takes ? best : other);
        if (takes) best = other, id = other_id;
    }
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    float* seconds = scratch + 64;
    __syncthreads();
    if (lane == 0) scratch[warp] = best, ids[warp] = id, seconds[warp] = second;
    __syncthreads();
    best = scratch[0], id = ids[0], second = seconds[0];
    for (uint32_t w = 1; w < warps; w++) {
        const bool takes = scratch[w] > best || (scratch[w] == best && ids[w] < id);
        second = fmaxf(fmaxf(second, seconds[w]), takes ? best : scratch[w]);
        if (takes) best = scratch[w], id = ids[w];
    }
}

// The id of the largest logit, the lowest among equals, and its distance to the second largest. NaN never wins. Shared
// memory: 384 bytes.
extern "C" __global__ void __launch_bounds__(1024) argmax(Rows logits, uint32_t* ids, float* gaps) {
    SHARED(float, memory);
    float best = -INFINITE, second = -INFINITE;
    uint32_t id = 0xffffffff;
    const auto take = [&](float x, uint32_t i) {
        if (x > best || (x == best && i < id)) second = fmaxf(second, best), best = x, id = i;
        else second = fmaxf(second, x);
    };
    const size_t base = size_t(blockIdx.x) * logits.width;
    const uint32_t wide = logits.width % 8 == 0 ? logits.width / 8 : 0;
    for (uint32_t c = threadIdx.x; c < wide; c += blockDim.x) {
        float x[8];
        load8(logits.type, logits.data, base + 8 * c, x);
#pragma unroll
        for (int j = 0; j < 8; j++) take(x[j] != x[j] ? -INFINITE : x[j], 8 * c + j);
    }
    for (uint32_t i = 8 * wide + threadIdx.x; i < logits.width; i += blockDim.x) take(logit(logits, i), i);
    best_of(best, id, second, memory);
    if (threadIdx.x == 0) {
        st(ids + blockIdx.x, id < logits.width ? id : 0);
        if (gaps != nullptr) st(gaps + blockIdx.x, logits.width == 1 ? INFINITE : best - second);
    }
}
KERNEL(argmax)

// Sums in double precision: 1,024 threads have stretches of their own, so that the sum before a thread's stretch is known.
DEVICE double block_sum_double(double x, double* scratch) {
    __syncthreads();
    scratch[threadIdx.x] = x;
    __syncthreads();
    for (uint32_t half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) scratch[threadIdx.x] += scratch[threadIdx.x + half];
        __syncthreads();
    }
    const double sum = scratch[0];
    __syncthreads();
    return sum;
}

// A token drawn from the smallest set of most likely tokens whose probability reaches `top_p`, at `temperature`, by
// `uniform` in 0..1, one per row. Tokens of the set stand in the order of their ids; of equal ones at the set's end the lower
// ids belong to it. (The CPU's kernel lets the likelier come first: the same distribution, other draws.) Shared memory:
// 8 bytes a thread and 512 more.
extern "C" __global__ void __launch_bounds__(1024)
    top_p(Rows logits, float temperature, float share, const float* uniform, uint32_t* ids) {
    SHARED(double, memory);
    float* small = reinterpret_cast<float*>(memory + blockDim.x);
    const uint32_t n = logits.width, each = divided(n, blockDim.x);
    const uint32_t from = min_of(threadIdx.x * each, n), to = min_of(from + each, n);
    float most = -INFINITE;
    for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) most = fmaxf(most, logit(logits, i));
    most = block_most(most, small);
    // Weights are at most 1 and positive, so their bits sort like them.
    const auto weight = [&](uint32_t i) {
        const float x = logit(logits, i);
        return x == -INFINITE ? 0.0f : expf((x - most) / temperature);
    };
    const auto sum_from = [&](uint32_t bits) {
        double sum = 0.0;
        for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
            const float w = weight(i);
            if (__float_as_uint(w) >= bits) sum += w;
        }
        return block_sum_double(sum, memory);
    };
    const double total = sum_from(0);
    uint32_t least = 0;
    double above = 0.0;  // weight of those heavier than `least`
    const bool cut = share < 1.0f;
    if (cut) {
        const double wanted = total * double(fmaxf(share, 0.0f));
        // The largest bound from which on the weights reach what is wanted.
        for (uint32_t bit = 1u << 29; bit > 0; bit /= 2) {
            if (sum_from(least | bit) >= wanted && (least | bit) <= 0x3f800000) least |= bit;
        }
        above = sum_from(least + 1);
    }
    const float edge = __uint_as_float(least);
    // How many of weight `edge` belong to the set, counted in the order of ids.
    uint32_t equal = 0, count = 0xffffffff, all;
    if (cut) {
        const double missing = total * double(fmaxf(share, 0.0f)) - above;
        count = edge > 0.0f ? uint32_t(fmin(fmax(ceil(missing / double(edge)), above > 0.0 ? 0.0 : 1.0), 4294967040.0)) : 0;
        for (uint32_t i = from; i < to; i++) equal += __float_as_uint(weight(i)) == least;
    }
    uint32_t rank = block_before(equal, reinterpret_cast<uint32_t*>(small), &all);
    const uint32_t rank_before = rank;
    const auto counts = [&](float w) {
        if (!(w > 0.0f)) return false;
        if (!cut || __float_as_uint(w) > least) return true;
        return __float_as_uint(w) == least && rank++ < count;
    };
    double own = 0.0;
    for (uint32_t i = from; i < to; i++) {
        const float w = weight(i);
        if (counts(w)) own += w;
    }
    __syncthreads();
    memory[threadIdx.x] = own;
    __syncthreads();
    double before = 0.0, sum = 0.0;
    for (uint32_t t = 0; t < blockDim.x; t++) {
        if (t == threadIdx.x) before = sum;
        sum += memory[t];
    }
    const double target = sum * double(fminf(fmaxf(ld_same(uniform + blockIdx.x, threadIdx.x == 0), 0.0f), 1.0f));
    // The first whose running sum passes the target; if none does, the last of the set.
    rank = rank_before;
    uint32_t found = 0xffffffff, last = 0;
    bool any = false;
    double running = before;
    for (uint32_t i = from; i < to; i++) {
        const float w = weight(i);
        if (!counts(w)) continue;
        running += w;
        any = true;
        last = i;
        if (running > target && found == 0xffffffff) found = i;
    }
    __syncthreads();
    uint32_t* places = reinterpret_cast<uint32_t*>(memory);
    places[threadIdx.x] = found;
    places[blockDim.x + threadIdx.x] = any ? last : 0;
    __syncthreads();
    if (threadIdx.x == 0) {
        uint32_t id = 0xffffffff, end = 0;
        for (uint32_t t = 0; t < blockDim.x; t++) {
            id = min_of(id, places[t]);
            end = max_of(end, places[blockDim.x + t]);
        }
        st(ids + blockIdx.x, id == 0xffffffff ? end : id);
    }
}
KERNEL(top_p)
