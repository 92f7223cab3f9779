// FP16 storage without cuda_fp16.h, which NVRTC would need a toolkit for. Arithmetic is always float.
#pragma once
#include "common.cuh"

namespace gd {

struct Half {
    unsigned short bits;
};

#ifdef __CUDACC__
__device__ __forceinline__ float load(const Half& h) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h.bits));
    return x;
}

__device__ __forceinline__ void store(Half& h, float x) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(x));
}

__device__ __forceinline__ float load(const float& x) {
    return x;
}
__device__ __forceinline__ void store(float& to, float x) {
    to = x;
}
#endif

}  // namespace gd
