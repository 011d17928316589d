#include "../shift.h"

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "workspace.h"

namespace srt {
namespace {

// Up to four taps read three positions past the last pixel of an axis.
constexpr int64_t kPast = 3;

// Owns what a ShiftPlan points to.
struct ShiftViews {
  std::vector<cpu::ShiftPlan::View> views;
  std::vector<int64_t> source_y, source_x;

  explicit ShiftViews(const ShiftArgs& args) {
    const int64_t line_y = args.height + kPast, line_x = args.width + kPast;
    source_y.reserve(static_cast<size_t>(args.views * line_y));
    source_x.reserve(static_cast<size_t>(args.views * line_x));
    for (int64_t v = 0; v < args.views; ++v) {
      cpu::ShiftPlan::View view{};
      view.y = shift_taps(args.offsets[2 * v], args.interpolation);
      view.x = shift_taps(args.offsets[2 * v + 1], args.interpolation);
      const int64_t positions = args.width + view.x.taps - 1;
      view.inner_begin = std::clamp<int64_t>(-view.x.first, 0, positions);
      view.inner_end = std::clamp<int64_t>(args.width - view.x.first, view.inner_begin, positions);
      for (int64_t m = 0; m < line_y; ++m)
        source_y.push_back(pad_index(view.y.first + m, args.height, args.padding));
      for (int64_t m = 0; m < line_x; ++m)
        source_x.push_back(pad_index(view.x.first + m, args.width, args.padding));
      views.push_back(view);
    }
  }

  cpu::ShiftPlan plan(const ShiftArgs& args) const {
    return {args.image,   args.planes,     args.height,     args.width,
            views.data(), source_y.data(), source_x.data(), args.out};
  }
};

int64_t workers_for(int64_t rows, const ShiftArgs& args, const Parallel& parallel) {
  return rows * args.width < (1 << 16) ? 1 : parallel.threads;
}

}  // namespace

void shift_cpu(const ShiftArgs& args, const Parallel& parallel) {
  if (args.planes == 0 || args.height == 0 || args.width == 0) return;
  const ShiftViews views(args);
  const cpu::Kernels& kernels = cpu::kernels();
  const cpu::Kernel<cpu::ShiftPlan> by_dtype[] = {kernels.shift_f32, kernels.shift_f16,
                                                  kernels.shift_bf16, kernels.shift_f64,
                                                  kernels.shift_u8};
  const int64_t tasks = args.views * args.planes * args.height;
  const int64_t line_bytes = (args.width + kPast + 64) * static_cast<int64_t>(sizeof(double));
  cpu::run_tasks(views.plan(args), by_dtype[static_cast<int>(args.dtype)], tasks,
                 workers_for(tasks, args, parallel), line_bytes, parallel);
}

void shift_backward_cpu(const ShiftArgs& args, void* grad_image, const Parallel& parallel) {
  if (args.planes == 0 || args.height == 0 || args.width == 0) return;
  const ShiftViews views(args);
  cpu::ShiftBackwardPlan plan{};
  static_cast<cpu::ShiftPlan&>(plan) = views.plan(args);
  plan.view_count = args.views;
  plan.grad_image = grad_image;

  // For each image row of each view, the gradient rows that it went to: counted, then listed.
  std::vector<int64_t> begin(static_cast<size_t>(args.views * args.height) + 1);
  std::vector<cpu::ShiftBackwardPlan::Read> reads;
  const auto for_reads = [&](auto&& read) {
    for (int64_t v = 0; v < args.views; ++v) {
      const ShiftTaps& taps = views.views[static_cast<size_t>(v)].y;
      for (int64_t y = 0; y < args.height; ++y) {
        for (int32_t k = 0; k < taps.taps; ++k) {
          const int64_t source =
              views.source_y[static_cast<size_t>(v * (args.height + kPast) + y + k)];
          if (source >= 0)
            read(static_cast<size_t>(v * args.height + source),
                 cpu::ShiftBackwardPlan::Read{y, taps.weight[k]});
        }
      }
    }
  };
  for_reads([&](size_t row, const auto&) { ++begin[row + 1]; });
  for (size_t row = 1; row < begin.size(); ++row) begin[row] += begin[row - 1];
  reads.resize(static_cast<size_t>(begin.back()));
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  for_reads([&](size_t row, const auto& read) { reads[static_cast<size_t>(next[row]++)] = read; });
  plan.read_begin = begin.data();
  plan.reads = reads.data();

  const cpu::Kernels& kernels = cpu::kernels();
  const cpu::Kernel<cpu::ShiftBackwardPlan> by_dtype[] = {
      kernels.shift_backward_f32, kernels.shift_backward_f16, kernels.shift_backward_bf16,
      kernels.shift_backward_f64};
  const int64_t tasks = args.planes * args.height;
  const int64_t bytes = 3 * (args.width + 128) * static_cast<int64_t>(sizeof(double));
  cpu::run_tasks(plan, by_dtype[static_cast<int>(args.dtype)], tasks,
                 workers_for(args.views * tasks, args, parallel), bytes, parallel);
}

}  // namespace srt
