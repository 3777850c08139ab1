// Packing: the oldest tokens of a cache become codes of a few bits.
//
// Reads each number that is packed once and writes its code, and 4 bytes a group: dim (2 + bits / 8 + 4 / group) bytes a
// token for keys and as much for values, from 16 bits. Some five operations a number, so memory is the floor.
//
// Launch: grid (units, heads listed), 256 threads (fewer for few tokens), shared memory as stated. A unit is a group of
// tokens where groups of keys run along tokens, else a block; the first one is that of the first token that is not packed.
// `which` lists heads by their place in `Kv::heads`, `to` has for each the number of tokens whose keys shall be packed and
// the number of those whose values shall. The counts in the heads are those before; the caller changes them.
//
// A unit waits in shared memory, so that everything is read once and before anything is written: tokens of a group that are
// packed already are packed anew from what their codes stand for. Kept in registers instead, a unit is bound to the number
// of threads, and ptxas spills.
#include "cache.cuh"

// Keys in groups of a channel's tokens. Shared memory: (group x pitch + 16 threads) floats.
extern "C" __global__ void __launch_bounds__(256, 2) pack_channels(Kv kv, const uint32_t* which, const uint32_t* to) {
    SHARED(float, memory);
    const bool first_thread = threadIdx.x == 0;
    const Head head = ld_struct(kv.heads + ld_same(which + blockIdx.y, first_thread));
    const uint32_t end_of_all = min_of(ld_same(to + 2 * blockIdx.y, first_thread), head.tokens);
    const uint32_t start = (head.key_packed / kv.group + blockIdx.x) * kv.group;
    if (start >= end_of_all || end_of_all <= head.key_packed) return;
    const uint32_t end = min_of(start + kv.group, end_of_all), channels = head.channels, pitch = pitch_of(channels);
    const uint32_t C = pitch / 8, c = threadIdx.x % C, slot = threadIdx.x / C, slots = blockDim.x / C;
    float* extremes = memory + kv.group * pitch;
    float least[8], most[8];
#pragma unroll
    for (int j = 0; j < 8; j++) least[j] = INFINITE, most[j] = -INFINITE;
    if (slot < slots) {
        for (uint32_t token = start + slot; token < end; token += slots) {
            float x[8];
            kept_key8(kv, head, token, c, x);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                memory[(token - start) * pitch + 8 * c + j] = x[j];
                if (x[j] < least[j]) least[j] = x[j];
                if (x[j] > most[j]) most[j] = x[j];
            }
        }
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {
        extremes[threadIdx.x * 16 + j] = least[j];
        extremes[threadIdx.x * 16 + 8 + j] = most[j];
    }
    __syncthreads();
    if (slot >= slots) return;
    // Least and largest are the same in any order.
    for (uint32_t s = 0; s < slots; s++) {
#pragma unroll
        for (int j = 0; j < 8; j++) {
            least[j] = fminf(least[j], extremes[(s * C + c) * 16 + j]);
            most[j] = fmaxf(most[j], extremes[(s * C + c) * 16 + 8 + j]);
        }
    }
    uint32_t words[8];
#pragma unroll
    for (int j = 0; j < 8; j++) words[j] = fit(kv.bits, least[j], most[j]);
    for (uint32_t token = start + slot; token < end; token += slots) {
        const uint32_t row = token % BLOCK_TOKENS;
        uint8_t* half = half_at(kv, head.k_packed, token / BLOCK_TOKENS, c == 0 && row == 0);
        uint32_t codes[8];
#pragma unroll
        for (int j = 0; j < 8; j++) {
            codes[j] = code_of(kv.bits, memory[(token - start) * pitch + 8 * c + j], level_of(words[j]));
        }
        put_codes8(kv.bits, half + row * row_bytes(kv, channels) + c * kv.bits, codes);
    }
    // Every block of the group holds its levels.
    for (uint32_t block = start / BLOCK_TOKENS + slot; block < blocks_of(end); block += slots) {
        uint8_t* half = half_at(kv, head.k_packed, block, c == 0);
        uint4* levels = reinterpret_cast<uint4*>(half + BLOCK_TOKENS * row_bytes(kv, channels)) + 2 * c;
        st(levels, uint4{words[0], words[1], words[2], words[3]});
        st(levels + 1, uint4{words[4], words[5], words[6], words[7]});
    }
}
KERNEL(pack_channels)

// Values (side 1), or keys (side 0), in groups of a token's channels. Shared memory: 32 x (pitch + 2 pitch / 8) floats.
extern "C" __global__ void __launch_bounds__(256, 2)
    pack_tokens(Kv kv, const uint32_t* which, const uint32_t* to, uint32_t side) {
    SHARED(float, memory);
    const bool first_thread = threadIdx.x == 0, is_key = side == 0;
    const Head head = ld_struct(kv.heads + ld_same(which + blockIdx.y, first_thread));
    const uint32_t done = is_key ? head.key_packed : head.value_packed;
    const uint32_t end_of_all = min_of(ld_same(to + 2 * blockIdx.y + side, first_thread), head.tokens);
    const uint32_t block = done / BLOCK_TOKENS + blockIdx.x, base = block * BLOCK_TOKENS;
    if (base >= end_of_all || end_of_all <= done) return;
    const uint32_t low = max_of(done, base), end = min_of(base + BLOCK_TOKENS, end_of_all);
    const uint32_t channels = is_key ? head.channels : kv.dim, pitch = pitch_of(channels), C = pitch / 8;
    float* extremes = memory + BLOCK_TOKENS * pitch;
    for (uint32_t i = threadIdx.x; i < (end - low) * C; i += blockDim.x) {
        const uint32_t token = low + i / C, c = i % C, at = (token - base) * C + c;
        float x[8], least = INFINITE, most = -INFINITE;
        if (is_key) kept_key8(kv, head, token, c, x);
        else value8(kv, head, token, c, x);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            memory[at * 8 + j] = x[j];
            if (8 * c + j >= channels) continue;
            if (x[j] < least) least = x[j];
            if (x[j] > most) most = x[j];
        }
        extremes[at * 2] = least;
        extremes[at * 2 + 1] = most;
    }
    __syncthreads();
    uint8_t* half = half_at(kv, is_key ? head.k_packed : head.v_packed, block, first_thread);
    uint32_t* levels = reinterpret_cast<uint32_t*>(half + BLOCK_TOKENS * row_bytes(kv, channels));
    const uint32_t wide = kv.group / 8;
    for (uint32_t i = threadIdx.x; i < (end - low) * C; i += blockDim.x) {
        const uint32_t row = low + i / C - base, c = i % C, group = c / wide;
        float least = INFINITE, most = -INFINITE;
        for (uint32_t other = group * wide; other < min_of((group + 1) * wide, C); other++) {
            least = fminf(least, extremes[(row * C + other) * 2]);
            most = fmaxf(most, extremes[(row * C + other) * 2 + 1]);
        }
        const uint32_t word = fit(kv.bits, least, most);
        uint32_t codes[8];
#pragma unroll
        for (int j = 0; j < 8; j++) codes[j] = code_of(kv.bits, memory[(row * C + c) * 8 + j], level_of(word));
        put_codes8(kv.bits, half + row * row_bytes(kv, channels) + c * kv.bits, codes);
        if (c % wide == 0) st(levels + row * groups_of(kv, channels) + group, word);
    }
}
KERNEL(pack_tokens)
