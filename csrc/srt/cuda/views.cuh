// The views as the kernels of ensemble read them: sorted by dx on the device, wherever their
// offsets and weights lie.
#pragma once
#include "common.cuh"

namespace srt::cuda {

struct View {
  double dy, dx;  // pixels; NaN for a view that covers nothing
  double weight;  // at most 1
  int64_t index;  // in tokens
};

struct RawViews {
  DeviceNumbers offsets,
      weights;  // [V, 2] and [V]; null: in the parameters, weights behind offsets
  int64_t views;
  bool weighted;
  bool stream = false;  // weights count against those of other chunks, and have limits

  __device__ View operator()(const InlineNumbers& numbers, int64_t v) const {
    View view{};
    view.index = v;
    view.dy = offsets.data ? offsets[2 * v] : numbers.at[2 * v];
    view.dx = offsets.data ? offsets[2 * v + 1] : numbers.at[2 * v + 1];
    view.weight = 1;
    if (weighted) {
      const int64_t at = offsets.data ? v : 2 * views + v;
      view.weight = weights.data ? weights[v] : numbers.at[at];
      if (stream && !(view.weight >= 0x1p-500 && view.weight <= 0x1p500)) view.weight = 0;
    }
    return view;
  }
};

// The rules that the host enforces with errors. Only ratios of weights matter: they become at
// most 1.
__device__ inline View counted_view(View view, double largest) {
  view.weight /= largest;
  const double limit = static_cast<double>(kMaxOffset);
  if (!(fabs(view.dy) <= limit && fabs(view.dx) <= limit && view.weight >= 0x1p-80 &&
        view.weight <= 1)) {
    view.weight = 0;
    view.dy = view.dx = nan("");
  }
  return view;
}

// Sorts by counting, for each view, those before it. Views that cover nothing come last. Tells the
// largest weight, if there is a place for it. Clears the breaks of both axes, which are found next.
static __global__ void __launch_bounds__(kThreads)
    sort_views(const __grid_constant__ RawViews raw, const __grid_constant__ InlineNumbers numbers,
               View* sorted, double* scale, uint8_t* breaks, int64_t cells) {
  SRT_FOR_THREAD(cell, cells) breaks[cell] = 0;
  SRT_FOR_THREAD(v, raw.views) {
    double largest = 0;
    for (int64_t u = 0; u < raw.views; ++u) {
      const double weight = raw(numbers, u).weight;
      if (weight > largest && isfinite(weight)) largest = weight;
    }
    if (scale && v == 0) *scale = largest;
    const View own = counted_view(raw(numbers, v), largest);
    int64_t rank = 0;
    for (int64_t u = 0; u < raw.views; ++u) {
      const double dx = counted_view(raw(numbers, u), largest).dx;
      const bool tie = u < v && (dx == own.dx || (isnan(dx) && isnan(own.dx)));
      if (dx < own.dx || tie || (isnan(own.dx) && !isnan(dx))) ++rank;
    }
    sorted[rank] = own;
  }
}

// Takes what is too much for `numbers` from the workspace and uploads it; without one it only
// counts.
inline RawViews raw_views(const char* op, const ViewNumbers& offsets, const ViewNumbers& weights,
                          int64_t views, Workspace& workspace, InlineNumbers& numbers,
                          CUstream_st* stream) {
  const bool weighted = weights.host || weights.device;
  const bool fits = (weighted ? 3 : 2) * views <= kInlineNumbers;
  double* uploaded_offsets = offsets.host && !fits ? workspace.take<double>(2 * views) : nullptr;
  double* uploaded_weights = weights.host && !fits ? workspace.take<double>(views) : nullptr;
  RawViews raw{device_numbers(offsets), device_numbers(weights), views, weighted};
  numbers = {};
  if (uploaded_offsets) {
    raw.offsets = upload(op, offsets.host, 2 * views, uploaded_offsets, stream);
  } else if (offsets.host && fits) {
    std::copy_n(offsets.host, 2 * views, numbers.at);
  }
  if (uploaded_weights) {
    raw.weights = upload(op, weights.host, views, uploaded_weights, stream);
  } else if (weights.host && fits) {
    std::copy_n(weights.host, views, numbers.at + (offsets.host ? 2 * views : 0));
  }
  return raw;
}

// Elements of all tokens, and of a field.
inline int64_t token_elements(const EnsembleArgs& args) {
  return args.views * args.batch * args.grid[0] * args.grid[1] * args.channels;
}
inline int64_t field_elements(const EnsembleArgs& args) {
  const int64_t rows = args.grid[0] * args.patch[0] / args.stride[0];
  return args.batch * args.channels * rows * (args.grid[1] * args.patch[1] / args.stride[1]);
}

// per_view.cu. With no workspace: tells how large it must be. `for_gradient`: `out` gets what the
// gradient asks of every cell and channel. Of a median, as a uint16_t, the first of the sorted
// views that has its value, or kNoView; the mean as it was summed, in float or double.
constexpr uint16_t kNoView = 0xffff;
int64_t reduce_values(const char* op, const EnsembleArgs& args, const ViewNumbers& offsets,
                      const ViewNumbers& weights, void* workspace, CUstream_st* stream,
                      bool for_gradient = false);

}  // namespace srt::cuda
