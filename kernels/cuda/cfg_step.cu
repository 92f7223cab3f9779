// CUDA launcher of cfg_step: one thread per four elements, every array read or written once.
#include "cfg_step.cuh"
#include "half.cuh"

namespace gd {

constexpr int kVector = 4;

// T is the storage of the network's side (model output and next input). Latents, history and noise stay float:
// rounding them to FP16 at every step would add up over a trajectory, and they are a fifth of the traffic.
template <typename T>
__device__ __forceinline__ void step_element(const StepCoefficients& step, const T* output, const float* latents,
                                             float* history, const float* noise, float* out_latents, T* out_input,
                                             unsigned char* bad, int batch, long long i, long long count, bool guide) {
    const float x = latents[i];
    float o = load(output[i]);
    if (guide) o = guided(o, load(output[count + i]), step.guidance);
    const float m = combine(step.cx, x, step.co, o);
    float next = combine(step.a, x, step.b0, m);
    for (int k = 0; k < step.terms; ++k) next += step.weight[k] * history[step.slot[k] * count + i];
    if (step.n != 0.0f) next += step.n * noise[i];
    // After the past was read: the slot to write may hold the oldest value.
    if (step.head >= 0) history[step.head * count + i] = m;
    out_latents[i] = next;
    if (bad && !is_finite(next)) bad[step.row * batch + i / (count / batch)] = 1;
    store(out_input[i], next * step.next_scale);
}

template <typename T>
__device__ __forceinline__ void step_range(const StepCoefficients* __restrict__ coefficients, const T* output,
                                           const float* latents, float* history, const float* noise, float* out_latents,
                                           T* out_input, unsigned char* bad, int batch, long long count, int guide) {
    const StepCoefficients& step = *coefficients;  // indexed in place: a copy would go to local memory
    const long long thread = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    const long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
    // Neighbouring threads touch neighbouring elements; four in flight per thread hide the latency.
    for (long long base = thread; base < count; base += stride * kVector) {
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
            const long long i = base + v * stride;
            if (i < count) {
                step_element(step, output, latents, history, noise, out_latents, out_input, bad, batch, i, count,
                             guide != 0);
            }
        }
    }
}

}  // namespace gd

extern "C" __global__ void cfg_step_f32(const gd::StepCoefficients* coefficients, const float* output,
                                        const float* latents, float* history, const float* noise, float* out_latents,
                                        float* out_input, unsigned char* bad, int batch, long long count, int guide) {
    gd::step_range(coefficients, output, latents, history, noise, out_latents, out_input, bad, batch, count, guide);
}

extern "C" __global__ void cfg_step_f16(const gd::StepCoefficients* coefficients, const gd::Half* output,
                                        const float* latents, float* history, const float* noise, float* out_latents,
                                        gd::Half* out_input, unsigned char* bad, int batch, long long count,
                                        int guide) {
    gd::step_range(coefficients, output, latents, history, noise, out_latents, out_input, bad, batch, count, guide);
}
