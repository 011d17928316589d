// Windows on the CPU: builds the plan and distributes tasks over threads. A task is one window of
// an image. windows-inl.h has the inner loops.
#include "../windows.h"

#include "dispatch.h"
#include "windows_plan.h"

namespace srt {

void windows_cpu(const WindowsArgs& args, const Parallel& parallel) {
  using namespace cpu;
  const int64_t tasks = args.batch * args.count;
  if (tasks == 0 || args.channels == 0) return;
  with_memory([&] {
    WindowsPlan plan{};
    const Layout layout = lay_out(args, plan);
    const Kernel<WindowsPlan> kernel = dispatch_dtype(
        args.dtype, [](auto element) { return kernels().of<decltype(element)>().windows; });
    run_tasks(plan, kernel, tasks, workers_for(window_work(args), parallel), layout.bytes,
              parallel);
  });
}

}  // namespace srt
