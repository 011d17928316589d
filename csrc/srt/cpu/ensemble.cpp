// The entry point of ensemble on the CPU. Calls the reduction in mean.cpp or per_view.cpp; for a
// stream it also updates the total weights [H', W'].
#include "../ensemble.h"

#include <vector>

#include "ensemble_views.h"

namespace srt {
namespace {

// The weight [H', W'] that a chunk adds to each cell of a stream; for a median, its number of
// views.
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
