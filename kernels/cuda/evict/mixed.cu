// Eviction from caches of several forms.
//
// Moves what `evict_compact` moves, in the bytes of each form. Packed tokens move in place, with their scales; keys that are
// packed along channels are grouped and packed anew from the first group that loses a token on. Whole and pruned tokens move
// to new halves, as where a form begins inside a block changes. Memory.
//
// `Kv::heads` are the heads before, `next` those after (counts, and tables that name the packed halves that stay and the new
// ones). Launch of `evict_packed` (side 0: keys packed by token, 1: values): grid (kv_heads, items), 256 threads. Of
// `evict_regroup`: the same, with 4 (group * dim + 16 x 256) bytes of shared memory. Of `evict_move`: grid
// (ceil(most kept * 2 * dim / 8 / 256), kv_heads, items), 256 threads. Positions and tallies go by `evict_numbers`.
#include "../cache.cuh"

template <class Piece>
DEVICE void move_codes(const uint8_t* from, uint8_t* to, bool reads, uint64_t& held) {
    if (reads) held = uint64_t(ld(reinterpret_cast<const Piece*>(from)));
    else st(reinterpret_cast<Piece*>(to), Piece(held));
}

DEVICE void move_piece(uint32_t bits, uint8_t* p, bool reads, uint64_t& held) {
    switch (bits) {
        case 1: return move_codes<uint8_t>(p, p, reads, held);
        case 2: return move_codes<uint16_t>(p, p, reads, held);
        case 4: return move_codes<uint32_t>(p, p, reads, held);
        default: return move_codes<uint64_t>(p, p, reads, held);
    }
}

extern "C" __global__ void __launch_bounds__(256)
    evict_packed(Kv kv, const Item* items, const Head* next, const uint32_t* kept, uint32_t side) {
    const Item item = ld_struct(items + blockIdx.y);
    const Head head = ld_struct(head_of(kv, item, blockIdx.x));
    const Head after = ld_struct(next + item.sequence * kv.kv_heads + blockIdx.x);
    if (after.tokens >= head.tokens) return;
    const uint32_t stay = side == 0 ? after.key_packed : after.value_packed;
    const uint32_t table = side == 0 ? head.k_packed : head.v_packed;
    const uint32_t channels = side == 0 ? head.channels : kv.dim, C = pitch_of(channels) / 8;
    const uint32_t groups = groups_of(kv, channels), pieces = C + groups, bytes = row_bytes(kv, channels);
    const auto move = [&](uint32_t token, uint32_t piece, bool reads, uint64_t& held) {
        uint8_t* half = half_at(kv, table, token / BLOCK_TOKENS, false);
        const uint32_t row = token % BLOCK_TOKENS;
        if (piece < C) return move_piece(kv.bits, half + row * bytes + piece * kv.bits, reads, held);
        uint8_t* levels = half + BLOCK_TOKENS * bytes + 4 * (row * groups + piece - C);
        move_codes<uint32_t>(levels, levels, reads, held);
    };
    const uint32_t slots = max_of(blockDim.x / pieces, 1), slot = threadIdx.x / pieces, piece = threadIdx.x % pieces;
    for (uint32_t first = 0; first < stay; first += slots) {
        const uint32_t to = first + slot;
        const bool mine = slot < slots && to < stay;
        const uint32_t from = mine ? ld_same(kept + head.meta + to, piece == 0) : to;
        uint64_t held = 0;
        if (from != to) move(from, piece, true, held);
        __syncthreads();
        if (from != to) move(to, piece, false, held);
        __syncthreads();
    }
}
KERNEL(evict_packed)

extern "C" __global__ void __launch_bounds__(256, 2)
    evict_regroup(Kv kv, const Item* items, const Head* next, const uint32_t* kept) {
    SHARED(float, memory);
    const Item item = ld_struct(items + blockIdx.y);
    const Head head = ld_struct(head_of(kv, item, blockIdx.x));
    const Head after = ld_struct(next + item.sequence * kv.kv_heads + blockIdx.x);
    if (after.tokens >= head.tokens) return;
    const uint32_t stay = after.key_packed, channels = head.channels, pitch = pitch_of(channels), C = pitch / 8;
    const uint32_t c = threadIdx.x % C, slot = threadIdx.x / C, slots = blockDim.x / C;
    float* extremes = memory + kv.group * pitch;
    // Groups in front of the first gap are what they were.
    uint32_t low = 0, high = stay;
    while (low < high) {
        const uint32_t middle = (low + high) / 2;
        if (ld_same(kept + head.meta + middle, threadIdx.x == 0) == middle) low = middle + 1;
        else high = middle;
    }
    if (low == stay) return;
    for (uint32_t start = low / kv.group * kv.group; start < stay; start += kv.group) {
        const uint32_t end = min_of(start + kv.group, stay);
        float least[8], most[8];
#pragma unroll
        for (int j = 0; j < 8; j++) least[j] = INFINITE, most[j] = -INFINITE;
        __syncthreads();
        if (slot < slots) {
            for (uint32_t token = start + slot; token < end; token += slots) {
                float x[8];
                stored_key8(kv, head, ld_same(kept + head.meta + token, c == 0), c, x);
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
        if (slot >= slots) continue;
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
        for (uint32_t block = start / BLOCK_TOKENS + slot; block < blocks_of(end); block += slots) {
            uint8_t* half = half_at(kv, head.k_packed, block, c == 0);
            uint4* levels = reinterpret_cast<uint4*>(half + BLOCK_TOKENS * row_bytes(kv, channels)) + 2 * c;
            st(levels, uint4{words[0], words[1], words[2], words[3]});
            st(levels + 1, uint4{words[4], words[5], words[6], words[7]});
        }
    }
}
KERNEL(evict_regroup)

extern "C" __global__ void __launch_bounds__(256)
    evict_move(Kv kv, const Item* items, const Head* next, const uint32_t* kept) {
    const Item item = ld_struct(items + blockIdx.z);
    const Head head = ld_struct(head_of(kv, item, blockIdx.y));
    const Head after = ld_struct(next + item.sequence * kv.kv_heads + blockIdx.y);
    const uint32_t C = kv.dim / 8, i = blockIdx.x * blockDim.x + threadIdx.x, token = i / (2 * C), c = i % C;
    if (after.tokens >= head.tokens || token >= after.tokens) return;
    const bool is_key = i / C % 2 == 0;
    if (token < (is_key ? after.key_packed : after.value_packed)) return;
    const uint32_t from = ld_same(kept + head.meta + token, c == 0);
    const bool pruned = is_key && token < after.key_narrow;
    if (pruned && 8 * c >= pitch_of(head.channels)) return;
    float x[8];
    if (is_key) stored_key8(kv, head, from, c, x);
    else value8(kv, head, from, c, x);
    const uint32_t table = pruned ? after.k_pruned : is_key ? after.k_whole : after.v_whole;
    const size_t row = size_t(token % BLOCK_TOKENS) * (pruned ? pitch_of(head.channels) : kv.dim);
    store8(kv.format, half_at(kv, table, token / BLOCK_TOKENS, c == 0), row + 8 * c, x);
}
KERNEL(evict_move)
