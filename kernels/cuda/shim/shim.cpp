// The scheduler of fibers behind shim.h.
#include "shim.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <vector>

thread_local Dim threadIdx, blockIdx, blockDim, gridDim;

#if defined(__x86_64__)
// Saves what a call must keep, and goes on at another stack.
extern "C" void shim_swap(void** from, void* to);
asm(R"(
.text
.globl shim_swap
.type shim_swap, @function
shim_swap:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size shim_swap, .-shim_swap
)");
#else
#include <ucontext.h>
#endif

namespace shim {
namespace {

constexpr size_t STACK = 128 << 10;
constexpr size_t GUARD = 256;
constexpr size_t MOST_SHARED = 228 << 10;
constexpr unsigned MOST_THREADS = 1024;
constexpr unsigned char POISON = 0xff;  // as floats of any width: not a number

enum State { READY, IN_WARP, IN_BLOCK, DONE };

struct Fiber {
#if defined(__x86_64__)
    void* top;
#else
    ucontext_t context;
#endif
    State state;
    int line;
    unsigned exchanges;
};

struct World {
    Launch* launch = nullptr;
    Body body = nullptr;
    void** arguments = nullptr;
    unsigned char* stacks = nullptr;
    std::vector<unsigned char> shared, shown;
    std::vector<Fiber> fibers;
    std::vector<unsigned> arrived;  // lanes of each warp
    unsigned in_block = 0, current = 0;
    uint64_t random = 0;
    const Buffer* last = nullptr;
    bool failed = false;
#if defined(__x86_64__)
    void* scheduler = nullptr;
#else
    ucontext_t scheduler;
#endif
};
thread_local World world;

void leave() {
    Fiber& own = world.fibers[world.current];
#if defined(__x86_64__)
    shim_swap(&own.top, world.scheduler);
#else
    swapcontext(&own.context, &world.scheduler);
#endif
}

void report(const char* format, ...) {
    if (world.failed) return;
    world.failed = true;
    va_list list;
    va_start(list, format);
    vsnprintf(world.launch->error, sizeof world.launch->error, format, list);
    va_end(list);
}

// A fiber that failed never goes on: its stack holds nothing that needs an end.
void give_up() {
    world.fibers[world.current].state = DONE;
    leave();
}

void fiber_main() {
    world.body(world.arguments);
    world.fibers[world.current].state = DONE;
    leave();
}

unsigned draw(unsigned below) {
    world.random = world.random * 6364136223846793005ull + 1442695040888963407ull;
    return unsigned((world.random >> 33) % below);
}

void order(std::vector<unsigned>& ids) {
    const unsigned kind = world.launch->order;
    for (size_t i = 0; i < ids.size(); i++) ids[i] = unsigned(kind == 1 ? ids.size() - 1 - i : i);
    if (kind > 1) {
        for (size_t i = ids.size(); i > 1; i--) std::swap(ids[i - 1], ids[draw(unsigned(i))]);
    }
}

void start(unsigned thread) {
    Fiber& fiber = world.fibers[thread];
    fiber.state = READY;
    fiber.exchanges = 0;
    unsigned char* base = world.stacks + thread * STACK;
    std::memset(base, POISON, 64);
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(base + STACK - 64);
    *--top = nullptr;  // where a function called here would find its return address
    *--top = reinterpret_cast<void*>(fiber_main);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    fiber.top = top;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = base;
    fiber.context.uc_stack.ss_size = STACK;
    makecontext(&fiber.context, fiber_main, 0);
#endif
}

void resume(unsigned thread) {
    world.current = thread;
    threadIdx = {thread, 0, 0};
#if defined(__x86_64__)
    shim_swap(&world.scheduler, world.fibers[thread].top);
#else
    swapcontext(&world.scheduler, &world.fibers[thread].context);
#endif
}

// Lets those go on who have all arrived at the same line.
bool release(size_t first, size_t count, const char* what) {
    std::vector<Fiber>& fibers = world.fibers;
    for (size_t i = first; i < first + count; i++) {
        if (fibers[i].line != fibers[first].line) {
            report("threads %zu and %zu of block %u wait for each other's %s at lines %d and %d", first, i,
                   blockIdx.x, what, fibers[first].line, fibers[i].line);
            return false;
        }
    }
    for (size_t i = first; i < first + count; i++) fibers[i].state = READY;
    return true;
}

bool intact(const unsigned char* guard, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) {
        if (guard[i] != POISON) return false;
    }
    return true;
}

void run_block(std::vector<unsigned>& threads) {
    const Launch& launch = *world.launch;
    std::memset(world.shared.data(), POISON, 2 * GUARD + launch.shared_bytes);
    std::fill(world.arrived.begin(), world.arrived.end(), 0);
    world.in_block = 0;
    for (unsigned i = 0; i < launch.block; i++) start(i);
    for (;;) {
        bool ran = false;
        order(threads);
        for (unsigned thread : threads) {
            if (world.fibers[thread].state == READY) {
                ran = true;
                resume(thread);
                if (world.failed) return;
            }
        }
        if (ran) continue;
        size_t done = 0, stuck = 0;
        for (size_t i = 0; i < world.fibers.size(); i++) {
            if (world.fibers[i].state == DONE) done++;
            else stuck = i;
        }
        if (done < world.fibers.size()) {
            report("deadlock: thread %zu of block %u,%u,%u waits at line %d for threads that never come (%zu have ended)",
                   stuck, blockIdx.x, blockIdx.y, blockIdx.z, world.fibers[stuck].line, done);
        }
        break;
    }
    const size_t end = GUARD + launch.shared_bytes;
    if (!intact(world.shared.data(), GUARD) || !intact(world.shared.data() + end, GUARD)) {
        report("block %u,%u,%u wrote outside of its %u bytes of shared memory", blockIdx.x, blockIdx.y, blockIdx.z,
               launch.shared_bytes);
    }
    for (size_t i = 0; i < world.fibers.size(); i++) {
        if (!intact(world.stacks + i * STACK, 64)) report("thread %zu used more stack than the shim has", i);
    }
}

}  // namespace

void run(Launch* launch, Body body, void** arguments) {
    world.launch = launch;
    world.body = body;
    world.arguments = arguments;
    world.failed = false;
    world.last = nullptr;
    world.random = launch->order;
    launch->loaded = launch->stored = 0;
    launch->error[0] = 0;
    if (launch->block == 0 || launch->block % 32 != 0 || launch->block > MOST_THREADS) {
        return report("%u threads are not whole warps of a block", launch->block);
    }
    if (world.stacks == nullptr) {
        void* memory = mmap(nullptr, MOST_THREADS * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) return report("no memory for the stacks of fibers");
        world.stacks = static_cast<unsigned char*>(memory);
    }
    if (launch->shared_bytes > MOST_SHARED) return report("%u bytes of shared memory", launch->shared_bytes);
    // Room for strides far beyond the guard, too.
    world.shared.resize(4 * MOST_SHARED);
    world.shown.resize(launch->block * 64 * 2);
    world.fibers.resize(launch->block);
    world.arrived.resize(launch->block / 32);
    const uint32_t* grid = launch->grid;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {launch->block, 1, 1};
    std::vector<unsigned> blocks(grid[0] * grid[1] * grid[2]), threads(launch->block);
    order(blocks);
    for (unsigned block : blocks) {
        blockIdx = {block % grid[0], block / grid[0] % grid[1], block / grid[0] / grid[1]};
        run_block(threads);
        if (world.failed) return;
    }
}

void barrier(int line) {
    Fiber& own = world.fibers[world.current];
    own.line = line;
    own.state = IN_BLOCK;
    if (++world.in_block == world.fibers.size()) {
        world.in_block = 0;
        if (!release(0, world.fibers.size(), "__syncthreads")) return give_up();
    }
    leave();
}

const unsigned char* exchange(const void* value, size_t bytes, int line) {
    const unsigned thread = world.current, warp = thread / 32;
    Fiber& own = world.fibers[thread];
    // Two buffers in turns: nobody is two exchanges ahead of a lane that still reads.
    unsigned char* shown = world.shown.data() + (own.exchanges++ % 2) * world.fibers.size() * 64;
    std::memcpy(shown + thread * 64, value, bytes);
    own.line = line;
    own.state = IN_WARP;
    if (++world.arrived[warp] == 32) {
        world.arrived[warp] = 0;
        if (!release(warp * 32, 32, "warp function")) give_up();
    }
    leave();
    return shown + warp * 32 * 64;
}

unsigned char* shared() { return world.shared.data() + GUARD; }

void check(const void* p, size_t bytes, bool writes, bool counts) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(p);
    Launch& launch = *world.launch;
    auto inside = [&](const Buffer& b) { return at >= b.begin && at + bytes <= b.end; };
    if (world.last == nullptr || !inside(*world.last)) {
        // Buffers are sorted by address.
        const Buffer* end = launch.buffers + launch.buffer_count;
        const Buffer* next = std::upper_bound(launch.buffers, end, at,
                                              [](uintptr_t a, const Buffer& b) { return a < b.begin; });
        world.last = next != launch.buffers && inside(next[-1]) ? next - 1 : nullptr;
    }
    if (world.last == nullptr || at % bytes != 0 || (writes && !world.last->writable)) {
        const char* why = world.last == nullptr ? "outside of any buffer" : at % bytes ? "not aligned" : "not writable";
        report("thread %u of block %u,%u,%u %s %zu bytes %s", threadIdx.x, blockIdx.x, blockIdx.y, blockIdx.z,
               writes ? "writes" : "reads", bytes, why);
        give_up();
    }
    if (counts) (writes ? launch.stored : launch.loaded) += bytes;
}

}  // namespace shim

float half_to_float(uint16_t bits) {
    const unsigned sign = unsigned(bits & 0x8000) << 16, exponent = bits >> 10 & 31, mantissa = bits & 1023;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000 | mantissa << 13);
    if (exponent == 0) {
        const float x = float(mantissa) / 16777216.0f;
        return sign ? -x : x;
    }
    return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

uint16_t float_to_half(float x) {
    const unsigned bits = __float_as_uint(x), magnitude = bits & 0x7fffffff;
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    if (magnitude > 0x7f800000) return sign | 0x7e00;
    if (magnitude >= 0x477ff000) return sign | 0x7c00;
    if (magnitude < 0x38800000) {
        // Multiples of 2^-24: adding 1.5 * 2^23 rounds to whole numbers.
        return sign | uint16_t(__float_as_uint(__uint_as_float(magnitude) * 16777216.0f + 12582912.0f) & 0x7ff);
    }
    return sign | uint16_t((magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13);
}

void mma_16816(float d[4], const unsigned a[4], const unsigned b[2], bool brain) {
    struct Own {
        unsigned a[4], b[2];
    } own;
    std::memcpy(own.a, a, sizeof own.a);
    std::memcpy(own.b, b, sizeof own.b);
    const unsigned char* all = shim::exchange(&own, sizeof own, __LINE__);
    auto number = [&](unsigned word, unsigned odd) {
        const uint16_t bits = uint16_t(odd ? word >> 16 : word);
        return brain ? __uint_as_float(unsigned(bits) << 16) : half_to_float(bits);
    };
    const unsigned lane = threadIdx.x % 32;
    for (unsigned i = 0; i < 4; i++) {
        const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = 0;
        for (unsigned k = 0; k < 16; k++) {
            const Own* left = reinterpret_cast<const Own*>(all + (row % 8 * 4 + k % 8 / 2) * 64);
            const Own* right = reinterpret_cast<const Own*>(all + (column * 4 + k % 8 / 2) * 64);
            sum += number(left->a[row / 8 + k / 8 * 2], k % 2) * number(right->b[k / 8], k % 2);
        }
        d[i] += sum;
    }
}

void ldmatrix_transposed(unsigned b[2], const uint16_t* row) {
    const unsigned char* all = shim::exchange(&row, sizeof row, __LINE__);
    const unsigned lane = threadIdx.x % 32;
    for (unsigned i = 0; i < 2; i++) {
        unsigned word = 0;
        for (unsigned j = 0; j < 2; j++) {
            const uint16_t* from;
            std::memcpy(&from, all + (i * 8 + lane % 4 * 2 + j) * 64, sizeof from);
            word |= unsigned(from[lane / 4]) << 16 * j;
        }
        b[i] = word;
    }
}
