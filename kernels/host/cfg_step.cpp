// Host loop and binding of cfg_step.
#include "cfg_step.cuh"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstddef>
#include <optional>
#include <tuple>
#include <vector>

namespace nb = nanobind;

namespace gd {
namespace {

using Array = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using ConstArray = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;

struct StepArrays {
    const float *output, *latents, *noise;     // noise may be null
    float *history, *out_latents, *out_input;  // history may be null
    std::size_t count;                         // elements of the latents
    bool guided, doubled;                      // 2B rows of model output, 2B rows of next input
};

// Works through blocks small enough for the first-level cache: every inner loop vectorises, whatever the number
// of past terms, and each array still crosses the memory bus once.
constexpr std::size_t kBlock = 512;

GD_CLONES void run_step(const StepArrays& arrays, const StepCoefficients& step) {
    float m[kBlock], x[kBlock];
    for (std::size_t start = 0; start < arrays.count; start += kBlock) {
        const std::size_t size = std::min(kBlock, arrays.count - start);
        const float* latents = arrays.latents + start;
        const float* uncond = arrays.output + start;
        const float* cond = uncond + arrays.count;
        if (arrays.guided) {
            for (std::size_t i = 0; i < size; ++i) m[i] = guided(uncond[i], cond[i], step.guidance);
        } else {
            for (std::size_t i = 0; i < size; ++i) m[i] = uncond[i];
        }
        for (std::size_t i = 0; i < size; ++i) m[i] = combine(step.cx, latents[i], step.co, m[i]);
        for (std::size_t i = 0; i < size; ++i) x[i] = combine(step.a, latents[i], step.b0, m[i]);
        for (int k = 0; k < step.terms; ++k) {
            const float* past = arrays.history + step.slot[k] * arrays.count + start;
            const float weight = step.weight[k];
            for (std::size_t i = 0; i < size; ++i) x[i] += weight * past[i];
        }
        if (arrays.noise) {
            const float* noise = arrays.noise + start;
            for (std::size_t i = 0; i < size; ++i) x[i] += step.n * noise[i];
        }
        // After the past was read: the slot to write may hold the oldest value.
        if (arrays.history) std::copy_n(m, size, arrays.history + step.head * arrays.count + start);
        std::copy_n(x, size, arrays.out_latents + start);
        for (std::size_t i = 0; i < size; ++i) x[i] *= step.next_scale;
        std::copy_n(x, size, arrays.out_input + start);
        if (arrays.doubled) std::copy_n(x, size, arrays.out_input + arrays.count + start);
    }
}

void cfg_step(ConstArray output, ConstArray latents, std::optional<Array> history, std::optional<ConstArray> noise,
              Array out_latents, Array out_input, float guidance,
              std::tuple<float, float, float, float, float, float> coefficients, std::vector<float> weights,
              std::vector<int> slots, int head) {
    if (weights.size() > kMaxTerms || weights.size() != slots.size()) {
        throw nb::value_error("b reaches too many steps back; at most 8 past terms are supported");
    }
    StepCoefficients step{};
    std::tie(step.cx, step.co, step.a, step.b0, step.n, step.next_scale) = coefficients;
    step.guidance = guidance;
    step.head = head;
    step.terms = static_cast<int>(weights.size());
    std::copy(weights.begin(), weights.end(), step.weight);
    std::copy(slots.begin(), slots.end(), step.slot);
    const std::size_t count = latents.size();
    const StepArrays arrays{output.data(),
                            latents.data(),
                            noise ? noise->data() : nullptr,
                            history ? history->data() : nullptr,
                            out_latents.data(),
                            out_input.data(),
                            count,
                            output.size() != count,
                            out_input.size() != count};
    nb::gil_scoped_release unlocked;
    run_step(arrays, step);
}

}  // namespace

void bind_cfg_step(nb::module_& m) {
    m.def("cfg_step", &cfg_step, nb::arg("output"), nb::arg("latents"), nb::arg("history").none(),
          nb::arg("noise").none(), nb::arg("out_latents"), nb::arg("out_input"), nb::arg("guidance"),
          nb::arg("coefficients"), nb::arg("weights"), nb::arg("slots"), nb::arg("head"),
          "One sampler step; arguments are checked by grounded_diffusion.kernels.cfg_step.");
}

}  // namespace gd
