// Attention of one query row per sequence over its paged cache.
//
// Moves each key and value that the query sees once, 16 bytes (8 of fp8, `bits` bytes of codes) a load, and 4 bytes of
// tables per 32 tokens; computes 4 G dim FLOPs a token for the G queries that share a KV head. So on any GPU memory is the
// floor: 4 dim bytes a token in 16 bits against 4 G dim FLOPs, an intensity of G.
//
// Launch: grid (parts, kv_heads * tiles, items), 128 threads, `attend_decode_shared` bytes (see README.md). A part is `part`
// tokens, a multiple of 32, whatever the batch: so a result does not depend on what else runs. A tile is up to G queries of
// a group. A head with more than one part leaves (sums, maximum, total) of each in `partial`; `attend_join` puts them
// together in order.
//
// In a part, warps first work on keys: 4 lanes share a token, 8 tokens at a time, 4 times a block, so a lane multiplies four
// keys by the same eight channels of a query and only two shuffles sum a product. Then the softmax over shared memory, then
// values: a thread has eight channels of every S-th token, and the S sums are added in order. Keys and values lie row by
// row, so eviction moves a token in one piece and products need no other order for tensor cores; keys transposed in pieces
// of 16 bytes would spare the two shuffles and cost half of the bandwidth when single tokens move. Groups of more than 8
// queries take two tiles, which read the cache twice (the second time from L2).
#pragma once

#include "../cache.cuh"

constexpr uint32_t WARPS = 4, THREADS = 32 * WARPS;

// Products of G queries, `stride` numbers apart, with the keys `low..high` of a half, added to those of this lane's four.
template <int F, int G, bool PACKED>
DEVICE void products(const Kv& kv, const uint8_t* half, uint32_t channels, uint32_t low, uint32_t high, const float* queries,
                     uint32_t stride, float sums[4][G]) {
    const uint32_t lane = threadIdx.x % 32, sub = lane / 4, pitch = pitch_of(channels);
    for (uint32_t c = lane % 4; 8 * c < pitch; c += 4) {
        float k[4][8];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t row = sub + 8 * i;
            if (row < low || row >= high) {
#pragma unroll
                for (int j = 0; j < 8; j++) k[i][j] = 0.0f;
            } else if (PACKED) {
                packed8(kv, half, channels, kv.key_axis == 0, row, c, k[i],
                        kv.key_axis != 0 || row == low);
            } else {
                load8<F>(half + (size_t(row) * pitch + 8 * c) * (F == FP8 ? 1 : F == F32 ? 4 : 2), k[i]);
            }
        }
#pragma unroll
        for (int g = 0; g < G; g++) {
            const float* q = queries + g * stride + 8 * c;
#pragma unroll
            for (int j = 0; j < 8; j++) {
#pragma unroll
                for (int i = 0; i < 4; i++) sums[i][g] = fmaf(q[j], k[i][j], sums[i][g]);
            }
        }
    }
}

template <int F, int G, bool PLAIN>
DEVICE void attend(const Kv& kv, const Item* items, const Rows& qkv, uint32_t heads, float scale, float softcap,
                   uint32_t window, uint32_t part, const uint32_t* without, const uint32_t* without_from, const Rows& out,
                   float* lse, float* partial) {
    SHARED(float, memory);
    const Item item = ld_struct(items + blockIdx.z);
    const uint32_t group = heads / kv.kv_heads, tiles = divided(group, G);
    const uint32_t h = blockIdx.y / tiles, g0 = blockIdx.y % tiles * G, dim = kv.dim, C = dim / 8;
    const Head head = ld_struct(head_of(kv, item, h));
    const uint32_t parts = max_of(divided(head.tokens, part), 1), tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    if (blockIdx.x >= parts) return;

    float* queries = memory;                    // [G][dim]
    float* kept = queries + G * dim;            // [G][dim], with the kept channels first
    float* scores = kept + (PLAIN ? 0 : G * dim);  // [part][G]
    float* stats = scores + part * G;           // [G][2]
    float* scratch = stats + 2 * G;             // [WARPS][G]
    const size_t row = item.first_row;
    for (uint32_t i = tid; i < G * C; i += THREADS) {
        const uint32_t g = i / C, c = i % C;
        float q[8] = {};
        if (g0 + g < group) load8(qkv.type, qkv.data, row * qkv.width + (h * group + g0 + g) * dim + 8 * c, q);
#pragma unroll
        for (int j = 0; j < 8; j++) queries[g * dim + 8 * c + j] = q[j];
    }
    const bool narrow = !PLAIN && head.channels < dim;
    if (narrow) {
        __syncthreads();
        for (uint32_t i = tid; i < dim; i += THREADS) {
            const uint32_t from = i < head.channels ? ld(kv.kept + head.kept + i) : 0;
            for (int g = 0; g < G; g++) kept[g * dim + i] = i < head.channels ? queries[g * dim + from] : 0.0f;
        }
    }
    __syncthreads();

    const uint32_t start = first_seen(kv, head, head.tokens, window), base = blockIdx.x * part;
    const uint32_t low = max_of(start, base), high = max_of(min_of(head.tokens, base + part), low);
    if (low < high) {
        for (uint32_t b = low / 32 + warp; b < blocks_of(high); b += WARPS) {
            const uint32_t first = b * 32;
            const uint32_t from = max_of(low, first) - first, to = min_of(high - first, 32);
            float sums[4][G];
#pragma unroll
            for (int i = 0; i < 4; i++) {
#pragma unroll
                for (int g = 0; g < G; g++) sums[i][g] = 0.0f;
            }
            // Where the forms end in this block.
            const uint32_t packed = PLAIN || head.key_packed < first ? 0 : min_of(head.key_packed - first, to);
            const uint32_t slim = PLAIN || head.key_narrow < first ? 0 : min_of(head.key_narrow - first, to);
            if (!PLAIN && from < packed) {
                const uint8_t* half = half_at(kv, head.k_packed, b, lane == 0);
                products<F, G, true>(kv, half, head.channels, from, packed, narrow ? kept : queries, dim, sums);
            }
            if (!PLAIN && max_of(from, packed) < slim) {
                const uint8_t* half = half_at(kv, head.k_pruned, b, lane == 0);
                products<F, G, false>(kv, half, head.channels, max_of(from, packed), slim, narrow ? kept : queries, dim, sums);
            }
            if (max_of(from, slim) < to) {
                const uint8_t* half = half_at(kv, head.k_whole, b, lane == 0);
                products<F, G, false>(kv, half, dim, max_of(from, slim), to, queries, dim, sums);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint32_t r = lane / 4 + 8 * i;
#pragma unroll
                for (int g = 0; g < G; g++) {
                    const float product = sum_of(sums[i][g], 4);
                    if (lane % 4 == unsigned(i) && r >= from && r < to) {
                        scores[(first + r - base) * G + g] = to_score(product, scale, softcap);
                    }
                }
            }
        }
    }
    __syncthreads();
    if (without != nullptr) {
        const uint32_t list = blockIdx.z * kv.kv_heads + h;
        const uint32_t end = ld_same(without_from + list + 1, lane == 0);
        for (uint32_t i = ld_same(without_from + list, lane == 0) + tid; i < end; i += THREADS) {
            const uint32_t t = ld(without + i);
            if (t < low || t >= high) continue;
            for (int g = 0; g < G; g++) scores[(t - base) * G + g] = -INFINITE;
        }
        __syncthreads();
    }

    // A thread has one query, so that neighbours read neighbouring scores.
    const uint32_t mine = tid % G;
    float most = -INFINITE;
    for (uint32_t t = low + tid / G; t < high; t += THREADS / G) most = fmaxf(most, scores[(t - base) * G + mine]);
#pragma unroll
    for (int by = 16; by >= G; by /= 2) most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, by));
    if (lane < G) scratch[warp * G + lane] = most;
    __syncthreads();
    most = scratch[mine];
    for (uint32_t w = 1; w < WARPS; w++) most = fmaxf(most, scratch[w * G + mine]);
    float total = 0.0f;
    for (uint32_t t = low + tid / G; t < high; t += THREADS / G) {
        float* score = scores + (t - base) * G + mine;
        const float weight = most == -INFINITE ? 0.0f : expf(*score - most);
        *score = weight;
        total += weight;
    }
#pragma unroll
    for (int by = 16; by >= G; by /= 2) total += __shfl_xor_sync(ALL_LANES, total, by);
    __syncthreads();
    if (lane < G) scratch[warp * G + lane] = total;
    __syncthreads();
    if (tid < G) {
        total = 0.0f;
        for (uint32_t w = 0; w < WARPS; w++) total += scratch[w * G + tid];
        stats[2 * tid] = most;
        stats[2 * tid + 1] = total;
    }
    __syncthreads();
    float held[2];  // maximum and total of query `tid`, read before the sums take their place
#pragma unroll
    for (int i = 0; i < 2; i++) held[i] = tid < G ? stats[2 * tid + i] : 0.0f;

    const uint32_t slots = THREADS / C, slot = tid / C, c = tid % C;
    float acc[G][8];
#pragma unroll
    for (int g = 0; g < G; g++) {
#pragma unroll
        for (int j = 0; j < 8; j++) acc[g][j] = 0.0f;
    }
    if (slot < slots) {
#pragma unroll(PLAIN ? 4 : 2)
        for (uint32_t t = low + slot; t < high; t += slots) {
            const uint32_t r = t % 32;
            float v[8];
            if (!PLAIN && t < head.value_packed) {
                packed8(kv, half_at(kv, head.v_packed, t / 32, c == 0 && r == 0), dim, false, r, c, v);
            } else {
                const uint8_t* half = half_at(kv, head.v_whole, t / 32, c == 0 && r == 0);
                load8<F>(half + (size_t(r) * dim + 8 * c) * (F == FP8 ? 1 : F == F32 ? 4 : 2), v);
            }
            const float* weights = scores + (t - base) * G;
#pragma unroll
            for (int g = 0; g < G; g++) {
                const float weight = weights[g];
#pragma unroll
                for (int j = 0; j < 8; j++) acc[g][j] = fmaf(weight, v[j], acc[g][j]);
            }
        }
    }
    __syncthreads();
    // Sums of the slots, in the place of queries and scores: [slot][G][dim]; then [G][2].
    stats = memory + slots * G * dim;
    if (tid < G) stats[2 * tid] = held[0], stats[2 * tid + 1] = held[1];
    if (slot < slots) {
#pragma unroll
        for (int g = 0; g < G; g++) {
#pragma unroll
            for (int j = 0; j < 8; j++) memory[(slot * G + g) * dim + 8 * c + j] = acc[g][j];
        }
    }
    __syncthreads();
    for (uint32_t i = tid; i < G * C; i += THREADS) {
        const uint32_t g = i / C, at = 8 * (i % C);
        if (g0 + g >= group) continue;
        float sums[8] = {};
        for (uint32_t s = 0; s < slots; s++) {
#pragma unroll
            for (int j = 0; j < 8; j++) sums[j] += memory[(s * G + g) * dim + at + j];
        }
        const float peak = stats[2 * g], whole = stats[2 * g + 1];
        const size_t query = h * group + g0 + g;
        if (parts > 1) {
            float* to = partial + ((blockIdx.z * size_t(heads) + query) * gridDim.x + blockIdx.x) * (dim + 8);
            store8<F32>(to + at, sums);
            if (at == 0) {
                st(to + dim, peak);
                st(to + dim + 1, whole);
            }
        } else {
            const float factor = whole > 0.0f ? 1.0f / whole : 0.0f;
#pragma unroll
            for (int j = 0; j < 8; j++) sums[j] = sums[j] * factor + 0.0f;
            store8(out.type, out.data, row * out.width + query * dim + at, sums);
            if (at == 0 && lse != nullptr) st(lse + row * heads + query, whole > 0.0f ? peak + logf(whole) : -INFINITE);
        }
    }
}

#define ATTEND(name, F, G, PLAIN)                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS, 4)                                                               \
        name(Kv kv, const Item* items, Rows qkv, uint32_t heads, float scale, float softcap, uint32_t window,              \
             uint32_t part, const uint32_t* without, const uint32_t* without_from, Rows out, float* lse, float* partial) { \
        attend<F, G, PLAIN>(kv, items, qkv, heads, scale, softcap, window, part, without, without_from, out, lse, partial); \
    }                                                                                                                      \
    KERNEL(name)
#define ATTEND_GROUPS(format, F)                       \
    ATTEND(attend_decode_##format##_1, F, 1, true)     \
    ATTEND(attend_decode_##format##_2, F, 2, true)     \
    ATTEND(attend_decode_##format##_4, F, 4, true)     \
    ATTEND(attend_decode_##format##_8, F, 8, true)     \
    ATTEND(attend_decode_##format##_1_any, F, 1, false) \
    ATTEND(attend_decode_##format##_2_any, F, 2, false) \
    ATTEND(attend_decode_##format##_4_any, F, 4, false) \
    ATTEND(attend_decode_##format##_8_any, F, 8, false)
