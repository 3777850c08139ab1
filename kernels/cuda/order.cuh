// Orders of cached tokens by score, protected ones last: what decides who leaves.
#pragma once

#include "common.cuh"

// Tokens that stay whatever their score: those at the first positions, and those at the last.
struct Protect {
    uint32_t sinks, recent;
};

constexpr uint32_t SINK = 0xffffffff, RECENT = 0xfffffffe;

// A number that sorts like (protection, score). What is no number sorts like minus infinity.
DEVICE uint32_t ordinal_of(float score, uint32_t position, uint32_t seen, const Protect& protect) {
    if (position < protect.sinks) return SINK;
    if (position >= (seen > protect.recent ? seen - protect.recent : 0)) return RECENT;
    if (score != score) score = -INFINITE;
    // Adding zero makes -0 equal to 0. Negative numbers sort backwards by their bits.
    const uint32_t bits = __float_as_uint(score + 0.0f);
    return bits >> 31 ? ~bits : bits | 1u << 31;
}

// What is chosen: those above a bound, and `ties` of those at it.
struct Bound {
    uint32_t ordinal, ties;
};

// The bound of the `keep` largest of `count` ordinals, by counting digits of eight bits. `counts` has 256 numbers in shared
// memory. Whole block.
template <class Of>
DEVICE Bound bound_of(uint32_t count, uint32_t keep, uint32_t* counts, const Of& of) {
    uint32_t prefix = 0, left = keep;
    for (int shift = 24; shift >= 0; shift -= 8) {
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < 256; i += blockDim.x) counts[i] = 0;
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) {
            const uint32_t x = of(i);
            if (shift == 24 || x >> (shift + 8) == prefix) atomicAdd(counts + (x >> shift & 255), 1u);
        }
        __syncthreads();
        uint32_t digit = 255;
        while (digit > 0 && counts[digit] < left) left -= counts[digit--];
        prefix = prefix << 8 | digit;
    }
    __syncthreads();
    return {prefix, left};
}

// Calls `take(place, i)` for the `keep` largest of `count` ordinals, in the order of i: of those at the bound the first ones,
// or the last if they are RECENT. `counts` has 256 numbers, `scratch` one per warp. Whole block.
template <class Of, class Take>
DEVICE void choose(uint32_t count, uint32_t keep, uint32_t* counts, uint32_t* scratch, const Of& of, const Take& take) {
    if (keep == 0) return;
    const Bound bound = keep < count ? bound_of(count, keep, counts, of) : Bound{0, count};
    uint32_t skipped = 0;
    if (bound.ordinal == RECENT) {
        uint32_t mine = 0, equals;
        for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) mine += of(i) == RECENT;
        block_before(mine, scratch, &equals);
        skipped = equals - bound.ties;
    }
    uint32_t ties = 0, next = 0;
    for (uint32_t first = 0; first < count; first += blockDim.x) {
        const uint32_t i = first + threadIdx.x, x = i < count ? of(i) : 0;
        const bool at_bound = i < count && x == bound.ordinal;
        uint32_t all;
        const uint32_t place = ties + block_before(at_bound, scratch, &all);
        ties += all;
        const bool taken =
            i < count && (x > bound.ordinal || (at_bound && place >= skipped && place < skipped + bound.ties));
        const uint32_t before = block_before(taken, scratch, &all);
        if (taken) take(next + before, i);
        next += all;
    }
}

// Sorts `count` tokens by ordinals, ascending, equal ones as they stand in `order`: a bit at a time, so 32 passes over
// `order` and `other` in global memory, with two counts a pass and stretch. Ends in `order`. Whole block; `scratch` has a
// number per warp.
template <class Of>
DEVICE void sort(uint32_t count, uint32_t* order, uint32_t* other, uint32_t* scratch, const Of& of) {
    for (uint32_t bit = 0; bit < 32; bit++) {
        const uint32_t* from = bit % 2 == 0 ? order : other;
        uint32_t* to = bit % 2 == 0 ? other : order;
        uint32_t mine = 0, zeros, ones = 0;
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) mine += (of(ld(from + i)) >> bit & 1) ^ 1;
        block_before(mine, scratch, &zeros);
        uint32_t next = 0;
        for (uint32_t first = 0; first < count; first += blockDim.x) {
            const uint32_t i = first + threadIdx.x;
            const bool there = i < count;
            const uint32_t token = there ? ld(from + i) : 0;
            const bool zero = there && (of(token) >> bit & 1) == 0;
            uint32_t all;
            const uint32_t before = block_before(zero, scratch, &all);
            if (there) st(to + (zero ? next + before : zeros + ones + threadIdx.x - before), token);
            next += all;
            ones += blockDim.x - all;
        }
    }
    __syncthreads();
}
