// out = activation(gate) * up, where a row of the input is `ffn` numbers of gate, then `ffn` of up.
//
// Reads two numbers and writes one; some ten FLOPs and an exponential. Memory.
//
// Launch: grid (ceil(rows * ffn / 8 / 256)), 256 threads. `ffn` is a multiple of 8.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256) gated(Rows gate_up, uint32_t rows, uint32_t gelu, Rows out) {
    const uint32_t C = out.width / 8;
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= size_t(rows) * C) return;
    const size_t row = i / C, c = i % C;
    float x[8], up[8];
    load8(gate_up.type, gate_up.data, row * gate_up.width + 8 * c, x);
    load8(gate_up.type, gate_up.data, row * gate_up.width + out.width + 8 * c, up);
#pragma unroll
    for (int j = 0; j < 8; j++) {
        // Both are x sigmoid(y): (1 + tanh u) / 2 is the sigmoid of 2u, without its cancellation.
        const float y = gelu ? 1.595769f * fmaf(x[j] * x[j] * 0.044715f, x[j], x[j]) : x[j];
        x[j] = x[j] * (1.0f / (1.0f + expf(-y))) * up[j];
    }
    store8(out.type, out.data, row * out.width + 8 * c, x);
}
KERNEL(gated)
