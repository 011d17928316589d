// The entry of ensemble on the CPU: which file reduces. A stream also adds up total weights.
#include "../ensemble.h"

#include <vector>

#include "ensemble_views.h"

namespace srt {
namespace {

// What a chunk adds to the total weight of each cell of a stream: [H', W']. For a median, to its
// number of views.
std::vector<double> chunk_weights(const EnsembleArgs& args) {
  cpu::ViewsPlan<double> plan{};
  const cpu::Views<double> views(args, /*divide=*/false, plan);
  return cpu::cell_weights(plan, args.reduce == Reduce::median);
}

}  // namespace

void ensemble_cpu(const EnsembleArgs& args, const Parallel& parallel) {
  std::vector<double> added;
  cpu::with_memory([&] {
    if (args.total_weight) added = chunk_weights(args);
    if (args.batch == 0 || args.channels == 0) return;
    if (args.reduce == Reduce::mean) {
      cpu::run_mean(args, parallel);
    } else {
      cpu::run_per_view(args, parallel);
    }
  });
  for (size_t cell = 0; cell < added.size(); ++cell) args.total_weight[cell] += added[cell];
}

}  // namespace srt
