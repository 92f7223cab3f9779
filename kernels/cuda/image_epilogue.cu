// CUDA launcher of image_epilogue: one thread per pixel; planes are read coalesced, bytes leave channels last.
#include "half.cuh"
#include "image_epilogue.cuh"

namespace gd {

template <typename T>
__device__ __forceinline__ void convert_pixels(const T* image, unsigned char* out, unsigned char* bad, int batch,
                                               long long pixels) {
    const long long count = batch * pixels;
    const long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
    for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
        const long long b = i / pixels;
        const T* from = image + 3 * b * pixels + (i - b * pixels);
        unsigned char* to = out + 3 * i;
#pragma unroll
        for (int c = 0; c < 3; ++c) {
            const float value = load(from[c * pixels]);
            if (bad && !is_finite(value)) bad[b] = 1;
            to[c] = to_byte(value);
        }
    }
}

}  // namespace gd

extern "C" __global__ void image_epilogue_f32(const float* image, unsigned char* out, unsigned char* bad, int batch,
                                              long long pixels) {
    gd::convert_pixels(image, out, bad, batch, pixels);
}

extern "C" __global__ void image_epilogue_f16(const gd::Half* image, unsigned char* out, unsigned char* bad, int batch,
                                              long long pixels) {
    gd::convert_pixels(image, out, bad, batch, pixels);
}
