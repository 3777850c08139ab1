// Weights of 4 or 8 bits in blocks of 32 along K, each with a scale and a minimum of 16 bits.
//
// Codes lie row by row, [n][k * bits / 8], the first in the lowest bits; scales and minima (2 x f16) too, [n][k / 32]. A
// weight is code * scale + minimum, as on the CPU.
#pragma once

#include "cache.cuh"

// Weights 8 c to 8 c + 7 of row n.
DEVICE void weights8(const uint8_t* codes, const uint32_t* levels, uint32_t bits, uint32_t k, uint32_t n, uint32_t c,
                     float* out) {
    const Level level = level_of(ld_same(levels + size_t(n) * (k / 32) + c / 4, c % 4 == 0));
    codes8(bits, codes + (size_t(n) * k + 8 * c) * bits / 8, out);
#pragma unroll
    for (int j = 0; j < 8; j++) out[j] = fmaf(out[j], level.scale, level.zero);
}
