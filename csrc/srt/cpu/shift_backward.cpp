// The gradient of shift on the CPU: lists, for each row of the image, the gradient rows that read
// it, builds the plan and distributes tasks over threads. shift_backward-inl.h has the inner loop.
#include <vector>

#include "../shift.h"
#include "dispatch.h"
#include "shift_views.h"
#include "workspace.h"

namespace srt {
namespace {

using Read = cpu::ShiftBackwardPlan::Read;

// For each image row of each view, the gradient rows that read it.
struct RowReads {
  std::vector<int64_t> begin;  // [V * height + 1], into reads
  std::vector<Read> reads;

  RowReads(const ShiftArgs& args, const cpu::ShiftViews& views)
      : begin(static_cast<size_t>(args.views * args.height) + 1) {
    visit(args, views, [&](size_t row, const Read&) { ++begin[row + 1]; });
    for (size_t row = 1; row < begin.size(); ++row) begin[row] += begin[row - 1];
    reads.resize(static_cast<size_t>(begin.back()));
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    visit(args, views,
          [&](size_t row, const Read& read) { reads[static_cast<size_t>(next[row]++)] = read; });
  }

 private:
  template <class Visit>
  static void visit(const ShiftArgs& args, const cpu::ShiftViews& views, Visit&& visit) {
    for (int64_t v = 0; v < args.views; ++v) {
      const ShiftTaps& taps = views.taps[static_cast<size_t>(v)].y;
      const int64_t* const source = views.source_y.data() + v * (args.height + cpu::kPast);
      for (int64_t y = 0; y < args.height; ++y)
        for (int32_t k = 0; k < taps.taps; ++k)
          if (source[y + k] >= 0)
            visit(static_cast<size_t>(v * args.height + source[y + k]), Read{y, taps.weight[k]});
    }
  }
};

}  // namespace

void shift_backward_cpu(const ShiftArgs& args, void* grad_image, const Parallel& parallel) {
  using namespace cpu;
  if (args.planes == 0 || args.height == 0 || args.width == 0) return;
  with_memory([&] {
    const ShiftViews views(args);
    const RowReads rows(args, views);
    ShiftBackwardPlan plan{};
    static_cast<ShiftPlan&>(plan) = views.plan(args);
    plan.read_begin = rows.begin.data();
    plan.reads = rows.reads.data();
    plan.grad_image = grad_image;
    const Kernel<ShiftBackwardPlan> kernel = dispatch_floating(
        args.dtype, [](auto element) { return kernels().of<decltype(element)>().shift_backward; });
    const int64_t tasks = args.planes * args.height;
    const int64_t bytes = 3 * (args.width + 128) * static_cast<int64_t>(sizeof(double));
    run_tasks(plan, kernel, tasks, shift_workers(args.views * tasks, args, parallel), bytes,
              parallel);
  });
}

}  // namespace srt
