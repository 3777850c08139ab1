// Packing: the oldest tokens of a cache become codes of a few bits.
//
// Reads each number that is packed once and writes its code, and 4 bytes a group: dim (2 + bits / 8 + 4 / group) bytes a
// token for keys and as much for values, from 16 bits. Some five operations a number, so memory is the floor.
//
// Launch: grid (units, heads listed), 32 to 512 threads, so many that ceil(unit / (threads / (dim / 8))) <= 8. A unit is a
// group of tokens where groups of keys run along tokens, else a block; the first one is that of the first token that is not
// packed. `which` lists heads by their place in `Kv::heads`, `to` has for each the number of tokens whose keys shall be
// packed and the number of those whose values shall. The counts in the heads are those before; the caller changes them.
//
// A thread keeps its share of the unit in registers, so that everything is read before anything is written: tokens of a
// group that are packed already are packed anew from what their codes stand for. Two reads of the numbers, one for the
// extremes and one for the codes, would double the bytes.
#include "cache.cuh"

constexpr int MINE = 8;

// Keys in groups of a channel's tokens. Shared memory: threads x 8 x 2 floats.
extern "C" __global__ void __launch_bounds__(512) pack_channels(Kv kv, const uint32_t* which, const uint32_t* to) {
    SHARED(float, memory);
    const bool first_lane = threadIdx.x == 0;
    const Head head = ld_struct(kv.heads + ld_same(which + blockIdx.y, first_lane));
    const uint32_t end_of_all = min_of(ld_same(to + 2 * blockIdx.y, first_lane), head.tokens);
    const uint32_t start = (head.key_packed / kv.group + blockIdx.x) * kv.group;
    if (start >= end_of_all || end_of_all <= head.key_packed) return;
    const uint32_t end = min_of(start + kv.group, end_of_all), channels = head.channels;
    const uint32_t C = pitch_of(channels) / 8, c = threadIdx.x % C, slot = threadIdx.x / C, slots = blockDim.x / C;
    float x[MINE][8], least[8], most[8];
#pragma unroll
    for (int j = 0; j < 8; j++) least[j] = INFINITE, most[j] = -INFINITE;
#pragma unroll
    for (int i = 0; i < MINE; i++) {
        const uint32_t token = start + slot + i * slots;
        if (slot >= slots || token >= end) continue;
        kept_key8(kv, head, token, c, x[i]);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            if (x[i][j] < least[j]) least[j] = x[i][j];
            if (x[i][j] > most[j]) most[j] = x[i][j];
        }
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {
        memory[(threadIdx.x * 2) * 8 + j] = least[j];
        memory[(threadIdx.x * 2 + 1) * 8 + j] = most[j];
    }
    __syncthreads();
    uint32_t words[8] = {};
    if (slot < slots) {
        // Least and largest are the same in any order.
        for (uint32_t s = 0; s < slots; s++) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                least[j] = fminf(least[j], memory[((s * C + c) * 2) * 8 + j]);
                most[j] = fmaxf(most[j], memory[((s * C + c) * 2 + 1) * 8 + j]);
            }
        }
#pragma unroll
        for (int j = 0; j < 8; j++) words[j] = fit(kv.bits, least[j], most[j]);
    }
    if (slot >= slots) return;
#pragma unroll
    for (int i = 0; i < MINE; i++) {
        const uint32_t token = start + slot + i * slots;
        if (token >= end) continue;
        uint8_t* half = half_at(kv, head.k_packed, token / BLOCK_TOKENS, c == 0 && token % BLOCK_TOKENS == 0);
        uint32_t codes[8];
#pragma unroll
        for (int j = 0; j < 8; j++) codes[j] = code_of(kv.bits, x[i][j], level_of(words[j]));
        put_codes8(kv.bits, half + token % BLOCK_TOKENS * row_bytes(kv, channels) + c * kv.bits, codes);
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

// Values (side 1), or keys (side 0), in groups of a token's channels. Shared memory: 32 x C x 2 floats for C pieces of 8
// channels.
extern "C" __global__ void __launch_bounds__(512)
    pack_tokens(Kv kv, const uint32_t* which, const uint32_t* to, uint32_t side) {
    SHARED(float, memory);
    const bool first_lane = threadIdx.x == 0, is_key = side == 0;
    const Head head = ld_struct(kv.heads + ld_same(which + blockIdx.y, first_lane));
    const uint32_t done = is_key ? head.key_packed : head.value_packed;
    const uint32_t end_of_all = min_of(ld_same(to + 2 * blockIdx.y + side, first_lane), head.tokens);
    const uint32_t block = done / BLOCK_TOKENS + blockIdx.x, base = block * BLOCK_TOKENS;
    if (base >= end_of_all || end_of_all <= done) return;
    const uint32_t low = max_of(done, base), end = min_of(base + BLOCK_TOKENS, end_of_all);
    const uint32_t channels = is_key ? head.channels : kv.dim;
    const uint32_t C = pitch_of(channels) / 8, c = threadIdx.x % C, slot = threadIdx.x / C, slots = blockDim.x / C;
    float x[MINE][8];
#pragma unroll
    for (int i = 0; i < MINE; i++) {
        const uint32_t token = low + slot + i * slots;
        if (slot >= slots || token >= end) continue;
        if (is_key) kept_key8(kv, head, token, c, x[i]);
        else value8(kv, head, token, c, x[i]);
        float least = INFINITE, most = -INFINITE;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            if (8 * c + j >= channels) continue;
            if (x[i][j] < least) least = x[i][j];
            if (x[i][j] > most) most = x[i][j];
        }
        memory[((token - base) * C + c) * 2] = least;
        memory[((token - base) * C + c) * 2 + 1] = most;
    }
    __syncthreads();
    if (slot >= slots) return;
    uint8_t* half = half_at(kv, is_key ? head.k_packed : head.v_packed, block, c == 0 && slot == 0);
    const uint32_t wide = kv.group / 8, group = c / wide;
    uint32_t* levels = reinterpret_cast<uint32_t*>(half + BLOCK_TOKENS * row_bytes(kv, channels));
#pragma unroll
    for (int i = 0; i < MINE; i++) {
        const uint32_t token = low + slot + i * slots, row = token - base;
        if (token >= end) continue;
        float least = INFINITE, most = -INFINITE;
        for (uint32_t other = group * wide; other < min_of((group + 1) * wide, C); other++) {
            least = fminf(least, memory[(row * C + other) * 2]);
            most = fmaxf(most, memory[(row * C + other) * 2 + 1]);
        }
        const uint32_t word = fit(kv.bits, least, most);
        uint32_t codes[8];
#pragma unroll
        for (int j = 0; j < 8; j++) codes[j] = code_of(kv.bits, x[i][j], level_of(word));
        put_codes8(kv.bits, half + row * row_bytes(kv, channels) + c * kv.bits, codes);
        if (c % wide == 0) st(levels + row * groups_of(kv, channels) + group, word);
    }
}
KERNEL(pack_tokens)
