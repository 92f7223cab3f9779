// [-1, 1] to a byte, as diffusers' VaeImageProcessor: denormalize, then numpy's round (halves to even).
#pragma once
#include "common.cuh"

namespace gd {

GD_INLINE unsigned char to_byte(float x) {
    float v = x * 0.5f + 0.5f;
    v = v > 0.0f ? v : 0.0f;  // a NaN fails the comparison and becomes 0
    v = v < 1.0f ? v : 1.0f;
    // Adding 2^23 leaves no fraction bits, so the addition itself rounds, halves to even, and vectorises.
    const float rounded = (v * 255.0f + 8388608.0f) - 8388608.0f;
    return static_cast<unsigned char>(static_cast<int>(rounded));
}

}  // namespace gd
