// Attention of several query rows per sequence on tensor cores, causal inside the step: attend/prefill.cu in 16 bits.
//
// Computes 4 dim FLOPs for each query and each key that it sees, with keys and values read once per 64 queries: FLOPs, those of
// `mma.m16n8k16` with sums in single precision.
//
// Launch: grid (ceil(most rows of an item * group / 64), kv_heads, items), 128 threads, 2 x 128 (dim + 8) + 512 bytes of shared
// memory. A warp has 16 queries; a query is a row and a head of the group, so that the group's heads share what is read.
// Queries, keys, values and weights are rounded to the type in the kernel's name; what caches hold in it is exact. Weights of a
// block become the left factor of the second product where they are: the layouts are the same. Masks leave whole blocks out
// exactly as in attend/prefill.cu, so chunks of a prompt give its bits here, too.
//
// Not done yet: loads that overlap with products (cp.async, two stages), 64 keys a round, wgmma and TMA on sm_90.
#include "tile.cuh"

constexpr uint32_t QUERIES = 64;

// Eight numbers as four words of 16-bit numbers.
template <int F>
DEVICE uint4 words_of(const float* x) {
    return uint4{two_to<F>(x), two_to<F>(x + 2), two_to<F>(x + 4), two_to<F>(x + 6)};
}

// Keys or values of the block from `token` on to `out` [32][DIM + 8]; zeros behind `end`.
template <int F, int DIM>
DEVICE void load_words(const Kv& kv, const Head& head, bool keys, uint32_t token, uint32_t end, uint16_t* out) {
    constexpr uint32_t C = DIM / 8;
    const bool whole = kv.format == F && token >= (keys ? head.key_narrow : head.value_packed);
    for (uint32_t i = threadIdx.x; i < SIDE * C; i += TILE_THREADS) {
        const uint32_t t = token + i / C, c = i % C;
        uint4 words{0, 0, 0, 0};
        if (t < end && whole) {
            const uint8_t* half = half_at(kv, keys ? head.k_whole : head.v_whole, token / BLOCK_TOKENS, i == 0);
            words = ld(reinterpret_cast<const uint4*>(half) + (t - token) * C + c);
        } else if (t < end) {
            float x[8];
            if (keys) key8(kv, head, t, c, x);
            else value8(kv, head, t, c, x);
            words = words_of<F>(x);
        }
        *reinterpret_cast<uint4*>(out + i / C * (DIM + 8) + 8 * c) = words;
    }
}

DEVICE unsigned word_at(const uint16_t* p) { return *reinterpret_cast<const unsigned*>(p); }

template <int F, int DIM>
DEVICE void prefill(const Kv& kv, const Item* items, const Rows& qkv, uint32_t heads, float scale, float softcap,
                    uint32_t window, const uint32_t* at, const Rows& out, float* lse) {
    constexpr uint32_t C = DIM / 8, STRIDE = DIM + 8;
    SHARED(uint16_t, memory);
    const Item item = ld_struct(items + blockIdx.z);
    const uint32_t group = heads / kv.kv_heads, tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    const uint32_t first = blockIdx.x * QUERIES, all = item.rows * group;
    if (first >= all) return;
    const Head head = ld_struct(head_of(kv, item, blockIdx.y));
    const uint32_t count = min_of(all - first, QUERIES), h = blockIdx.y * group;
    uint16_t* queries = memory;                   // [64][STRIDE]
    uint16_t* keys = queries + QUERIES * STRIDE;  // [32][STRIDE]
    uint16_t* values = keys + SIDE * STRIDE;      // [32][STRIDE]
    uint32_t* starts = reinterpret_cast<uint32_t*>(values + SIDE * STRIDE);  // [64]
    uint32_t* ends = starts + QUERIES;                                       // [64]
    for (uint32_t i = tid; i < QUERIES * C; i += TILE_THREADS) {
        const uint32_t m = i / C, c = i % C, n = first + m;
        float x[8] = {};
        if (m < count) {
            const size_t row = item.first_row + n / group;
            load8(qkv.type, qkv.data, row * qkv.width + (h + n % group) * DIM + 8 * c, x);
        }
        *reinterpret_cast<uint4*>(queries + m * STRIDE + 8 * c) = words_of<F>(x);
    }
    if (tid < QUERIES) {
        const Seen seen = tid < count ? seen_by(kv, head, item, (first + tid) / group, at, window) : Seen{0, 0};
        starts[tid] = seen.start;
        ends[tid] = seen.end;
    }
    __syncthreads();
    uint32_t low = 0xffffffff, high = 0;
    for (uint32_t m = 0; m < count; m++) {
        if (starts[m] < ends[m]) low = min_of(low, starts[m]);
        high = max_of(high, ends[m]);
    }

    // A lane has parts of queries lane / 4 and 8 more of its warp's.
    const uint32_t mine = warp * 16 + lane / 4, column = lane % 4 * 2;
    const uint32_t start[2] = {starts[mine], starts[mine + 8]}, end[2] = {ends[mine], ends[mine + 8]};
    float acc[C][4], most[2] = {-INFINITE, -INFINITE}, total[2] = {};
#pragma unroll
    for (uint32_t n = 0; n < C; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) acc[n][i] = 0.0f;
    }
    for (uint32_t token = low / SIDE * SIDE; token < high; token += SIDE) {
        __syncthreads();
        load_words<F, DIM>(kv, head, true, token, high, keys);
        load_words<F, DIM>(kv, head, false, token, high, values);
        __syncthreads();
        float s[4][4];
#pragma unroll
        for (int n = 0; n < 4; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) s[n][i] = 0.0f;
        }
#pragma unroll
        for (uint32_t k = 0; k < DIM / 16; k++) {
            const uint16_t* q = queries + mine * STRIDE + 16 * k + column;
            const unsigned a[4] = {word_at(q), word_at(q + 8 * STRIDE), word_at(q + 8), word_at(q + 8 * STRIDE + 8)};
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const uint16_t* from = keys + (8 * n + lane / 4) * STRIDE + 16 * k + column;
                const unsigned b[2] = {word_at(from), word_at(from + 8)};
                mma_16816(s[n], a, b, F == BF16);
            }
        }
        float peak[2] = {-INFINITE, -INFINITE};
#pragma unroll
        for (int n = 0; n < 4; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint32_t t = token + 8 * n + column + i % 2;
                const bool sees = t >= start[i / 2] && t < end[i / 2];
                s[n][i] = sees ? to_score(s[n][i], scale, softcap) : -INFINITE;
                peak[i / 2] = fmaxf(peak[i / 2], s[n][i]);
            }
        }
        float factor[2], sum[2] = {};
#pragma unroll
        for (int r = 0; r < 2; r++) {
            peak[r] = fmaxf(most[r], most_of(peak[r], 4));
            factor[r] = most[r] == peak[r] ? 1.0f : expf(most[r] - peak[r]);
            most[r] = peak[r];
        }
#pragma unroll
        for (int n = 0; n < 4; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float weight = s[n][i] == -INFINITE ? 0.0f : expf(s[n][i] - peak[i / 2]);
                // The sum of what is multiplied.
                s[n][i] = rounded(F, weight);
                sum[i / 2] += s[n][i];
            }
        }
#pragma unroll
        for (int r = 0; r < 2; r++) total[r] = total[r] * factor[r] + sum_of(sum[r], 4);
#pragma unroll
        for (uint32_t n = 0; n < C; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) acc[n][i] *= factor[i / 2];
        }
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const unsigned a[4] = {two_to<F>(s[2 * k]), two_to<F>(s[2 * k] + 2), two_to<F>(s[2 * k + 1]),
                                   two_to<F>(s[2 * k + 1] + 2)};
#pragma unroll
            for (uint32_t n = 0; n < C; n++) {
                unsigned b[2];
                ldmatrix_transposed(b, values + (16 * k + lane % 16) * STRIDE + 8 * n);
                mma_16816(acc[n], a, b, F == BF16);
            }
        }
    }
#pragma unroll
    for (uint32_t r = 0; r < 2; r++) {
        const uint32_t m = mine + 8 * r;
        if (m >= count) continue;
        const uint32_t n = first + m;
        const size_t row = item.first_row + n / group, query = h + n % group;
        const float factor = total[r] > 0.0f ? 1.0f / total[r] : 0.0f;
        if (lane % 4 == 0 && lse != nullptr) {
            st(lse + row * heads + query, total[r] > 0.0f ? most[r] + logf(total[r]) : -INFINITE);
        }
#pragma unroll
        for (uint32_t c = 0; c < C; c++) {
            const size_t to = row * out.width + query * DIM + 8 * c + column;
            const float x[2] = {acc[c][2 * r] * factor + 0.0f, acc[c][2 * r + 1] * factor + 0.0f};
            if (out.type == F32) {
                uint2* at = reinterpret_cast<uint2*>(static_cast<float*>(out.data) + to);
                st(at, uint2{__float_as_uint(x[0]), __float_as_uint(x[1])});
            } else {
                unsigned* at = reinterpret_cast<unsigned*>(static_cast<uint16_t*>(out.data) + to);
                st(at, out.type == BF16 ? two_to<BF16>(x) : two_to<F16>(x));
            }
        }
    }
}

#define PREFILL(format, F, DIM)                                                                                          \
    extern "C" __global__ void __launch_bounds__(TILE_THREADS, DIM > 128 ? 1 : 2) attend_prefill_##format##_##DIM(       \
        Kv kv, const Item* items, Rows qkv, uint32_t heads, float scale, float softcap, uint32_t window,                 \
        const uint32_t* at, Rows out, float* lse) {                                                                      \
        prefill<F, DIM>(kv, items, qkv, heads, scale, softcap, window, at, out, lse);                                    \
    }                                                                                                                    \
    KERNEL(attend_prefill_##format##_##DIM)
#define PREFILLS(format, F) \
    PREFILL(format, F, 64)  \
    PREFILL(format, F, 80)  \
    PREFILL(format, F, 96)  \
    PREFILL(format, F, 128) \
    PREFILL(format, F, 256)
PREFILLS(f16, F16)
PREFILLS(bf16, BF16)
