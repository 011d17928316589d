// Median and moments on the CPU, and their streams: selects the kernel, builds its plan and
// distributes its tasks over threads. per_view-inl.h has the inner loops.
#include <algorithm>
#include <vector>

#include "../ensemble.h"
#include "../running_median.h"
#include "dispatch.h"
#include "ensemble_views.h"

namespace srt::cpu {
namespace {

template <class T>
auto choose_kernel(const EnsembleArgs& args) {
  const KernelsOf<T>& own = kernels().of<T>();
  if (args.reduce == Reduce::median) return args.total_weight ? own.stream_median : own.median;
  return args.total_weight ? own.stream_moments : own.moments;
}

template <class Acc>
int64_t place_scratch(int64_t block, PerViewPlan<Acc>& plan) {
  const int64_t counted = plan.counted;
  Layout layout;
  layout.place(plan.scratch.sums, counted * plan.places_x * plan.chunk);
  layout.place(plan.scratch.at, plan.y.max_taps);
  layout.place(plan.scratch.row_of, counted);
  layout.place(plan.scratch.values, counted);
  layout.place(plan.scratch.weights, counted);
  layout.place(plan.scratch.shares, counted);
  layout.place(plan.scratch.steps, counted);
  layout.place(plan.scratch.buffer, std::max<int64_t>(counted, kLargestNetwork) * block);
  return layout.bytes;
}

template <class T, class Acc = typename AccumulatorOf<T>::type>
void per_view_of(const EnsembleArgs& args, const Parallel& parallel) {
  PerViewPlan<Acc> plan{};
  const Views<Acc> views(args, /*divide=*/true, plan);
  const std::vector<int32_t> end_y = views.y.ends(plan.y, plan.offsets_y);
  const std::vector<int32_t> end_x = views.x.ends(plan.x, plan.groups);
  plan.end_y = end_y.data();
  plan.end_x = end_x.data();
  const int64_t counted = plan.counted;
  std::vector<int64_t> order;
  if (args.total_weight && args.reduce == Reduce::median) {
    const int64_t step = spread_step(counted);
    for (int64_t k = 0, at = 0; k < counted; ++k, at = (at + step) % counted) order.push_back(at);
    plan.order = order.data();
  }
  // A band is as tall as a token, because its rows then read the same tokens. Bands are made lower,
  // and chunks narrower, until there are enough tasks for all threads.
  const int64_t block = kernels().block_bytes / static_cast<int64_t>(sizeof(Acc));
  const int64_t sums = counted * plan.places_x * static_cast<int64_t>(sizeof(Acc));
  plan.band = std::max<int64_t>(1, args.patch[0] / args.stride[0]);
  plan.chunk = fitting_channels(plan.channels, block, std::max<int64_t>(1, sums));
  const auto count_tasks = [&] {
    return plan.batch * div_up(plan.height, plan.band) * div_up(plan.channels, plan.chunk);
  };
  while (plan.band > 1 && count_tasks() < 4 * parallel.threads) plan.band /= 2;
  split_channels(block, parallel.threads, plan.chunk, count_tasks);
  const int64_t scratch_bytes = place_scratch(block, plan);
  const double work = static_cast<double>(plan.batch) *
                      static_cast<double>(args.channels * plan.height) *
                      static_cast<double>(counted * plan.width * (plan.x.max_taps + 8));
  run_tasks(plan, choose_kernel<T>(args), count_tasks(), workers_for(work, parallel), scratch_bytes,
            parallel);
}

}  // namespace

void run_per_view(const EnsembleArgs& args, const Parallel& parallel) {
  dispatch_floating(args.dtype,
                    [&](auto element) { per_view_of<decltype(element)>(args, parallel); });
}

}  // namespace srt::cpu
