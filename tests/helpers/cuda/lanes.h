// CUDA kernels on a CPU: a warp is 32 fibers of one thread, and a warp intrinsic is a place where all of them meet.
// Stricter than a GPU: lanes that meet at different intrinsics, or a mask that names other lanes than those that
// came, are errors. There is no __syncthreads, since no kernel uses it.
#pragma once
#include <ucontext.h>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace lanes {

constexpr int kWarp = 32;
constexpr std::size_t kStack = 64 << 10;

struct Dim {
    unsigned x, y, z;
};
enum class Place { kRunning, kBallot, kShuffleDown, kEnd };

// The compiler's own setjmp is a few instructions, where libc's calls the kernel or, under a sanitizer, sweeps the
// stack. No assumption about these functions may reach their callers, and no sanitizer may look at them.
using Point = void* [5];
#define GD_SWITCHES __attribute__((noipa, no_sanitize("address")))

struct Lane {
    Point at;
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(kStack);
    Place place = Place::kEnd;
    unsigned mask = 0;
    int delta = 0;
    std::uint64_t value = 0, result = 0;
};

inline Dim thread, block, block_size, grid_size;  // threadIdx and its like, of the lane that runs
inline bool reversed = false;                     // blocks run from the last to the first
inline std::vector<Lane> warp;
inline Lane* current = nullptr;
inline Point scheduler;
inline const std::function<void()>* kernel = nullptr;

[[noreturn]] GD_SWITCHES inline void jump(Point& to) {
    __builtin_longjmp(to, 1);
}

// Leave the running lane until all have come to `place`.
GD_SWITCHES inline void meet(Place place) {
    current->place = place;
    if (!__builtin_setjmp(current->at)) jump(scheduler);
}

inline void lane_main() {
    for (;;) {
        meet(Place::kEnd);
        (*kernel)();
    }
}

GD_SWITCHES inline void resume(Lane& lane) {
    current = &lane;
    lane.place = Place::kRunning;
    if (!__builtin_setjmp(scheduler)) jump(lane.at);
}

// A fiber that waits for its first work: makecontext gives the stack, and from then on it is left and resumed as above.
GD_SWITCHES inline void start(Lane& lane) {
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = lane.stack.data();
    lane.context.uc_stack.ss_size = kStack;
    makecontext(&lane.context, lane_main, 0);
    current = &lane;
    if (!__builtin_setjmp(scheduler)) setcontext(&lane.context);
}

// Give all that wait at one intrinsic what it returns.
inline void serve(int lanes) {
    const Lane* first = nullptr;
    unsigned present = 0, votes = 0;
    for (int l = 0; l < lanes; ++l) {
        if (warp[l].place == Place::kEnd) continue;
        first = first ? first : &warp[l];
        present |= 1u << l;
        if (warp[l].value) votes |= 1u << l;
    }
    for (int l = 0; l < lanes; ++l) {
        Lane& lane = warp[l];
        if (lane.place == Place::kEnd) continue;
        if (lane.place != first->place) throw std::runtime_error("lanes of a warp meet at different intrinsics");
        if (lane.mask != present) throw std::runtime_error("a mask names other lanes than those that came");
        lane.result = votes;
        if (lane.place == Place::kShuffleDown) {
            lane.result = l + lane.delta < lanes ? warp[l + lane.delta].value : lane.value;
        }
    }
}

inline void run_warp(unsigned first, int lanes) {
    for (int l = 0; l < lanes; ++l) warp[l].place = Place::kRunning;
    for (;;) {
        bool alive = false;
        for (int l = 0; l < lanes; ++l) {
            if (warp[l].place == Place::kEnd) continue;
            const unsigned t = first + l;
            thread = {t % block_size.x, t / block_size.x % block_size.y, t / block_size.x / block_size.y};
            resume(warp[l]);
            alive = alive || warp[l].place != Place::kEnd;
        }
        if (!alive) return;
        serve(lanes);
    }
}

inline void run(const std::function<void()>& work, Dim grid, Dim block_) {
    const unsigned threads = block_.x * block_.y * block_.z;
    if (!threads || threads > 1024 || !grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535) {
        throw std::runtime_error("no GPU takes a launch of this grid and block");
    }
    if (warp.empty()) {
        warp = std::vector<Lane>(kWarp);
        for (Lane& lane : warp) start(lane);
    }
    kernel = &work;
    grid_size = grid, block_size = block_;
    const std::uint64_t blocks = std::uint64_t{grid.x} * grid.y * grid.z;
    for (std::uint64_t k = 0; k < blocks; ++k) {
        const std::uint64_t b = reversed ? blocks - 1 - k : k;
        block = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
        for (unsigned first = 0; first < threads; first += kWarp) {
            run_warp(first, threads - first < kWarp ? int(threads - first) : kWarp);
        }
    }
}

using Bound = std::function<void()>;
using Bind = std::function<Bound(void**)>;

inline std::map<std::string, Bind>& kernels() {
    static std::map<std::string, Bind> all;
    return all;
}

template <class... A, std::size_t... I>
Bound with_arguments(void (*function)(A...), void** arguments, std::index_sequence<I...>) {
    std::tuple<A...> values{*static_cast<A*>(arguments[I])...};  // copied at the launch, as a driver does
    return [function, values] { std::apply(function, values); };
}

struct Register {
    template <class... A>
    Register(const char* name, void (*function)(A...)) {
        kernels()[name] = [function](void** arguments) {
            return with_arguments(function, arguments, std::index_sequence_for<A...>{});
        };
    }
};

inline unsigned ballot(unsigned mask, bool vote) {
    current->mask = mask, current->value = vote;
    meet(Place::kBallot);
    return unsigned(current->result);
}

inline unsigned long long shuffle_down(unsigned mask, unsigned long long value, int delta) {
    current->mask = mask, current->value = value, current->delta = delta;
    meet(Place::kShuffleDown);
    return current->result;
}

inline float from_half(unsigned short bits) {
    _Float16 half;
    std::memcpy(&half, &bits, sizeof half);
    return half;
}

inline unsigned short to_half(float value) {
    const _Float16 half = static_cast<_Float16>(value);
    unsigned short bits;
    std::memcpy(&bits, &half, sizeof bits);
    return bits;
}

}  // namespace lanes

#define __CUDACC__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define threadIdx ::lanes::thread
#define blockIdx ::lanes::block
#define blockDim ::lanes::block_size
#define gridDim ::lanes::grid_size
#define __ballot_sync ::lanes::ballot
#define __shfl_down_sync ::lanes::shuffle_down
#define __popc __builtin_popcount
#define __ffs __builtin_ffs
inline int __clz(int x) {
    return x ? __builtin_clz(x) : 32;
}
inline float __int_as_float(int bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
template <class T>
void atomicAdd(T* at, T value) {
    *at += value;
}
template <class T>
void atomicMin(T* at, T value) {
    if (value < *at) *at = value;
}
template <class T>
void atomicMax(T* at, T value) {
    if (value > *at) *at = value;
}
