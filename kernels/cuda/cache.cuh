// Reading cached keys and values of any form, eight channels at a time.
#pragma once

#include "common.cuh"

// Eight codes, the first in the lowest bits, as floats.
DEVICE void codes8(uint32_t bits, const uint8_t* p, float* out) {
    uint32_t low, high = 0;
    if (bits == 8) {
        const uint2 v = ld(reinterpret_cast<const uint2*>(p));
        low = v.x, high = v.y;
    } else if (bits == 4) {
        low = ld(reinterpret_cast<const uint32_t*>(p));
    } else if (bits == 2) {
        low = ld(reinterpret_cast<const uint16_t*>(p));
    } else {
        low = ld(p);
    }
    const uint32_t mask = (1u << bits) - 1;
#pragma unroll
    for (uint32_t i = 0; i < 8; i++) {
        const uint32_t word = i >= 4 && bits == 8 ? high : low;
        // The lowest bits of 2^23 + code: conversions are slow.
        out[i] = __fadd_rn(__uint_as_float((word >> (bits * i & 31) & mask) | 0x4b000000), -8388608.0f);
    }
}

DEVICE void put_codes8(uint32_t bits, uint8_t* p, const uint32_t* code) {
    uint32_t low = 0, high = 0;
    if (bits == 8) {
#pragma unroll
        for (int i = 0; i < 4; i++) low |= code[i] << 8 * i, high |= code[4 + i] << 8 * i;
        return st(reinterpret_cast<uint2*>(p), uint2{low, high});
    }
#pragma unroll
    for (int i = 0; i < 8; i++) low |= code[i] << bits * i;
    if (bits == 4) st(reinterpret_cast<uint32_t*>(p), low);
    else if (bits == 2) st(reinterpret_cast<uint16_t*>(p), uint16_t(low));
    else st(p, uint8_t(low));
}

// Scale and zero of a group.
struct Level {
    float scale, zero;
};
DEVICE Level level_of(uint32_t word) { return {half_to_float(uint16_t(word)), half_to_float(uint16_t(word >> 16))}; }

DEVICE uint32_t row_bytes(const Kv& kv, uint32_t channels) { return pitch_of(channels) * kv.bits / 8; }
DEVICE const uint32_t* levels_at(const Kv& kv, const uint8_t* half, uint32_t channels) {
    return reinterpret_cast<const uint32_t*>(half + BLOCK_TOKENS * row_bytes(kv, channels));
}
DEVICE uint32_t groups_of(const Kv& kv, uint32_t channels) { return divided(pitch_of(channels), kv.group); }

// Channels 8 c to 8 c + 7 of a packed row; `first` counts levels, where several threads read the same.
DEVICE void packed8(const Kv& kv, const uint8_t* half, uint32_t channels, bool by_channel, uint32_t row, uint32_t c,
                    float* out, bool first = true) {
    codes8(kv.bits, half + row * row_bytes(kv, channels) + c * kv.bits, out);
    const uint32_t* levels = levels_at(kv, half, channels);
    if (by_channel) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint4 v = ld_same(reinterpret_cast<const uint4*>(levels) + 2 * c + i, first);
            const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const Level level = level_of(words[j]);
                out[4 * i + j] = fmaf(out[4 * i + j], level.scale, level.zero);
            }
        }
    } else {
        const uint32_t group = 8 * c / kv.group;
        const Level level =
            level_of(ld_same(levels + row * groups_of(kv, channels) + group, first && 8 * c % kv.group == 0));
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] = fmaf(out[i], level.scale, level.zero);
    }
}

DEVICE float packed1(const Kv& kv, const uint8_t* half, uint32_t channels, bool by_channel, uint32_t row, uint32_t d) {
    const uint32_t bit = d * kv.bits;
    const uint32_t code =
        uint32_t(ld(half + row * row_bytes(kv, channels) + bit / 8)) >> bit % 8 & ((1u << kv.bits) - 1);
    const uint32_t group = by_channel ? d : row * groups_of(kv, channels) + d / kv.group;
    const Level level = level_of(ld(levels_at(kv, half, channels) + group));
    return fmaf(float(code), level.scale, level.zero);
}

// Channels 8 c to 8 c + 7 of a stored key: of the kept channels where the token has no others.
DEVICE void stored_key8(const Kv& kv, const Head& head, uint32_t token, uint32_t c, float* out) {
    const uint32_t block = token / BLOCK_TOKENS, row = token % BLOCK_TOKENS;
    if (token >= head.key_narrow) {
        load8(kv.format, half_at(kv, head.k_whole, block, c == 0), size_t(row) * kv.dim + 8 * c, out);
    } else if (token < head.key_packed) {
        packed8(kv, half_at(kv, head.k_packed, block, c == 0), head.channels, kv.key_axis == 0, row, c, out);
    } else {
        const uint8_t* half = half_at(kv, head.k_pruned, block, c == 0);
        load8(kv.format, half, size_t(row) * pitch_of(head.channels) + 8 * c, out);
    }
}

// Channels 8 c to 8 c + 7 of a key as attention sees it: 0 where the token lacks one.
DEVICE void key8(const Kv& kv, const Head& head, uint32_t token, uint32_t c, float* out) {
    if (token >= head.key_narrow || head.channels == kv.dim) return stored_key8(kv, head, token, c, out);
    const uint32_t block = token / BLOCK_TOKENS, row = token % BLOCK_TOKENS;
    const bool packed = token < head.key_packed;
    const uint8_t* half = half_at(kv, packed ? head.k_packed : head.k_pruned, block, c == 0);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const uint32_t place = ld(kv.kept + head.kept + head.channels + 8 * c + i);
        out[i] = 0.0f;
        if (place == DROPPED) continue;
        out[i] = packed ? packed1(kv, half, head.channels, kv.key_axis == 0, row, place)
                        : load1(kv.format, half, size_t(row) * pitch_of(head.channels) + place);
    }
}

DEVICE void value8(const Kv& kv, const Head& head, uint32_t token, uint32_t c, float* out) {
    const uint32_t block = token / BLOCK_TOKENS, row = token % BLOCK_TOKENS;
    if (token >= head.value_packed) {
        load8(kv.format, half_at(kv, head.v_whole, block, c == 0), size_t(row) * kv.dim + 8 * c, out);
    } else {
        packed8(kv, half_at(kv, head.v_packed, block, c == 0), kv.dim, false, row, c, out);
    }
}

// Lanes that read a row together, eight channels each: 8, 16 or 32; those behind the last channel have nothing.
DEVICE uint32_t lanes_of(uint32_t dim) { return dim <= 64 ? 8 : dim <= 128 ? 16 : 32; }

// The first of `tokens` cached tokens that a query sees: those at positions above `own - window`, `own` that of the last.
DEVICE uint32_t first_seen(const Kv& kv, const Head& head, uint32_t tokens, uint32_t window) {
    if (window == 0 || tokens == 0) return 0;
    const uint32_t* positions = kv.positions + head.meta;
    const bool first = threadIdx.x % 32 == 0;
    const uint32_t own = ld_same(positions + tokens - 1, first);
    uint32_t low = 0, high = tokens - 1;
    while (low < high) {
        const uint32_t middle = (low + high) / 2;
        if (uint64_t(ld_same(positions + middle, first)) + window <= own) low = middle + 1;
        else high = middle;
    }
    return low;
}

DEVICE float to_score(float product, float scale, float softcap) {
    const float score = product * scale;
    return softcap > 0.0f ? softcap * tanhf(score / softcap) : score;
}

// Places 8 c to 8 c + 7 of a key among its kept channels, zeros behind the last.
DEVICE void kept_key8(const Kv& kv, const Head& head, uint32_t token, uint32_t c, float* out) {
    if (token < head.key_narrow || head.channels == kv.dim) return stored_key8(kv, head, token, c, out);
    const uint8_t* half = half_at(kv, head.k_whole, token / BLOCK_TOKENS, c == 0);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const uint32_t place = 8 * c + i;
        if (place >= head.channels) {
            out[i] = 0.0f;
        } else {
            const uint32_t channel = ld(kv.kept + head.kept + place);
            out[i] = load1(kv.format, half, size_t(token % BLOCK_TOKENS) * kv.dim + channel);
        }
    }
}

// Scale and zero of a group with these extremes, as they are stored.
DEVICE uint32_t fit(uint32_t bits, float least, float most) {
    float scale, zero;
    if (bits == 1) {
        scale = (most - least) * 0.5f;
        zero = __fadd_rn(__fmul_rn(3.0f, least), most) * 0.25f;
    } else {
        scale = __fdiv_rn(most - least, float((1u << bits) - 1));
        zero = least;
    }
    // An infinite scale would make every number one.
    scale = fminf(fmaxf(scale, -65504.0f), 65504.0f);
    zero = fminf(fmaxf(zero, -65504.0f), 65504.0f);
    return uint32_t(float_to_half(scale)) | uint32_t(float_to_half(zero)) << 16;
}

DEVICE uint32_t code_of(uint32_t bits, float x, Level level) {
    float code = level.scale > 0.0f ? __fdiv_rn(x - level.zero, level.scale) : 0.0f;
    code = fminf(fmaxf(code, 0.0f), float((1u << bits) - 1));
    // Adding 1.5 * 2^23 rounds to whole numbers, which are then the lowest bits.
    return __float_as_uint(__fadd_rn(code, 12582912.0f)) & 0xff;
}
