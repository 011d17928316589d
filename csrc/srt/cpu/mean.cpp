// The mean on the CPU: its plan, and its tasks over threads.
#include <algorithm>

#include "../ensemble.h"
#include "dispatch.h"
#include "ensemble_views.h"

namespace srt::cpu {
namespace {

// The largest tile of rows. It is not split: its sums must fit the cache, for a piece of channels
// or more, and each thread must get one. `row_bytes`: the sums of a row and a channel.
template <class Acc>
int64_t largest_tile(const MeanPlan<Acc>& plan, int64_t block, int64_t row_bytes, int64_t threads) {
  const int64_t piece = std::min(div_up(plan.channels, block) * block,
                                 kPieceBytes / static_cast<int64_t>(sizeof(Acc)));
  int64_t largest = kernels().max_tile;
  const auto too_large = [&] {
    const int64_t tasks = plan.batch * div_up(plan.channels, block) * div_up(plan.height, largest);
    return largest * row_bytes * piece > sums_bytes || tasks < threads;
  };
  while (largest > 1 && too_large()) largest /= 2;
  return largest;
}

template <class Acc>
int64_t place_scratch(int64_t inputs, MeanPlan<Acc>& plan) {
  Layout layout;
  layout.place(plan.scratch.sums, plan.band * plan.groups * plan.tokens_x * plan.pass);
  layout.place(plan.scratch.at, inputs);
  layout.place(plan.scratch.weights, inputs * plan.band);
  layout.place(plan.scratch.count, plan.width);
  layout.place(plan.scratch.inverse, plan.band * plan.width);
  layout.place(plan.scratch.keep, plan.total_weight ? plan.band * plan.width : 0);
  return layout.bytes;
}

template <class T, class Acc = typename AccumulatorOf<T>::type>
void mean_of(const EnsembleArgs& args, const Parallel& parallel) {
  const Kernels& isa = kernels();
  MeanPlan<Acc> plan{};
  const Views<Acc> views(args, /*divide=*/false, plan);
  const int64_t block = isa.block_bytes / static_cast<int64_t>(sizeof(Acc));
  // With all weights 0 there is no group.
  const int64_t row_bytes =
      std::max<int64_t>(1, plan.groups) * plan.tokens_x * static_cast<int64_t>(sizeof(Acc));
  plan.band =
      choose_tile(plan.y, plan.offsets_y, largest_tile(plan, block, row_bytes, parallel.threads),
                  kLoadTokens, once);
  const int64_t tile_x = choose_tile(plan.x, plan.groups, isa.max_tile, kLoadSums, once);
  TileStorage<Acc> y, x;
  y.add_rows(plan.y, plan.offsets_y, plan.band);
  for (int64_t cell = 0; cell < plan.width; cell += tile_x) {
    for (int64_t g = 0; g < plan.groups; ++g) x.add(plan.x, g, cell, tile_x, g * plan.tokens_x);
    x.close();
  }
  plan.tile_y = y.table(plan.band, plan.height);
  plan.tile_x = x.table(tile_x, plan.width);

  plan.chunk = div_up(plan.channels, block) * block;
  const auto count_tasks = [&] {
    return plan.batch * plan.tile_y.tiles * div_up(plan.channels, plan.chunk);
  };
  split_channels(block, parallel.threads, plan.chunk, count_tasks);
  plan.pass = fitting_channels(plan.chunk, block, plan.band * row_bytes);
  const int64_t scratch_bytes = place_scratch(views.largest_group() * y.largest(), plan);
  const double work = static_cast<double>(plan.batch) *
                      static_cast<double>(args.channels * plan.height) *
                      static_cast<double>(plan.groups * plan.width * plan.x.max_taps +
                                          plan.counted * plan.tokens_x * plan.y.max_taps);
  run_tasks(plan, args.total_weight ? isa.of<T>().stream_mean : isa.of<T>().mean, count_tasks(),
            workers_for(work, parallel), scratch_bytes, parallel);
}

}  // namespace

void run_mean(const EnsembleArgs& args, const Parallel& parallel) {
  dispatch_floating(args.dtype, [&](auto element) { mean_of<decltype(element)>(args, parallel); });
}

}  // namespace srt::cpu
