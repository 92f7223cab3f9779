// What every kernel core needs. Cores are inline functions compiled three times: by the host compiler for
// the loops in *.cpp, by NVRTC at first use, and by nvcc ahead of time. No headers: NVRTC brings none.
#pragma once

#ifdef __CUDACC__
#define GD_INLINE __host__ __device__ __forceinline__
#else
#define GD_INLINE inline
#endif

namespace gd {

GD_INLINE bool is_finite(float x) {
    return x - x == 0.0f;
}

}  // namespace gd

// The widest vector unit of the machine the wheel lands on, chosen when the extension loads.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#define GD_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define GD_CLONES
#endif
