// Host loop and binding of mask_epilogue.
#include "mask_epilogue.cuh"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace nb = nanobind;

namespace gd {
namespace {

using Logits = nb::ndarray<const float, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using Valid = nb::ndarray<const bool, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <typename T, std::size_t N>
using Out = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;

constexpr int kLanes = 16, kBlock = 64;

// What one object's rows add up to.
struct Stats {
    std::int64_t area = 0;
    int left = std::numeric_limits<int>::max(), right = -1, top = -1, bottom = -1;
    double probability = 0.0;
};

// Column taps split by field, so that the loops over a row read straight arrays.
struct Columns {
    std::vector<int> first, second;
    std::vector<float> weight;

    Columns(int in, int out) : first(out), second(out), weight(out) {
        for (int x = 0; x < out; ++x) {
            const Tap t = tap(x, in, out);
            first[x] = t.first, second[x] = t.second, weight[x] = t.weight;
        }
    }
};

// One output row of one object: blend two source rows, then their columns.
GD_CLONES void upsample_row(const float* upper, const float* lower, float weight, int low_w, const Columns& columns,
                            int width, float* blended, float* row) {
    for (int x = 0; x < low_w; ++x) blended[x] = lerp(upper[x], lower[x], weight);
    const int *first = columns.first.data(), *second = columns.second.data();
    const float* along = columns.weight.data();
    for (int x = 0; x < width; ++x) row[x] = lerp(blended[first[x]], blended[second[x]], along[x]);
}

// Mask bytes of one row, and the label map where this object is the highest so far (the first keeps a tie).
GD_CLONES int threshold_row(const float* row, int width, float limit, std::uint8_t label, std::uint8_t* mask,
                            float* best, std::uint8_t* labels) {
    int area = 0;
    for (int x = 0; x < width; ++x) {
        const bool inside = row[x] > limit;
        mask[x] = inside;
        area += inside;
        const bool wins = inside & (row[x] > best[x]);
        best[x] = wins ? row[x] : best[x];
        labels[x] = wins ? label : labels[x];
    }
    return area;
}

// Sum of the probabilities inside the mask, whose pixels lie in [left, right]. Whole blocks of sigmoids, wanted or
// not, vectorise; separate lanes let the sum do so without reordering it.
GD_CLONES double probability_row(const float* row, const std::uint8_t* mask, int left, int right) {
    float inside[kBlock];
    float lanes[kLanes] = {};
    for (int start = left; start <= right; start += kBlock) {
        const int size = std::min(kBlock, right + 1 - start);
        for (int i = 0; i < size; ++i) inside[i] = sigmoid(row[start + i]);
        for (int i = 0; i < size; ++i) inside[i] = mask[start + i] ? inside[i] : 0.0f;
        std::fill(inside + size, inside + kBlock, 0.0f);
        for (int i = 0; i < kBlock; i += kLanes) {
            for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += inside[i + lane];
        }
    }
    double sum = 0.0;
    for (const float lane : lanes) sum += lane;
    return sum;
}

void add_row(Stats& stats, const float* row, const std::uint8_t* mask, int width, int y, int area) {
    int left = 0, right = width - 1;
    while (!mask[left]) ++left;
    while (!mask[right]) --right;
    stats.area += area;
    stats.left = std::min(stats.left, left);
    stats.right = std::max(stats.right, right);
    if (stats.top < 0) stats.top = y;
    stats.bottom = y;
    stats.probability += probability_row(row, mask, left, right);
}

void finish(const Stats& stats, std::int64_t* area, std::int32_t* box, float* score) {
    *area = stats.area;
    const bool empty = stats.area == 0;
    box[0] = empty ? 0 : stats.left;
    box[1] = empty ? 0 : stats.top;
    box[2] = empty ? 0 : stats.right - stats.left + 1;
    box[3] = empty ? 0 : stats.bottom - stats.top + 1;
    *score = empty ? 0.0f : static_cast<float>(stats.probability / static_cast<double>(stats.area));
}

struct MaskArrays {
    const float* logits;
    const bool* valid;
    std::uint8_t *labels, *masks;
    std::int64_t* area;
    std::int32_t* box;
    float* score;
    int batch, objects, low_h, low_w, height, width;
};

// One image; `scratch` holds a blended source row, an output row and the highest logit so far.
void run_image(const MaskArrays& a, int b, float limit, const Columns& columns, std::vector<float>& scratch) {
    float* blended = scratch.data();
    float* row = blended + a.low_w;
    float* best = row + a.width;
    std::vector<Stats> stats(a.objects);
    for (int y = 0; y < a.height; ++y) {
        const Tap t = tap(y, a.low_h, a.height);
        std::uint8_t* labels = a.labels + (static_cast<std::size_t>(b) * a.height + y) * a.width;
        std::memset(labels, 0, a.width);
        std::fill_n(best, a.width, -std::numeric_limits<float>::infinity());
        for (int o = 0; o < a.objects; ++o) {
            const std::size_t at = static_cast<std::size_t>(b) * a.objects + o;
            std::uint8_t* mask = a.masks + (at * a.height + y) * a.width;
            if (!a.valid[at]) {
                std::memset(mask, 0, a.width);
                continue;
            }
            const float* low = a.logits + at * a.low_h * a.low_w;
            upsample_row(low + t.first * a.low_w, low + t.second * a.low_w, t.weight, a.low_w, columns, a.width,
                         blended, row);
            const int area = threshold_row(row, a.width, limit, static_cast<std::uint8_t>(o + 1), mask, best, labels);
            if (area) add_row(stats[o], row, mask, a.width, y, area);
        }
    }
    for (int o = 0; o < a.objects; ++o) {
        const std::size_t at = static_cast<std::size_t>(b) * a.objects + o;
        finish(stats[o], a.area + at, a.box + 4 * at, a.score + at);
    }
}

void mask_epilogue(Logits logits, Valid valid, float limit, Out<std::uint8_t, 3> labels, Out<bool, 4> masks,
                   Out<std::int64_t, 2> area, Out<std::int32_t, 3> box, Out<float, 2> score) {
    const auto size = [](std::size_t n) { return static_cast<int>(n); };
    const MaskArrays arrays{logits.data(),         valid.data(),
                            labels.data(),         reinterpret_cast<std::uint8_t*>(masks.data()),
                            area.data(),           box.data(),
                            score.data(),          size(logits.shape(0)),
                            size(logits.shape(1)), size(logits.shape(2)),
                            size(logits.shape(3)), size(labels.shape(1)),
                            size(labels.shape(2))};
    nb::gil_scoped_release unlocked;
    const Columns columns(arrays.low_w, arrays.width);
    std::vector<float> scratch(arrays.low_w + 2 * static_cast<std::size_t>(arrays.width));
    for (int b = 0; b < arrays.batch; ++b) run_image(arrays, b, limit, columns, scratch);
}

}  // namespace

void bind_mask_epilogue(nb::module_& m) {
    m.def("mask_epilogue", &mask_epilogue, nb::arg("logits"), nb::arg("valid"), nb::arg("limit"), nb::arg("labels"),
          nb::arg("masks"), nb::arg("area"), nb::arg("box"), nb::arg("score"),
          "Masks, label map and statistics; checked by grounded_diffusion.kernels.mask_epilogue.");
}

}  // namespace gd
