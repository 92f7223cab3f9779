// Bilinear upsampling of mask logits, align_corners=False, as torch.nn.functional.interpolate.
#pragma once
#include "common.cuh"

#ifndef __CUDACC__
#include <cmath>
#endif

namespace gd {

// Two neighbouring cells of the source and the weight of the second.
struct Tap {
    int first, second;
    float weight;
};

// Source of output pixel `at`: max(0, (at + 1/2) in / out - 1/2). Kept as a fraction over 2 out, so the cell is
// exact and the weight is rounded once, at any size up to 2^14 pixels a side (int arithmetic).
GD_INLINE Tap tap(int at, int in, int out) {
    int position = (2 * at + 1) * in - out;
    position = position > 0 ? position : 0;
    const int first = position / (2 * out);
    const int last = in - 1;
    Tap t;
    t.first = first < last ? first : last;
    t.second = first + 1 < last ? first + 1 : last;
    t.weight = static_cast<float>(position - first * 2 * out) / static_cast<float>(2 * out);
    return t;
}

GD_INLINE float lerp(float first, float second, float weight) {
    return (1.0f - weight) * first + weight * second;
}

GD_INLINE float sigmoid(float x) {
#ifdef __CUDACC__
    return 1.0f / (1.0f + expf(-x));
#else
    return 1.0f / (1.0f + std::exp(-x));
#endif
}

}  // namespace gd
