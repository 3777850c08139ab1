// Variation of tokens against those after them, by rank inside their partition.
//
// Reads each key and value twice (the second time from a cache: once as a partition's own, once as the next one's range); some
// 16 FLOPs a number. Memory.
//
// Launch: grid (partitions and one more, kv_heads, items), 128 threads, 4 (2 dim + 3 lag + 4) bytes of shared memory. The last
// block of a head fills in those without a next partition.
#include "../cache.cuh"

extern "C" __global__ void __launch_bounds__(128, 4)
    rank_lag(Kv kv, const Item* items, uint32_t lag, uint32_t sinks, float* scores) {
    SHARED(float, memory);
    const Item item = ld_struct(items + blockIdx.z);
    const Head head = ld_struct(head_of(kv, item, blockIdx.y));
    const uint32_t dim = kv.dim, tokens = head.tokens, behind = tokens > sinks ? tokens - sinks : 0;
    const uint32_t whole = behind / lag, ranked = whole > 0 ? (whole - 1) * lag : 0, tid = threadIdx.x;
    float* out = scores + head.meta;
    if (blockIdx.x + 1 == gridDim.x) {
        for (uint32_t t = tid; t < tokens; t += blockDim.x) {
            if (t < sinks) st(out + t, 2.0f);
            else if (t >= sinks + ranked) st(out + t, 1.0f + float(t) / float(tokens));
        }
        return;
    }
    const uint32_t first = sinks + blockIdx.x * lag;
    if (first >= sinks + ranked) return;
    float *low = memory, *high = low + dim, *spread = high + dim, *sum = spread + lag, *scratch = sum + lag;
    const uint32_t lanes = lanes_of(dim), slot = tid / lanes, slots = blockDim.x / lanes, c = tid % lanes;
    for (uint32_t t = tid; t < lag; t += blockDim.x) sum[t] = 0.0f;
    for (int side = 0; side < 2; side++) {
        __syncthreads();
        for (uint32_t piece = tid; 8 * piece < dim; piece += blockDim.x) {
            float least[8], most[8], x[8];
#pragma unroll
            for (int j = 0; j < 8; j++) least[j] = INFINITE, most[j] = -INFINITE;
            for (uint32_t t = first + lag; t < first + 2 * lag; t++) {
                if (side == 0) key8(kv, head, t, piece, x);
                else value8(kv, head, t, piece, x);
#pragma unroll
                for (int j = 0; j < 8; j++) least[j] = fminf(least[j], x[j]), most[j] = fmaxf(most[j], x[j]);
            }
#pragma unroll
            for (int j = 0; j < 8; j++) low[8 * piece + j] = least[j], high[8 * piece + j] = most[j];
        }
        __syncthreads();
        for (uint32_t from = 0; from < lag; from += slots) {
            const uint32_t t = from + slot;
            const bool mine = t < lag && 8 * c < dim;
            float x[8] = {}, mean = 0.0f, square = 0.0f;
            if (mine) {
                if (side == 0) key8(kv, head, first + t, c, x);
                else value8(kv, head, first + t, c, x);
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    const float a = low[8 * c + j], b = high[8 * c + j];
                    x[j] = b > a ? (x[j] - a) / (b - a) : 0.0f;
                    mean += x[j];
                }
            }
            mean = sum_of(mean, lanes) / float(dim);
            if (mine) {
#pragma unroll
                for (int j = 0; j < 8; j++) square += (x[j] - mean) * (x[j] - mean);
            }
            square = sum_of(square, lanes);
            if (mine && c == 0) spread[t] = sqrtf(square / float(dim - 1));
        }
        __syncthreads();
        float peak = 0.0f, total = 0.0f;
        for (uint32_t t = tid; t < lag; t += blockDim.x) peak = fmaxf(peak, spread[t]);
        peak = block_most(peak, scratch);
        for (uint32_t t = tid; t < lag; t += blockDim.x) total += expf(spread[t] - peak);
        total = block_sum(total, scratch);
        for (uint32_t t = tid; t < lag; t += blockDim.x) sum[t] += expf(spread[t] - peak) / total;
    }
    __syncthreads();
    for (uint32_t t = tid; t < lag; t += blockDim.x) {
        // Of equal ones the lower position has the lower rank.
        uint32_t rank = 0;
        for (uint32_t other = 0; other < lag; other++) rank += sum[other] < sum[t] || (sum[other] == sum[t] && other < t);
        st(out + first + t, float(rank) / float(lag));
    }
}
KERNEL(rank_lag)
