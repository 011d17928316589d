#include <algorithm>
#include <utility>
#include <vector>

#include "../ensemble.h"
#include "../running_median.h"
#include "dispatch.h"
#include "plan.h"

namespace srt {
namespace {

using cpu::fitting_channels;
using cpu::kLoadSums;
using cpu::kLoadTokens;
using cpu::kPieceBytes;
using cpu::Layout;
using cpu::sums_bytes;
using cpu::Views;
using cpu::workers_for;

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

struct TileChoice {
  int64_t tile, inputs;
};

// Owns the tiles of a table.
template <class Acc>
struct TileStorage {
  std::vector<int64_t> begin{0};
  std::vector<int64_t> token;
  std::vector<Acc> weight;

  // One set of tiles for each offset.
  cpu::TileTable<Acc> fill(const AxisTable<Acc>& table, int64_t offsets, TileChoice choice) {
    const int64_t tile = choice.tile;
    reserve(table, offsets, choice);
    for (int64_t d = 0; d < offsets; ++d)
      for (int64_t cell = 0; cell < table.cells; cell += tile) {
        add(table, d, cell, tile, 0);
        begin.push_back(static_cast<int64_t>(token.size()));
      }
    return get(table, tile);
  }
  // One set for all of them: token j of offset number d becomes d * tokens + j.
  cpu::TileTable<Acc> fill_merged(const AxisTable<Acc>& table, int64_t offsets, TileChoice choice,
                                  int64_t tokens) {
    const int64_t tile = choice.tile;
    reserve(table, 1, choice);
    for (int64_t cell = 0; cell < table.cells; cell += tile) {
      for (int64_t d = 0; d < offsets; ++d) add(table, d, cell, tile, d * tokens);
      begin.push_back(static_cast<int64_t>(token.size()));
    }
    return get(table, tile);
  }
  // The most that one tile reads.
  int64_t largest() const {
    int64_t most = 0;
    for (size_t i = 1; i < begin.size(); ++i) most = std::max(most, begin[i] - begin[i - 1]);
    return most;
  }

 private:
  void reserve(const AxisTable<Acc>& table, int64_t sets, TileChoice choice) {
    begin.reserve(static_cast<size_t>(sets * (table.cells / choice.tile + 1) + 1));
    token.reserve(static_cast<size_t>(choice.inputs));
    weight.reserve(static_cast<size_t>((choice.inputs + 1) * choice.tile));
  }
  void add(const AxisTable<Acc>& table, int64_t d, int64_t cell, int64_t tile, int64_t base) {
    const auto [first, end] = tokens_of(table, d, cell, tile);
    for (int32_t read = first; read < end; ++read) {
      bool any = false;
      for (int64_t i = cell; i < cell + tile; ++i) {
        const int64_t slot = d * table.cells + i;
        const int64_t k = i < table.cells ? read - table.first[slot] : -1;
        const bool reads = k >= 0 && k < table.taps[slot];
        weight.push_back(reads ? table.weight[slot * table.max_taps + k] : 0);
        any = any || weight.back() != 0;
      }
      if (any) {
        token.push_back(base + read);
      } else {
        weight.resize(weight.size() - static_cast<size_t>(tile));
      }
    }
  }
  cpu::TileTable<Acc> get(const AxisTable<Acc>& table, int64_t tile) const {
    return {tile, div_up(table.cells, tile), begin.data(), token.data(), weight.data()};
  }
};

// The size of the tiles of a table, at most `largest`, that takes the least work, and an upper
// bound of their inputs. `load`: what it costs to load a vector, in multiply-adds.
template <class Acc>
TileChoice best_tile(const AxisTable<Acc>& table, int64_t offsets, int64_t largest, int64_t load) {
  TileChoice best{1, 0};
  int64_t least = INT64_MAX;
  for (int64_t tile = 1; tile <= largest && tile < 2 * table.cells; tile *= 2) {
    int64_t inputs = 0;
    for (int64_t d = 0; d < offsets; ++d) {
      for (int64_t cell = 0; cell < table.cells; cell += tile) {
        const auto [first, end] = tokens_of(table, d, cell, tile);
        inputs += end - first;
      }
    }
    const int64_t work = inputs * (tile + load);
    if (work < least) {
      least = work;
      best = {tile, inputs};
    }
  }
  return best;
}

// A task is a band of output rows and a chunk of channels. Where that leaves a thread without work,
// bands get lower, down to `least_band`, then chunks narrower. Returns the number of tasks.
template <class Acc>
int64_t split(int64_t block, int64_t least_band, int64_t threads, cpu::ViewsPlan<Acc>& plan) {
  const auto count_tasks = [&] {
    return plan.batch * div_up(plan.rows, plan.band) * div_up(plan.channels, plan.chunk);
  };
  while (plan.band > least_band && count_tasks() < 4 * threads) plan.band /= 2;
  while (plan.chunk > block && count_tasks() < 4 * threads)
    plan.chunk = div_up(plan.chunk / block, 2) * block;
  return count_tasks();
}

template <class Acc>
void mean(const EnsembleArgs& args, const cpu::EnsembleKernels<Acc>& kernels,
          const cpu::Kernels& isa, const Parallel& parallel) {
  cpu::MeanPlan<Acc> plan{};
  const Views<Acc> views(args, /*divide=*/false, plan);
  const int64_t dy = static_cast<int64_t>(views.dy.size()), dx = plan.groups;
  const int64_t block = isa.block_bytes / static_cast<int64_t>(sizeof(Acc));
  // With all weights 0 there is no group.
  const int64_t sums = std::max<int64_t>(1, dx) * plan.tokens_x * static_cast<int64_t>(sizeof(Acc));
  int64_t largest = isa.max_tile;
  // A tile of rows is not split: its sums must fit the cache, for a piece of channels or more, and
  // each thread must get one.
  const int64_t piece = std::min(div_up(plan.channels, block) * block,
                                 kPieceBytes / static_cast<int64_t>(sizeof(Acc)));
  const auto too_large = [&] {
    const int64_t tasks = plan.batch * div_up(plan.channels, block) * div_up(plan.rows, largest);
    return largest * sums * piece > sums_bytes() || tasks < parallel.threads;
  };
  while (largest > 1 && too_large()) largest /= 2;
  TileStorage<Acc> y, x;
  plan.tile_y = y.fill(plan.y, dy, best_tile(plan.y, dy, largest, kLoadTokens));
  plan.tile_x =
      x.fill_merged(plan.x, dx, best_tile(plan.x, dx, isa.max_tile, kLoadSums), plan.tokens_x);
  plan.band = plan.tile_y.tile;
  plan.chunk = div_up(plan.channels, block) * block;
  const int64_t tasks = split(block, plan.band, parallel.threads, plan);
  plan.pass = fitting_channels(plan.chunk, block, plan.band * sums);

  const int64_t exact = std::max(views.largest_group() * plan.y.max_taps, dx * plan.x.max_taps);
  const int64_t inputs = std::max(views.largest_group() * y.largest(), exact);
  Layout layout;
  plan.scratch.sums = layout.place<Acc>(plan.band * dx * plan.tokens_x * plan.pass);
  plan.scratch.at = layout.place<int64_t>(inputs);
  plan.scratch.weights = layout.place<Acc>(inputs * plan.band);
  plan.scratch.count = layout.place<double>(plan.columns);
  plan.scratch.inverse = layout.place<Acc>(plan.band * plan.columns);
  plan.scratch.keep = layout.place<Acc>(args.seen ? plan.band * plan.columns : 0);
  const double work = static_cast<double>(plan.batch) *
                      static_cast<double>(args.channels * plan.rows) *
                      static_cast<double>(plan.groups * plan.columns * plan.x.max_taps +
                                          plan.view_count * plan.tokens_x * plan.y.max_taps);
  cpu::run_tasks<cpu::MeanPlan<Acc>>(plan, args.seen ? kernels.stream_mean : kernels.mean, tasks,
                                     workers_for(work, parallel), layout.bytes, parallel);
}

template <class Acc>
void reduce_values(const EnsembleArgs& args, cpu::Kernel<cpu::ValuePlan<Acc>> kernel,
                   int64_t block_bytes, const Parallel& parallel) {
  cpu::ValuePlan<Acc> plan{};
  const Views<Acc> views(args, /*divide=*/true, plan);
  const std::vector<int32_t> end_y = views.y.ends(plan.y, static_cast<int64_t>(views.dy.size()));
  const std::vector<int32_t> end_x = views.x.ends(plan.x, plan.groups);
  plan.end_y = end_y.data();
  plan.end_x = end_x.data();
  plan.variance = args.variance;
  plan.plane_stride = args.plane_stride;
  const int64_t counted = plan.view_count;
  std::vector<int64_t> order;
  if (args.seen && args.reduce == Reduce::median) {
    const int64_t step = spread_step(counted);
    for (int64_t k = 0, at = 0; k < counted; ++k, at = (at + step) % counted) order.push_back(at);
    plan.order = order.data();
  }
  // A band is as tall as a token: its rows read the same tokens.
  const int64_t block = block_bytes / static_cast<int64_t>(sizeof(Acc));
  const int64_t sums = counted * plan.tokens_x * static_cast<int64_t>(sizeof(Acc));
  plan.band = std::max<int64_t>(1, args.patch[0] / args.stride[0]);
  plan.chunk = fitting_channels(plan.channels, block, std::max<int64_t>(1, sums));
  const int64_t tasks = split(block, 1, parallel.threads, plan);
  Layout layout;
  cpu::place_values(plan, layout, block_bytes);
  const double work = static_cast<double>(plan.batch) *
                      static_cast<double>(args.channels * plan.rows) *
                      static_cast<double>(counted * plan.columns * (plan.x.max_taps + 8));
  cpu::run_tasks<cpu::ValuePlan<Acc>>(plan, kernel, tasks, workers_for(work, parallel),
                                      layout.bytes, parallel);
}

// What a chunk adds to the weight that each cell of a stream has got: [H', W']. For a median, to
// its number of views.
std::vector<double> chunk_weights(const EnsembleArgs& args) {
  cpu::ViewsPlan<double> plan{};
  const Views<double> views(args, /*divide=*/false, plan);
  return cpu::cell_weights(plan, args.reduce == Reduce::median);
}

template <class Acc>
void reduce(const EnsembleArgs& args, const cpu::EnsembleKernels<Acc>& kernels,
            const cpu::Kernels& isa, const Parallel& parallel) {
  const int64_t block_bytes = isa.block_bytes;
  switch (args.reduce) {
    case Reduce::mean:
      return mean(args, kernels, isa, parallel);
    case Reduce::median:
      return reduce_values(args, args.seen ? kernels.stream_median : kernels.median, block_bytes,
                           parallel);
    case Reduce::moments:
      return reduce_values(args, args.seen ? kernels.stream_moments : kernels.moments, block_bytes,
                           parallel);
  }
}

}  // namespace

void ensemble_cpu(const EnsembleArgs& args, const Parallel& parallel) {
  const cpu::Kernels& kernels = cpu::kernels();
  std::vector<double> added;
  if (args.seen) added = chunk_weights(args);
  if (args.batch > 0 && args.channels > 0) {
    switch (args.dtype) {
      case DType::f32:
        reduce(args, kernels.ensemble_f32, kernels, parallel);
        break;
      case DType::f16:
        reduce(args, kernels.ensemble_f16, kernels, parallel);
        break;
      case DType::bf16:
        reduce(args, kernels.ensemble_bf16, kernels, parallel);
        break;
      case DType::f64:
        reduce(args, kernels.ensemble_f64, kernels, parallel);
        break;
      case DType::u8:
        break;  // tokens are floating
    }
  }
  for (size_t cell = 0; cell < added.size(); ++cell) args.seen[cell] += added[cell];
}

}  // namespace srt
