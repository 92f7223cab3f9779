// Bilinear upsampling of mask logits, align_corners=False, as torch.nn.functional.interpolate.
#pragma once
#include "common.cuh"

#ifndef __CUDACC__
#include <cstring>
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

GD_INLINE float from_bits(int bits) {
#ifdef __CUDACC__
    union {
        int i;
        float f;
    } both{bits};
    return both.f;
#else
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
#endif
}

// exp(x) for |x| <= 87 to 2 units in the last place, without branches or calls so that the host loop vectorises.
// Range reduction by ln 2 in two parts and the polynomial of Cephes' expf (S. L. Moshier).
GD_INLINE float exponential(float x) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const float k = (x * 1.44269504f + magic) - magic;
    const float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * r * r + r + 1.0f) * from_bits((static_cast<int>(k) + 127) << 23);
}

GD_INLINE float sigmoid(float x) {
    x = x > -87.0f ? x : -87.0f;
    x = x < 87.0f ? x : 87.0f;
    return 1.0f / (1.0f + exponential(-x));
}

}  // namespace gd
