// The inner loop of shift: images [B*C, H, W] to views [V, B*C, H, W]. One task computes one output
// row. Whole-pixel offsets are copied bit for bit. Otherwise the taps along y are summed first,
// into a line that includes the padding along x; then the taps along x run over the line as
// unaligned vector loads, without any index arithmetic. vector_blocks-inl.h has the rules for code
// in this file.
#pragma once
#include "plan.h"
#include "simd.h"

namespace srt::cpu {
namespace {

// A row of the image that an output row reads.
template <class Acc>
struct SourceRow {
  const void* pixels;
  Acc weight;
};

// Sums the vertical taps at one source column; -1 is a padded zero.
template <class T, class Acc>
Acc vertical_taps(const SourceRow<Acc>* rows, int row_count, int64_t column) {
  Acc sum = 0;
  if (column >= 0) {
    for (int r = 0; r < row_count; ++r)
      sum += rows[r].weight * load_part(static_cast<const T*>(rows[r].pixels) + column, 1, 1)[0];
  }
  return sum;
}

template <class T>
void shift(const ShiftPlan& plan, int64_t begin, int64_t end, void* scratch) {
  using Acc = typename AccumulatorOf<T>::type;
  constexpr int lanes = kLanes<Acc>;
  Acc* line = static_cast<Acc*>(scratch);
  const int64_t width = plan.width;

  for (int64_t task = begin; task < end; ++task) {
    const int64_t y = task % plan.height;
    const int64_t plane = task / plan.height % plan.planes;
    const int64_t v = task / plan.height / plan.planes;
    const ShiftPlan::View& view = plan.taps[v];
    const int64_t* source_y = plan.source_y + v * (plan.height + 3) + y;
    const int64_t* source_x = plan.source_x + v * (width + 3);
    const T* image = static_cast<const T*>(plan.image) + plane * plan.height * width;
    T* out = static_cast<T*>(plan.out) + task * width;

    // Whole pixels along both axes are copied bit for bit.
    if (view.y.taps == 1 && view.x.taps == 1) {
      if (source_y[0] < 0) {
        std::memset(static_cast<void*>(out), 0, static_cast<size_t>(width) * sizeof(T));
        continue;
      }
      const T* row = image + source_y[0] * width;
      const int64_t inner_end = view.inner_end < width ? view.inner_end : width;
      const int64_t inner_begin = view.inner_begin < inner_end ? view.inner_begin : inner_end;
      for (int64_t x = 0; x < inner_begin; ++x) out[x] = source_x[x] < 0 ? T{} : row[source_x[x]];
      if (inner_begin < inner_end)
        std::memcpy(static_cast<void*>(out + inner_begin), row + view.x.first + inner_begin,
                    static_cast<size_t>(inner_end - inner_begin) * sizeof(T));
      for (int64_t x = inner_end; x < width; ++x) out[x] = source_x[x] < 0 ? T{} : row[source_x[x]];
      continue;
    }

    // Sum the vertical taps into a line that includes the horizontal padding.
    SourceRow<Acc> rows[4];
    int row_count = 0;
    for (int k = 0; k < view.y.taps; ++k) {
      if (source_y[k] >= 0)
        rows[row_count++] = {image + source_y[k] * width, static_cast<Acc>(view.y.weight[k])};
    }
    const int64_t positions = width + view.x.taps - 1;
    int64_t m = 0;
    for (; m < view.inner_begin; ++m) line[m] = vertical_taps<T>(rows, row_count, source_x[m]);
    for (; m + lanes <= view.inner_end; m += lanes) {
      Vec<Acc> sum = {};
      for (int r = 0; r < row_count; ++r)
        sum += rows[r].weight * load(static_cast<const T*>(rows[r].pixels) + view.x.first + m);
      store(line + m, sum);
    }
    for (; m < positions; ++m) line[m] = vertical_taps<T>(rows, row_count, source_x[m]);

    Acc weight[4];
    for (int k = 0; k < view.x.taps; ++k) weight[k] = static_cast<Acc>(view.x.weight[k]);
    for (int64_t x = 0; x < width; x += lanes) {
      Vec<Acc> sum = {};
      for (int k = 0; k < view.x.taps; ++k) sum += weight[k] * load(line + x + k);
      if (x + lanes <= width) {
        store(out + x, sum);
      } else {
        store_part(out + x, 1, width - x, sum);
      }
    }
  }
}

}  // namespace
}  // namespace srt::cpu
