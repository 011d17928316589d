// Shift on the CPU: builds the plan and distributes tasks over threads. A task is one row of one
// plane of a view. shift-inl.h has the inner loop.
#include "../shift.h"

#include "dispatch.h"
#include "shift_views.h"
#include "workspace.h"

namespace srt {

void shift_cpu(const ShiftArgs& args, const Parallel& parallel) {
  using namespace cpu;
  if (args.planes == 0 || args.height == 0 || args.width == 0) return;
  with_memory([&] {
    const ShiftViews views(args);
    const Kernel<ShiftPlan> kernel = dispatch_dtype(
        args.dtype, [](auto element) { return kernels().of<decltype(element)>().shift; });
    const int64_t tasks = args.views * args.planes * args.height;
    const int64_t line_bytes = (args.width + kPast + 64) * static_cast<int64_t>(sizeof(double));
    run_tasks(views.plan(args), kernel, tasks, shift_workers(tasks, args, parallel), line_bytes,
              parallel);
  });
}

}  // namespace srt
