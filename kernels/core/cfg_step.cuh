// One sampler step, per element; the formulas are those of cfg_step.py.
#pragma once
#include "common.cuh"

namespace gd {

constexpr int kMaxTerms = 8;  // PNDM, the longest solver supported, reaches 3 steps back

// Coefficients of one step. On a GPU it lies in device memory, so that a captured graph can be replayed with
// another row of the schedule; cuda.py mirrors the layout.
struct StepCoefficients {
    float guidance, cx, co, a, b0, n, next_scale;
    int head;   // slot of the history that receives m, or -1
    int terms;  // past values in use
    int row;    // of the schedule; says where a flag goes
    float weight[kMaxTerms];
    int slot[kMaxTerms];
};
static_assert(sizeof(StepCoefficients) == 104, "cuda.py mirrors this layout");

// o = u + g (c - u), Ho & Salimans 2022, Eq. 6
GD_INLINE float guided(float uncond, float cond, float scale) {
    return uncond + scale * (cond - uncond);
}

GD_INLINE float combine(float cx, float x, float co, float o) {
    return cx * x + co * o;
}

}  // namespace gd
