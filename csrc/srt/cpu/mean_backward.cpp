#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "../ensemble.h"
#include "dispatch.h"
#include "plan.h"

namespace srt {
namespace {

using cpu::Layout;
using cpu::Views;

// The table of an axis turned around: for each token, and each offset, the cells that read it.
template <class Acc>
struct Turned {
  const AxisTable<Acc>& table;
  int64_t offsets, tokens;
  std::vector<int32_t> first, end;  // [tokens, offsets] of the cells; some between may not read it

  Turned(const AxisTable<Acc>& of, int64_t offset_count, int64_t token_count)
      : table(of), offsets(offset_count), tokens(token_count) {
    first.assign(static_cast<size_t>(tokens * offsets), INT32_MAX);
    end.assign(static_cast<size_t>(tokens * offsets), 0);
    for (int64_t d = 0; d < offsets; ++d) {
      for (int64_t cell = 0; cell < table.cells; ++cell) {
        const int64_t slot = d * table.cells + cell;
        for (int32_t k = 0; k < table.taps[slot]; ++k) {
          const auto at = static_cast<size_t>((table.first[slot] + k) * offsets + d);
          first[at] = std::min(first[at], static_cast<int32_t>(cell));
          end[at] = static_cast<int32_t>(cell) + 1;
        }
      }
    }
  }

  // The cells that read `token` for offsets [d, d + tile).
  std::pair<int32_t, int32_t> cells(int64_t token, int64_t d, int64_t tile) const {
    int32_t from = INT32_MAX, to = 0;
    for (int64_t i = d; i < std::min(d + tile, offsets); ++i) {
      from = std::min(from, first[static_cast<size_t>(token * offsets + i)]);
      to = std::max(to, end[static_cast<size_t>(token * offsets + i)]);
    }
    return {std::min(from, to), to};
  }

  // The number of offsets in a tile, at most `largest`, that takes the least work. `load`: what it
  // costs to load a vector, in multiply-adds; uses(tile, d): how often the tile from d on is used.
  template <class Uses>
  int64_t best_tile(int64_t largest, int64_t load, Uses&& uses) const {
    int64_t best = 1, least = INT64_MAX;
    for (int64_t tile = 1; tile <= largest && tile < 2 * offsets; tile *= 2) {
      int64_t work = 0;
      for (int64_t d = 0; d < offsets; d += tile) {
        int64_t inputs = 0;
        for (int64_t token = 0; token < tokens; ++token) {
          const auto [from, to] = cells(token, d, tile);
          inputs += to - from;
        }
        work += inputs * (tile + load) * uses(tile, d);
      }
      if (work < least) {
        least = work;
        best = tile;
      }
    }
    return best;
  }
};

// Owns a TileTable whose sets are tokens and whose inputs are cells.
template <class Acc>
struct TurnedTiles {
  std::vector<int64_t> begin{0};
  std::vector<int64_t> cell;
  std::vector<Acc> weight;
  cpu::TileTable<Acc> table;

  TurnedTiles(const Turned<Acc>& turned, int64_t tile) {
    const AxisTable<Acc>& from = turned.table;
    for (int64_t token = 0; token < turned.tokens; ++token) {
      for (int64_t d = 0; d < turned.offsets; d += tile) {
        const auto [first, end] = turned.cells(token, d, tile);
        for (int32_t i = first; i < end; ++i) {
          bool any = false;
          for (int64_t k = d; k < d + tile; ++k) {
            const int64_t slot = k * from.cells + i;
            const int64_t tap = k < turned.offsets ? token - from.first[slot] : -1;
            const bool reads = tap >= 0 && tap < from.taps[slot];
            weight.push_back(reads ? from.weight[slot * from.max_taps + tap] : 0);
            any = any || weight.back() != 0;
          }
          if (any) {
            cell.push_back(i);
          } else {
            weight.resize(weight.size() - static_cast<size_t>(tile));
          }
        }
        begin.push_back(static_cast<int64_t>(cell.size()));
      }
    }
    table = {tile, div_up(turned.offsets, tile), begin.data(), cell.data(), weight.data()};
  }
  TurnedTiles(const TurnedTiles&) = delete;

  int64_t largest() const {
    int64_t most = 0;
    for (size_t i = 1; i < begin.size(); ++i) most = std::max(most, begin[i] - begin[i - 1]);
    return most;
  }
};

// Views, sorted by dy and then by group, in runs of one dy whose groups lie in one tile.
template <class Acc>
struct Runs {
  std::vector<typename cpu::MeanBackwardPlan<Acc>::Run> runs;
  std::vector<int64_t> of;  // [distinct dy + 1]

  Runs(const std::vector<typename cpu::ViewsPlan<Acc>::View>& by_dy, int64_t offsets_y,
       int64_t tile) {
    of.assign(static_cast<size_t>(offsets_y) + 1, 0);
    for (size_t i = 0; i < by_dy.size(); ++i) {
      const int64_t at = by_dy[i].group / tile;
      const bool joins = i > 0 && by_dy[i].dy == by_dy[i - 1].dy && runs.back().tile == at;
      if (!joins) {
        runs.push_back({at, static_cast<int64_t>(i), 0});
        ++of[static_cast<size_t>(by_dy[i].dy) + 1];
      }
      runs.back().end = static_cast<int64_t>(i) + 1;
    }
    for (size_t d = 1; d < of.size(); ++d) of[d] += of[d - 1];
  }
};

template <class Acc>
void mean_backward(const EnsembleArgs& args, void* grad_tokens,
                   const cpu::EnsembleKernels<Acc>& kernels, const cpu::Kernels& isa,
                   const Parallel& parallel) {
  using Plan = cpu::MeanBackwardPlan<Acc>;
  Plan plan{};
  const Views<Acc> views(args, /*divide=*/false, plan);
  plan.offsets_y = static_cast<int64_t>(views.dy.size());
  plan.tokens_y = args.grid[0];
  plan.grad_tokens = grad_tokens;
  std::vector<typename Plan::View> by_dy = views.views;
  std::stable_sort(by_dy.begin(), by_dy.end(),
                   [](const auto& a, const auto& b) { return a.dy < b.dy; });
  plan.by_dy = by_dy.data();

  const std::vector<double> weights = cpu::cell_weights(plan, /*count_views=*/false);
  std::vector<Acc> inverse;
  for (const double weight : weights)
    inverse.push_back(weight > 0 ? static_cast<Acc>(1 / weight) : 0);
  plan.inverse = inverse.data();

  const Turned<Acc> turned_y(plan.y, plan.offsets_y, plan.tokens_y);
  const Turned<Acc> turned_x(plan.x, plan.groups, plan.tokens_x);
  const int64_t tile_y = turned_y.best_tile(isa.max_tile, cpu::kLoadTokens,
                                            [](int64_t, int64_t) { return int64_t{1}; });
  const int64_t tile_x =
      turned_x.best_tile(isa.max_tile, cpu::kLoadSums, [&](int64_t tile, int64_t d) {
        int64_t uses = 0, last = -1;
        for (const auto& view : by_dy) {
          if (view.group / tile != d / tile || view.dy == last) continue;
          ++uses;
          last = view.dy;
        }
        return uses;
      });
  const TurnedTiles<Acc> y(turned_y, tile_y), x(turned_x, tile_x);
  const TurnedTiles<Acc> exact_y(turned_y, 1), exact_x(turned_x, 1);
  const Runs<Acc> runs(by_dy, plan.offsets_y, tile_x), exact_runs(by_dy, plan.offsets_y, 1);
  plan.tile_y = y.table;
  plan.tile_x = x.table;
  plan.exact_y = exact_y.table;
  plan.exact_x = exact_x.table;
  plan.runs = runs.runs.data();
  plan.runs_of = runs.of.data();
  plan.exact_runs = exact_runs.runs.data();
  plan.exact_runs_of = exact_runs.of.data();

  // Segments as long as the cache holds for a piece of channels. Their windows overlap: where the
  // offsets alone reach farther than that, shorter ones would only read more.
  const int64_t block = isa.block_bytes / static_cast<int64_t>(sizeof(Acc));
  const int64_t piece = std::min(div_up(plan.channels, block) * block,
                                 cpu::kPieceBytes / static_cast<int64_t>(sizeof(Acc)));
  const int64_t cell_bytes = tile_y * static_cast<int64_t>(sizeof(Acc));
  std::vector<typename Plan::Window> windows;
  for (int64_t segments = 1;; segments *= 2) {
    const int64_t segment = div_up(plan.tokens_x, segments);
    std::vector<typename Plan::Window> shorter;
    int64_t largest = 1, read = 0;
    for (int64_t j = 0; j < plan.tokens_x; j += segment) {
      int64_t from = INT32_MAX, to = 0;
      for (int64_t token = j; token < std::min(j + segment, plan.tokens_x); ++token) {
        const auto [first, end] = turned_x.cells(token, 0, plan.groups);
        if (first == end) continue;
        from = std::min<int64_t>(from, first);
        to = std::max<int64_t>(to, end);
      }
      shorter.push_back({std::min(from, to), to});
      largest = std::max(largest, to - shorter.back().begin);
      read += to - shorter.back().begin;
    }
    if (segments > 1 && read > 2 * plan.columns) break;
    windows = std::move(shorter);
    plan.segment = segment;
    plan.scratch.window = largest;
    if (segment == 1 || largest * cell_bytes * piece <= cpu::sums_bytes()) break;
  }
  plan.segments = static_cast<int64_t>(windows.size());
  plan.windows = windows.data();

  plan.chunk = div_up(plan.channels, block) * block;
  const auto count_tasks = [&] {
    return plan.batch * plan.tokens_y * div_up(plan.channels, plan.chunk);
  };
  while (plan.chunk > block && count_tasks() < 4 * parallel.threads)
    plan.chunk = div_up(plan.chunk / block, 2) * block;
  plan.pass = cpu::fitting_channels(plan.chunk, block, plan.scratch.window * cell_bytes);

  const int64_t inputs =
      std::max(std::max(y.largest(), exact_y.largest()), std::max(x.largest(), exact_x.largest()));
  Layout layout;
  plan.scratch.sums = layout.place<Acc>(tile_y * plan.scratch.window * plan.pass);
  plan.scratch.at = layout.place<int64_t>(inputs);
  plan.scratch.weights = layout.place<Acc>(inputs * tile_y);
  const double work = static_cast<double>(plan.batch) * static_cast<double>(args.channels) *
                      (static_cast<double>(plan.columns) * static_cast<double>(y.cell.size()) *
                           static_cast<double>(tile_y) +
                       static_cast<double>(plan.tokens_y * plan.offsets_y) *
                           static_cast<double>(x.cell.size()) * static_cast<double>(tile_x));
  cpu::run_tasks<Plan>(plan, kernels.mean_backward, count_tasks(), cpu::workers_for(work, parallel),
                       layout.bytes, parallel);
}

int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return 8;
    case DType::f32:
      return 4;
    case DType::f16:
    case DType::bf16:
      return 2;
    case DType::u8:
      break;
  }
  return 1;
}

}  // namespace

void mean_backward_cpu(const EnsembleArgs& args, void* grad_tokens, const Parallel& parallel) {
  if (args.batch == 0 || args.channels == 0) return;
  const cpu::Kernels& kernels = cpu::kernels();
  std::vector<int64_t> uncounted;
  for (int64_t v = 0; v < args.views; ++v)
    if (args.weights && args.weights[v] == 0) uncounted.push_back(v);
  if (static_cast<int64_t>(uncounted.size()) < args.views) {
    switch (args.dtype) {
      case DType::f32:
        mean_backward(args, grad_tokens, kernels.ensemble_f32, kernels, parallel);
        break;
      case DType::f16:
        mean_backward(args, grad_tokens, kernels.ensemble_f16, kernels, parallel);
        break;
      case DType::bf16:
        mean_backward(args, grad_tokens, kernels.ensemble_bf16, kernels, parallel);
        break;
      case DType::f64:
        mean_backward(args, grad_tokens, kernels.ensemble_f64, kernels, parallel);
        break;
      case DType::u8:
        break;  // tokens are floating
    }
  }
  const int64_t bytes =
      args.batch * args.grid[0] * args.grid[1] * args.channels * size_of(args.dtype);
  for (const int64_t v : uncounted)
    std::memset(static_cast<char*>(grad_tokens) + v * bytes, 0, static_cast<size_t>(bytes));
}

}  // namespace srt
