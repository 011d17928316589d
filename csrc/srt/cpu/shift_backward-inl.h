// The inner loop of the gradient of shift: the gradient of the views [V, B*C, H, W] to the gradient
// of the images [B*C, H, W]. One task computes one image row. It gathers, from every view, the
// gradient rows that read it (a list that shift_backward.cpp builds), so threads never add to the
// same element. Positions inside the image are added as vectors; padded positions are added one by
// one to the pixel that they repeat. vector_blocks-inl.h has the rules for code in this file.
#pragma once
#include "plan.h"
#include "simd.h"

namespace srt::cpu {
namespace {

template <class T>
void shift_backward(const ShiftBackwardPlan& plan, int64_t begin, int64_t end, void* scratch) {
  using Acc = typename AccumulatorOf<T>::type;
  constexpr int lanes = kLanes<Acc>;
  constexpr int64_t pad = lanes < 4 ? 4 : lanes;  // four taps reach three pixels beyond
  const int64_t width = plan.width, line = width + 128;
  // `row`: the weighted sum of gradient rows, with zeros on both sides. `at_position`: the gradient
  // of each source position. `sum`: the sum over views for each pixel.
  Acc* const row = static_cast<Acc*>(scratch) + 64;
  Acc* const at_position = row - 64 + line;
  Acc* const sum = at_position + line;

  for (int64_t task = begin; task < end; ++task) {
    const int64_t y = task % plan.height, plane = task / plan.height;
    for (int64_t x = 0; x < width; x += lanes) store(sum + x, Vec<Acc>{});
    for (int64_t v = 0; v < plan.views; ++v) {
      const ShiftPlan::View& view = plan.taps[v];
      const int64_t first = plan.read_begin[v * plan.height + y];
      const int64_t last = plan.read_begin[v * plan.height + y + 1];
      if (first == last) continue;
      const T* const grad =
          static_cast<const T*>(plan.out) + (v * plan.planes + plane) * plan.height * width;
      for (int64_t x = -pad; x < width + pad; x += lanes) store(row + x, Vec<Acc>{});
      for (int64_t k = first; k < last; ++k) {
        const T* const from = grad + plan.reads[k].row * width;
        const Acc weight = static_cast<Acc>(plan.reads[k].weight);
        int64_t x = 0;
        for (; x + lanes <= width; x += lanes)
          store(row + x, load(row + x) + weight * load(from + x));
        if (x < width) store(row + x, load(row + x) + weight * load_part(from + x, 1, width - x));
      }
      // Output pixel x reads positions x + k, so position m gathers from pixels m - k.
      const int64_t positions = width + view.x.taps - 1;
      for (int64_t m = 0; m < positions; m += lanes) {
        Vec<Acc> value = {};
        for (int k = 0; k < view.x.taps; ++k)
          value += static_cast<Acc>(view.x.weight[k]) * load(row + m - k);
        store(at_position + m, value);
      }
      const int64_t* const source_x = plan.source_x + v * (width + 3);
      int64_t m = 0;
      for (; m < view.inner_begin; ++m)
        if (source_x[m] >= 0) sum[source_x[m]] += at_position[m];
      for (; m + lanes <= view.inner_end; m += lanes) {
        Acc* const inner = sum + (view.x.first + m);
        store(inner, load(inner) + load(at_position + m));
      }
      for (; m < positions; ++m)
        if (source_x[m] >= 0) sum[source_x[m]] += at_position[m];
    }
    T* const out = static_cast<T*>(plan.grad_image) + task * width;
    for (int64_t x = 0; x < width; x += lanes)
      store_part(out + x, 1, width - x < lanes ? width - x : lanes, load(sum + x));
  }
}

}  // namespace
}  // namespace srt::cpu
