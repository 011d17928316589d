#include "../shift.h"

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "scratch.h"

namespace srt {

void shift_cpu(const ShiftArgs& args, const Parallel& parallel) {
  if (args.planes == 0 || args.height == 0 || args.width == 0) return;
  // Up to four taps read three positions past the last pixel of an axis.
  const int64_t line_y = args.height + 3, line_x = args.width + 3;
  std::vector<cpu::ShiftPlan::View> views;
  std::vector<int64_t> source_y, source_x;
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
  const cpu::ShiftPlan plan{args.image,   args.planes,     args.height,     args.width,
                            views.data(), source_y.data(), source_x.data(), args.out};

  const cpu::Kernels& kernels = cpu::kernels();
  const cpu::Kernel<cpu::ShiftPlan> by_dtype[] = {kernels.shift_f32, kernels.shift_f16,
                                                  kernels.shift_bf16, kernels.shift_f64,
                                                  kernels.shift_u8};
  const int64_t tasks = args.views * args.planes * args.height;
  const int64_t workers = tasks * args.width < (1 << 16) ? 1 : parallel.threads;
  const int64_t line_bytes = (line_x + 64) * static_cast<int64_t>(sizeof(double));
  cpu::run_tasks(plan, by_dtype[static_cast<int>(args.dtype)], tasks, workers, line_bytes,
                 parallel);
}

}  // namespace srt
