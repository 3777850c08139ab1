// Kernels with mistakes, which the shim has to find.
#include "../common.cuh"

// Reads what another thread writes without waiting for it.
extern "C" void fault_order(float* out) {
    SHARED(float, memory);
    memory[threadIdx.x] = float(threadIdx.x);
    const float other = memory[(threadIdx.x + 1) % blockDim.x];
    st(out + threadIdx.x, other == other ? other : -1.0f);
}
KERNEL(fault_order)

// Two halves of a block wait at different places.
extern "C" void fault_divergence(float* out) {
    if (threadIdx.x < 32) __syncthreads();
    else
        __syncthreads();
    st(out + threadIdx.x, 0.0f);
}
KERNEL(fault_divergence)

// Some threads leave while others wait.
extern "C" void fault_deadlock(float* out) {
    if (threadIdx.x == 40) return;
    __syncthreads();
    st(out + threadIdx.x, 0.0f);
}
KERNEL(fault_deadlock)

// A shuffle that not all lanes take part in.
extern "C" void fault_lanes(float* out) {
    float x = 1.0f;
    if (threadIdx.x % 2 == 0) x = sum_of(x);
    st(out + threadIdx.x, x);
}
KERNEL(fault_lanes)

extern "C" void fault_outside(float* out) { st(out + threadIdx.x + 1, 0.0f); }
KERNEL(fault_outside)

extern "C" void fault_alignment(float* out) {
    if (threadIdx.x == 0) st(reinterpret_cast<uint4*>(out + 1), uint4{0, 0, 0, 0});
}
KERNEL(fault_alignment)

extern "C" void fault_read_only(float* out, float* input) {
    st(input + threadIdx.x, ld(out + threadIdx.x));
}
KERNEL(fault_read_only)

// Four bytes too many.
extern "C" void fault_shared(float* out) {
    SHARED(float, memory);
    memory[threadIdx.x + 1] = 0.0f;
    st(out + threadIdx.x, 0.0f);
}
KERNEL(fault_shared)
