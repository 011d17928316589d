#include <algorithm>
#include <utility>

#include "../ensemble.h"
#include "dispatch.h"
#include "ensemble_views.h"

namespace srt::cpu {
namespace {

// The tokens that cells [cell, cell + tile) of offset number `d` read.
template <class Acc>
std::pair<int32_t, int32_t> tokens_of(const AxisTable<Acc>& table, int64_t d, int64_t cell,
                                      int64_t tile) {
  int32_t first = INT32_MAX, end = 0;
  for (int64_t i = cell; i < std::min(cell + tile, table.cells); ++i) {
    const int64_t slot = d * table.cells + i;
    if (table.taps[slot] == 0) continue;
    first = std::min(first, table.first[slot]);
    end = std::max(end, table.first[slot] + table.taps[slot]);
  }
  return {std::min(first, end), end};
}

template <class Acc>
void add_tile(const AxisTable<Acc>& table, int64_t d, int64_t cell, int64_t tile, int64_t base,
              TileStorage<Acc>& tiles) {
  const auto [first, end] = tokens_of(table, d, cell, tile);
  tiles.add(first, end, base, tile, [&](int64_t token, int64_t i) {
    return cell + i < table.cells ? weight_of(table, d * table.cells + cell + i, token) : 0;
  });
}

// The largest tile of rows. It is not split: its sums must fit the cache, for a piece of channels
// or more, and each thread must get one. `row_bytes`: the sums of a row and a channel.
template <class Acc>
int64_t largest_tile(const MeanPlan<Acc>& plan, int64_t block, int64_t row_bytes, int64_t threads) {
  const int64_t piece = std::min(div_up(plan.channels, block) * block,
                                 kPieceBytes / static_cast<int64_t>(sizeof(Acc)));
  int64_t largest = kernels().max_tile;
  const auto too_large = [&] {
    const int64_t tasks = plan.batch * div_up(plan.channels, block) * div_up(plan.height, largest);
    return largest * row_bytes * piece > sums_bytes() || tasks < threads;
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
  const auto tokens_in = [](const AxisTable<Acc>& table) {
    return
        [table](int64_t d, int64_t cell, int64_t tile) { return tokens_of(table, d, cell, tile); };
  };
  plan.band = choose_tile(plan.offsets_y, plan.height,
                          largest_tile(plan, block, row_bytes, parallel.threads), kLoadTokens,
                          tokens_in(plan.y), once);
  TileStorage<Acc> y, x;
  for (int64_t d = 0; d < plan.offsets_y; ++d) {
    for (int64_t cell = 0; cell < plan.height; cell += plan.band) {
      add_tile(plan.y, d, cell, plan.band, 0, y);
      y.close();
    }
  }
  const int64_t tile_x =
      choose_tile(plan.groups, plan.width, isa.max_tile, kLoadSums, tokens_in(plan.x), once);
  for (int64_t cell = 0; cell < plan.width; cell += tile_x) {
    for (int64_t g = 0; g < plan.groups; ++g)
      add_tile(plan.x, g, cell, tile_x, g * plan.tokens_x, x);
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
                                          plan.view_count * plan.tokens_x * plan.y.max_taps);
  run_tasks(plan, args.total_weight ? isa.of<T>().stream_mean : isa.of<T>().mean, count_tasks(),
            workers_for(work, parallel), scratch_bytes, parallel);
}

}  // namespace

void mean(const EnsembleArgs& args, const Parallel& parallel) {
  dispatch_floating(args.dtype, [&](auto element) { mean_of<decltype(element)>(args, parallel); });
}

}  // namespace srt::cpu
