// Host loop and binding of image_epilogue.
#include "image_epilogue.cuh"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace nb = nanobind;

namespace gd {
namespace {

using Bytes = nb::ndarray<std::uint8_t, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Image = nb::ndarray<const T, nb::ndim<4>, nb::c_contig, nb::device::cpu>;

inline float to_float(float x) {
    return x;
}

// IEEE half by its bits: shift the fields into place and rescale the exponent, which also renormalises subnormals.
inline float to_float(std::uint16_t half) {
    const std::uint32_t magnitude = static_cast<std::uint32_t>(half & 0x7fffu) << 13;
    float x;
    std::memcpy(&x, &magnitude, sizeof x);
    x *= 0x1p112f;
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    bits |= (half & 0x7fffu) >= 0x7c00u ? 0x7f800000u : 0u;  // infinity and NaN keep theirs
    bits |= static_cast<std::uint32_t>(half & 0x8000u) << 16;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

constexpr std::size_t kBlock = 1024;

// Planes to pixels. Bytes are made plane by plane in a block that stays in cache, then interleaved.
template <typename T>
inline void convert(const T* image, std::uint8_t* out, std::size_t batch, std::size_t pixels) {
    std::uint8_t plane[3][kBlock];
    for (std::size_t b = 0; b < batch; ++b, image += 3 * pixels, out += 3 * pixels) {
        for (std::size_t start = 0; start < pixels; start += kBlock) {
            const std::size_t size = pixels - start < kBlock ? pixels - start : kBlock;
            for (std::size_t c = 0; c < 3; ++c) {
                const T* from = image + c * pixels + start;
                for (std::size_t i = 0; i < size; ++i) plane[c][i] = to_byte(to_float(from[i]));
            }
            std::uint8_t* to = out + 3 * start;
            for (std::size_t i = 0; i < size; ++i) {
                to[3 * i] = plane[0][i];
                to[3 * i + 1] = plane[1][i];
                to[3 * i + 2] = plane[2][i];
            }
        }
    }
}

GD_CLONES void convert_f32(const float* image, std::uint8_t* out, std::size_t batch, std::size_t pixels) {
    convert(image, out, batch, pixels);
}

GD_CLONES void convert_f16(const std::uint16_t* image, std::uint8_t* out, std::size_t batch, std::size_t pixels) {
    convert(image, out, batch, pixels);
}

template <typename T, void (*run)(const T*, std::uint8_t*, std::size_t, std::size_t)>
void image_epilogue(Image<T> image, Bytes out) {
    nb::gil_scoped_release unlocked;
    run(image.data(), out.data(), image.shape(0), image.shape(2) * image.shape(3));
}

}  // namespace

void bind_image_epilogue(nb::module_& m) {
    m.def("image_epilogue_f32", &image_epilogue<float, convert_f32>, nb::arg("image"), nb::arg("out"),
          "float32 [B, 3, H, W] to bytes; arguments are checked by grounded_diffusion.kernels.image_epilogue.");
    m.def("image_epilogue_f16", &image_epilogue<std::uint16_t, convert_f16>, nb::arg("image"), nb::arg("out"),
          "float16 [B, 3, H, W], seen as uint16, to bytes; checked by grounded_diffusion.kernels.image_epilogue.");
}

}  // namespace gd
