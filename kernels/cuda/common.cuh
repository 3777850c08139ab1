// What all kernels share: how caches and rows lie in memory, and numbers of a few bits.
//
// A block is 32 tokens of one KV head. Its keys and its values are halves with a place of their own in the pool, each in
// one of three forms; all have a row per token:
//   whole    [32][dim] numbers of the cache's format
//   pruned   [32][pitch] numbers; the kept channels of keys, then zeros up to `pitch`, the next multiple of 8
//   packed   [32][pitch * bits / 8] codes, the first in the lowest bits; then a scale and a zero (2 x f16) per group:
//            of a key's channel [pitch], or of a token and `group` channels of it [32][ceil(pitch / group)]
// Tokens are packed, then pruned, then whole, by counts; where two forms meet in a block, it has a half of each. A table
// has the places of a head's halves of one form by block, in units of 64 bytes.
#pragma once

#ifdef __CUDACC__
#include <cuda_fp16.h>

#include <cstdint>

#define KERNEL(name)
#define DEVICE static __device__ __forceinline__
#define SHARED(type, name)                                          \
    extern __shared__ __align__(16) unsigned char shared_memory[];  \
    type* name = reinterpret_cast<type*>(shared_memory)

// All accesses to global memory: tests check and count them.
template <class T>
DEVICE T ld(const T* p) {
    return *p;
}
// Several threads of a block read one address at the same time, which costs memory one access; `first` says which of them
// counts it.
template <class T>
DEVICE T ld_same(const T* p, bool) {
    return *p;
}
template <class T>
DEVICE void st(T* p, T value) {
    *p = value;
}
DEVICE float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
DEVICE uint16_t float_to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }

DEVICE void mma_16816(float d[4], const unsigned a[4], const unsigned b[2], bool brain) {
    if (brain) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
}

// Two matrices of 8 x 8 numbers of 16 bits, transposed: the right factor of `mma_16816` from 16 rows in shared memory, of which
// lanes 0 to 15 name the places.
DEVICE void ldmatrix_transposed(unsigned b[2], const uint16_t* row) {
    const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];" : "=r"(b[0]), "=r"(b[1]) : "r"(at) : "memory");
}
#else
#include "shim/shim.h"
#endif

constexpr uint32_t ALL_LANES = 0xffffffff;
constexpr uint32_t BLOCK_TOKENS = 32;
constexpr uint32_t UNIT = 64;
constexpr uint32_t MOST_DIM = 256;
constexpr uint16_t DROPPED = 0xffff;
constexpr float INFINITE = __builtin_huge_valf();

// Types of numbers, of rows and of caches alike.
enum Type : uint32_t { F32 = 0, F16 = 1, BF16 = 2, FP8 = 3 };

// The cache of one KV head. Offsets count elements of the arrays of `Kv`; a table's may wrap around, so that a list of
// halves which begins at a later block needs no room for those before.
struct Head {
    uint32_t tokens;        // those of this step included
    uint32_t key_packed;    // the first so many have packed keys
    uint32_t key_narrow;    // packed or pruned ones
    uint32_t value_packed;  // packed values
    uint32_t k_whole, k_packed, k_pruned, v_whole, v_packed;  // where their tables start
    uint32_t meta;          // first token in `positions`, and in arrays of scores and tallies
    uint32_t kept;          // first of its channels in `Kv::kept`
    uint32_t channels;      // kept channels of keys; `dim` if none were dropped
    uint32_t state;         // place of its state, in units
    uint32_t unused[3];
};

// All caches of a layer. Passed by value.
struct Kv {
    uint8_t* pool;
    const uint32_t* tables;
    const Head* heads;      // [sequence][kv_heads]
    uint32_t* positions;    // original positions of tokens, ascending in each head
    const uint16_t* kept;   // per head with dropped channels: those kept, ascending, then [dim] their places or DROPPED
    uint32_t kv_heads, dim, format;
    uint32_t bits, group, key_axis;  // of codes; axis 0: groups of a channel's tokens, 1: of a token's channels
};

// One sequence of a step.
struct Item {
    uint32_t sequence, first_row, rows;
    uint32_t seen;  // tokens so far, dropped ones and this step's included
};

// Rows of activations: the queries of all heads, then keys, then values.
struct Rows {
    void* data;
    uint32_t type, width;
};

DEVICE const Head* head_of(const Kv& kv, const Item& item, uint32_t h) {
    return kv.heads + item.sequence * kv.kv_heads + h;
}

// A struct of whole words; the same for all threads of a block.
template <class T>
DEVICE T ld_struct(const T* p) {
    T out;
    const uint4* from = reinterpret_cast<const uint4*>(p);
    uint4* to = reinterpret_cast<uint4*>(&out);
#pragma unroll
    for (uint32_t i = 0; i < sizeof(T) / 16; i++) to[i] = ld_same(from + i, threadIdx.x == 0);
    return out;
}

DEVICE uint32_t blocks_of(uint32_t tokens) { return (tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS; }
DEVICE uint32_t min_of(uint32_t a, uint32_t b) { return a < b ? a : b; }
DEVICE uint32_t max_of(uint32_t a, uint32_t b) { return a > b ? a : b; }
DEVICE uint32_t divided(uint32_t a, uint32_t b) { return (a + b - 1) / b; }
DEVICE uint32_t bytes_of(uint32_t type) { return type == F32 ? 4 : type == FP8 ? 1 : 2; }
// Numbers of a stored row of so many channels.
DEVICE uint32_t pitch_of(uint32_t channels) { return (channels + 7) / 8 * 8; }

DEVICE uint8_t* half_at(const Kv& kv, uint32_t table, uint32_t block, bool first) {
    return kv.pool + size_t(ld_same(kv.tables + uint32_t(table + block), first)) * UNIT;
}

DEVICE float brain_to_float(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }
DEVICE uint16_t float_to_brain(float x) {
    const uint32_t bits = __float_as_uint(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
// e4m3: a half with three exponent bits less and another bias.
DEVICE float fp8_to_float(uint32_t bits) {
    if ((bits & 0x7f) == 0x7f) return __uint_as_float(0x7fc00000 | bits >> 7 << 31);
    return half_to_float(uint16_t((bits & 0x80) << 8 | (bits & 0x7f) << 7)) * 256.0f;
}
DEVICE uint32_t float_to_fp8(float x) {
    const uint32_t all = __float_as_uint(x), sign = all >> 24 & 0x80, magnitude = all & 0x7fffffff;
    if (magnitude > 0x7f800000) return sign | 0x7f;
    const float size = fminf(__uint_as_float(magnitude), 448.0f);
    // Multiples of 2^-9: adding 1.5 * 2^23 rounds to whole numbers.
    if (size < 0.015625f) return sign | (__float_as_uint(__fadd_rn(size * 512.0f, 12582912.0f)) & 0xf);
    const uint32_t bits = __float_as_uint(size);
    return sign | (((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120u << 3));
}

// Two numbers of a word.
template <int T>
DEVICE void two_of(uint32_t word, float* out) {
    if (T == BF16) {
        out[0] = __uint_as_float(word << 16);
        out[1] = __uint_as_float(word & 0xffff0000);
    } else {
        out[0] = half_to_float(uint16_t(word));
        out[1] = half_to_float(uint16_t(word >> 16));
    }
}
template <int T>
DEVICE uint32_t two_to(const float* x) {
    return T == BF16 ? uint32_t(float_to_brain(x[0])) | uint32_t(float_to_brain(x[1])) << 16
                     : uint32_t(float_to_half(x[0])) | uint32_t(float_to_half(x[1])) << 16;
}

// Eight numbers in a row, of which p is the first; their bytes are aligned to their size, up to 16.
template <int T>
DEVICE void load8(const void* p, float* out, bool first = true) {
    if (T == F32) {
        const uint4* from = static_cast<const uint4*>(p);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint4 v = ld_same(from + i, first);
            out[4 * i] = __uint_as_float(v.x), out[4 * i + 1] = __uint_as_float(v.y);
            out[4 * i + 2] = __uint_as_float(v.z), out[4 * i + 3] = __uint_as_float(v.w);
        }
    } else if (T == FP8) {
        const uint2 v = ld_same(static_cast<const uint2*>(p), first);
#pragma unroll
        for (int i = 0; i < 4; i++) out[i] = fp8_to_float(v.x >> 8 * i & 0xff), out[4 + i] = fp8_to_float(v.y >> 8 * i & 0xff);
    } else {
        const uint4 v = ld_same(static_cast<const uint4*>(p), first);
        two_of<T>(v.x, out), two_of<T>(v.y, out + 2), two_of<T>(v.z, out + 4), two_of<T>(v.w, out + 6);
    }
}
template <int T>
DEVICE void store8(void* p, const float* x) {
    if (T == F32) {
        uint4* to = static_cast<uint4*>(p);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            st(to + i, uint4{__float_as_uint(x[4 * i]), __float_as_uint(x[4 * i + 1]), __float_as_uint(x[4 * i + 2]),
                             __float_as_uint(x[4 * i + 3])});
        }
    } else if (T == FP8) {
        uint2 v{0, 0};
#pragma unroll
        for (int i = 0; i < 4; i++) v.x |= float_to_fp8(x[i]) << 8 * i, v.y |= float_to_fp8(x[4 + i]) << 8 * i;
        st(static_cast<uint2*>(p), v);
    } else {
        st(static_cast<uint4*>(p), uint4{two_to<T>(x), two_to<T>(x + 2), two_to<T>(x + 4), two_to<T>(x + 6)});
    }
}
DEVICE void load8(uint32_t type, const void* p, size_t index, float* out, bool first = true) {
    const uint8_t* at = static_cast<const uint8_t*>(p) + index * bytes_of(type);
    switch (type) {
        case F32: return load8<F32>(at, out, first);
        case F16: return load8<F16>(at, out, first);
        case BF16: return load8<BF16>(at, out, first);
        default: return load8<FP8>(at, out, first);
    }
}
DEVICE void store8(uint32_t type, void* p, size_t index, const float* x) {
    uint8_t* at = static_cast<uint8_t*>(p) + index * bytes_of(type);
    switch (type) {
        case F32: return store8<F32>(at, x);
        case F16: return store8<F16>(at, x);
        case BF16: return store8<BF16>(at, x);
        default: return store8<FP8>(at, x);
    }
}
DEVICE float load1(uint32_t type, const void* p, size_t index) {
    switch (type) {
        case F32: return ld(static_cast<const float*>(p) + index);
        case F16: return half_to_float(ld(static_cast<const uint16_t*>(p) + index));
        case BF16: return brain_to_float(ld(static_cast<const uint16_t*>(p) + index));
        default: return fp8_to_float(ld(static_cast<const uint8_t*>(p) + index));
    }
}
DEVICE void store1(uint32_t type, void* p, size_t index, float x) {
    switch (type) {
        case F32: return st(static_cast<float*>(p) + index, x);
        case F16: return st(static_cast<uint16_t*>(p) + index, float_to_half(x));
        case BF16: return st(static_cast<uint16_t*>(p) + index, float_to_brain(x));
        default: return st(static_cast<uint8_t*>(p) + index, uint8_t(float_to_fp8(x)));
    }
}
// As a number of that type would be.
DEVICE float rounded(uint32_t type, float x) {
    switch (type) {
        case F16: return half_to_float(float_to_half(x));
        case BF16: return brain_to_float(float_to_brain(x));
        case FP8: return fp8_to_float(float_to_fp8(x));
        default: return x;
    }
}

// Sum, maximum over `lanes` neighbours, a power of two; all of them get the same bits.
DEVICE float sum_of(float x, uint32_t lanes = 32) {
    for (uint32_t by = lanes / 2; by > 0; by /= 2) x += __shfl_xor_sync(ALL_LANES, x, by);
    return x;
}
DEVICE float most_of(float x, uint32_t lanes = 32) {
    for (uint32_t by = lanes / 2; by > 0; by /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, by));
    return x;
}
// Sum, maximum over a block, in one fixed order; `scratch` has a float per warp.
DEVICE float block_sum(float x, float* scratch) {
    x = sum_of(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0.0f;
    for (uint32_t i = 0; i < blockDim.x / 32; i++) sum += scratch[i];
    return sum;
}
DEVICE float block_most(float x, float* scratch) {
    x = most_of(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    float most = scratch[0];
    for (uint32_t i = 1; i < blockDim.x / 32; i++) most = fmaxf(most, scratch[i]);
    return most;
}
// A row that a block looks at twice, eight numbers at a time: `see(x)` of all of a thread's, then `put(chunk, x)`. Rows of up to
// HELD x 8 x threads numbers stay in registers in between, longer ones are read again, from a cache.
constexpr int HELD = 4;
template <class See>
DEVICE void row_seen(const Rows& in, size_t from, float held[HELD][8], See see) {
    const uint32_t chunks = in.width / 8;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const uint32_t c = threadIdx.x + i * blockDim.x;
        if (c >= chunks) continue;
        load8(in.type, in.data, from + 8 * c, held[i]);
        see(held[i]);
    }
    for (uint32_t c = threadIdx.x + HELD * blockDim.x; c < chunks; c += blockDim.x) {
        float x[8];
        load8(in.type, in.data, from + 8 * c, x);
        see(x);
    }
}
template <class Put>
DEVICE void row_again(const Rows& in, size_t from, const float held[HELD][8], Put put) {
    const uint32_t chunks = in.width / 8;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const uint32_t c = threadIdx.x + i * blockDim.x;
        if (c < chunks) put(c, held[i]);
    }
    for (uint32_t c = threadIdx.x + HELD * blockDim.x; c < chunks; c += blockDim.x) {
        float x[8];
        load8(in.type, in.data, from + 8 * c, x);
        put(c, x);
    }
}
// The sum of what threads before this one have, and of all; counts, so exact in any order.
DEVICE uint32_t block_before(uint32_t x, uint32_t* scratch, uint32_t* all) {
    uint32_t sum = x;
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (uint32_t by = 1; by < 32; by *= 2) {
        const uint32_t other = __shfl_sync(ALL_LANES, sum, lane >= by ? lane - by : lane);
        if (lane >= by) sum += other;
    }
    __syncthreads();
    if (lane == 31) scratch[warp] = sum;
    __syncthreads();
    uint32_t before = 0;
    *all = 0;
    for (uint32_t i = 0; i < blockDim.x / 32; i++) {
        if (i < warp) before += scratch[i];
        *all += scratch[i];
    }
    return before + sum - x;
}
