// The gradients of windows on the CPU: builds the plans and distributes tasks over threads.
// windows_backward-inl.h has the inner loops.
#include <algorithm>

#include "../windows.h"
#include "dispatch.h"
#include "windows_plan.h"

namespace srt {

void windows_backward_image_cpu(const WindowsArgs& args, void* grad_image,
                                const Parallel& parallel) {
  using namespace cpu;
  if (args.batch == 0 || args.channels == 0) return;
  with_memory([&] {
    WindowsBackwardPlan plan{};
    Layout layout = lay_out(args, plan);
    plan.grad_image = grad_image;
    plan.pitch = (args.width + 2 * kBehind) / kBehind * kBehind;
    // The sums of a task fit the cache; at most 32 rows, so that there are enough bands for all
    // threads.
    plan.chunk = std::min<int64_t>(args.channels, 16);
    const int64_t row_bytes = plan.chunk * plan.pitch * static_cast<int64_t>(sizeof(double));
    plan.band = std::clamp<int64_t>(sums_bytes / row_bytes, 1, std::min<int64_t>(args.height, 32));
    plan.chunks = div_up(args.channels, plan.chunk);
    plan.bands = div_up(args.height, plan.band);
    layout.place(plan.sums, plan.chunk * plan.band * plan.pitch);
    const Kernel<WindowsBackwardPlan> kernel = dispatch_floating(args.dtype, [](auto element) {
      return kernels().of<decltype(element)>().windows_backward;
    });
    const double pixels = static_cast<double>(args.batch) * static_cast<double>(args.channels) *
                          static_cast<double>(args.height) * static_cast<double>(args.width);
    run_tasks(plan, kernel, args.batch * plan.chunks * plan.bands,
              workers_for(window_work(args) + pixels, parallel), layout.bytes, parallel);
  });
}

void windows_backward_points_cpu(const WindowsArgs& args, double* grad_centers, double* grad_scale,
                                 const Parallel& parallel) {
  using namespace cpu;
  const int64_t tasks = args.batch * args.count;
  if (tasks == 0) return;
  with_memory([&] {
    WindowsPointsPlan plan{};
    const Layout layout = lay_out(args, plan);
    plan.grad_centers = grad_centers;
    plan.grad_scale = grad_scale;
    const Kernel<WindowsPointsPlan> kernel = dispatch_floating(
        args.dtype, [](auto element) { return kernels().of<decltype(element)>().windows_points; });
    run_tasks(plan, kernel, tasks, workers_for(2 * window_work(args), parallel), layout.bytes,
              parallel);
  });
}

}  // namespace srt
