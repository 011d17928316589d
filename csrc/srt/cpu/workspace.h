// Memory of the workers of one call, and the split of its tasks between them.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "../types.h"
#include "dispatch.h"

namespace srt::cpu {

constexpr int64_t kAlign = 64;
inline int64_t align_up(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// Splits `tasks` evenly over at most `workers` workers with `scratch_bytes` each. All memory is
// taken here, before the parallel region: a body that runs in it must not throw.
template <class Plan>
void run_tasks(const Plan& plan, Kernel<Plan> kernel, int64_t tasks, int64_t workers,
               int64_t scratch_bytes, const Parallel& parallel) {
  struct Call {
    const Plan& plan;
    Kernel<Plan> kernel;
    int64_t tasks, workers, scratch_bytes;
    std::unique_ptr<char, decltype(&std::free)> scratch;
  };
  workers = std::max<int64_t>(1, std::min({workers, tasks, parallel.threads}));
  scratch_bytes = align_up(scratch_bytes);
  Call call{plan, kernel, tasks, workers, scratch_bytes, {nullptr, &std::free}};
  call.scratch.reset(
      static_cast<char*>(std::aligned_alloc(kAlign, static_cast<size_t>(workers * scratch_bytes))));
  if (!call.scratch) throw std::bad_alloc();

  const auto body = [](int64_t begin, int64_t end, void* context) {
    const Call& c = *static_cast<const Call*>(context);
    for (int64_t w = begin; w < end; ++w)
      c.kernel(c.plan, c.tasks * w / c.workers, c.tasks * (w + 1) / c.workers,
               c.scratch.get() + w * c.scratch_bytes);
  };
  if (workers == 1) {
    body(0, 1, &call);
  } else {
    parallel.run(workers, body, &call);
  }
}

}  // namespace srt::cpu
