// CUDA launcher of mask_epilogue, three kernels in a row on one stream: begin, scan, finish.
// A warp is 32 neighbouring pixels of a row, so one ballot is one word of the packed mask and also its area and
// its extent. Sums are integers (the probability in 2^-32 steps), so the order of atomics cannot change them.
#include "half.cuh"
#include "mask_epilogue.cuh"

namespace gd {

constexpr int kRows = 8;  // rows of a block, one warp each
constexpr int kNone = 0x7fffffff;

struct Stats {
    unsigned long long probability;
    unsigned int area;
    int left, top, right, bottom;
    int unused;
};
static_assert(sizeof(Stats) == 32, "cuda.py allocates this much per object");

__device__ __forceinline__ unsigned long long to_fixed(float probability) {
    return static_cast<unsigned long long>(probability * 4294967296.0f);
}

__device__ __forceinline__ unsigned long long warp_sum(unsigned long long value) {
    for (int step = 16; step; step /= 2) value += __shfl_down_sync(0xffffffffu, value, step);
    return value;
}

template <typename T>
__device__ __forceinline__ float sample(const T* logits, const Tap& row, const Tap& column, int low_w) {
    const T* upper = logits + row.first * low_w;
    const T* lower = logits + row.second * low_w;
    return lerp(lerp(load(upper[column.first]), load(lower[column.first]), row.weight),
                lerp(load(upper[column.second]), load(lower[column.second]), row.weight), column.weight);
}

// Block (32, kRows), grid (ceil(W / 32), ceil(H / kRows), B). `masks` and `bits` may each be null.
template <typename T>
__device__ __forceinline__ void scan(const T* logits, const bool* valid, unsigned char* labels, unsigned char* masks,
                                     unsigned int* bits, Stats* stats, unsigned char* bad, int objects, int low_h,
                                     int low_w, int height, int width, float limit) {
    const int x = blockIdx.x * 32 + threadIdx.x;
    const int y = blockIdx.y * kRows + threadIdx.y;
    const int b = blockIdx.z;
    if (y >= height) return;  // the whole warp leaves together
    const bool within = x < width;
    const Tap row = tap(y, low_h, height);
    const Tap column = tap(within ? x : width - 1, low_w, width);
    float best = -__int_as_float(0x7f800000);
    unsigned char label = 0;
    for (int o = 0; o < objects; ++o) {
        const long long at = static_cast<long long>(b) * objects + o;
        float value = 0.0f;
        bool inside = false;
        if (valid[at]) {
            value = sample(logits + at * low_h * low_w, row, column, low_w);
            inside = within && value > limit;
            if (bad && !is_finite(value)) bad[b] = 1;
        }
        const unsigned int word = __ballot_sync(0xffffffffu, inside);
        if (inside && value > best) {
            best = value;
            label = static_cast<unsigned char>(o + 1);
        }
        if (masks && within) masks[(at * height + y) * width + x] = inside;
        if (bits && threadIdx.x == 0) bits[(at * height + y) * gridDim.x + blockIdx.x] = word;
        if (!word) continue;
        const unsigned long long probability = warp_sum(inside ? to_fixed(sigmoid(value)) : 0ull);
        if (threadIdx.x == 0) {
            const int first = blockIdx.x * 32;
            atomicAdd(&stats[at].probability, probability);
            atomicAdd(&stats[at].area, static_cast<unsigned int>(__popc(word)));
            atomicMin(&stats[at].left, first + __ffs(word) - 1);
            atomicMax(&stats[at].right, first + 31 - __clz(word));
            atomicMin(&stats[at].top, y);
            atomicMax(&stats[at].bottom, y);
        }
    }
    if (within) labels[(static_cast<long long>(b) * height + y) * width + x] = label;
}

}  // namespace gd

extern "C" __global__ void mask_begin(gd::Stats* stats, int count) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) stats[i] = gd::Stats{0ull, 0u, gd::kNone, gd::kNone, -1, -1, 0};
}

extern "C" __global__ void mask_scan_f32(const float* logits, const bool* valid, unsigned char* labels,
                                         unsigned char* masks, unsigned int* bits, gd::Stats* stats, unsigned char* bad,
                                         int objects, int low_h, int low_w, int height, int width, float limit) {
    gd::scan(logits, valid, labels, masks, bits, stats, bad, objects, low_h, low_w, height, width, limit);
}

extern "C" __global__ void mask_scan_f16(const gd::Half* logits, const bool* valid, unsigned char* labels,
                                         unsigned char* masks, unsigned int* bits, gd::Stats* stats, unsigned char* bad,
                                         int objects, int low_h, int low_w, int height, int width, float limit) {
    gd::scan(logits, valid, labels, masks, bits, stats, bad, objects, low_h, low_w, height, width, limit);
}

extern "C" __global__ void mask_finish(const gd::Stats* stats, long long* area, int* box, float* score, int count) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const gd::Stats s = stats[i];
    const bool empty = s.area == 0;
    area[i] = s.area;
    box[4 * i] = empty ? 0 : s.left;
    box[4 * i + 1] = empty ? 0 : s.top;
    box[4 * i + 2] = empty ? 0 : s.right - s.left + 1;
    box[4 * i + 3] = empty ? 0 : s.bottom - s.top + 1;
    score[i] = empty ? 0.0f : static_cast<float>(static_cast<double>(s.probability) * 0x1p-32 / s.area);
}
