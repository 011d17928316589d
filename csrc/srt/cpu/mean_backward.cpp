// The gradient of the mean on the CPU: transposes the axis tables, builds the plan of a call and
// distributes its tasks over threads. mean_backward-inl.h has the inner loops.
#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "../ensemble.h"
#include "dispatch.h"
#include "ensemble_views.h"

namespace srt::cpu {
namespace {

// An axis table transposed: one row per token, whose outputs are the offsets and whose inputs are
// the cells that read the token. Weights are looked up in the original table, because a transposed
// copy could be large: all cells may read an edge token. Under a circular border, cells at both
// ends of the axis may read the same token. To make the cells of a token consecutive, they are
// numbered as if the axis were repeated three times: of 10 cells, 8, 9 and 0 become 18, 19 and 20.
template <class Acc>
struct TransposedTable {
  const AxisTable<Acc>& table;
  const std::vector<int64_t>& start;  // [offsets], Axis::start
  int64_t cells;                      // outputs of a row: the offsets
  int64_t tokens;                     // of one repetition
  int64_t before;                     // repetitions before the axis itself
  std::vector<int32_t> first, taps;   // [tokens, offsets]

  TransposedTable(const AxisTable<Acc>& of, const std::vector<int64_t>& start, int64_t tokens,
                  Border border)
      : table(of),
        start(start),
        cells(static_cast<int64_t>(start.size())),
        tokens(tokens),
        before(border == Border::circular ? 1 : 0) {
    first.resize(static_cast<size_t>(tokens * cells));
    taps.resize(first.size());
    for (int64_t d = 0; d < cells; ++d)
      for (int64_t cell = 0; cell < table.cells; ++cell) add_cell(d, cell);
  }

  Acc weight_of(int64_t token, int64_t d, int64_t cell) const {
    const int64_t period = cell / table.cells - before;
    const int64_t place = token - period * tokens - start[static_cast<size_t>(d)];
    return table.weight_of(d, cell % table.cells, place);
  }

 private:
  void add_cell(int64_t d, int64_t cell) {
    const int64_t slot = d * table.cells + cell;
    for (int32_t k = 0; k < table.taps[slot]; ++k) {
      const int64_t from_first = start[static_cast<size_t>(d)] + table.first[slot] + k + tokens;
      const int64_t period = before + 1 - from_first / tokens;
      const auto number = static_cast<int32_t>(cell + period * table.cells);
      const auto own = static_cast<size_t>(from_first % tokens * cells + d);
      const int32_t end = first[own] + taps[own];
      if (taps[own] == 0 || number < first[own]) first[own] = number;
      taps[own] = std::max(end, number + 1) - first[own];
    }
  }
};

// The views sorted by dy, then by group, and split into parts. The views of a part share a dy, and
// their groups are in the same tile.
template <class Acc>
struct ViewsByDy {
  std::vector<typename ViewsPlan<Acc>::View> views;
  std::vector<TileViews> parts;
  std::vector<int64_t> begin;  // [distinct dy + 1], into parts

  explicit ViewsByDy(const std::vector<typename ViewsPlan<Acc>::View>& by_group) : views(by_group) {
    std::stable_sort(views.begin(), views.end(),
                     [](const auto& a, const auto& b) { return a.dy < b.dy; });
  }
  // How often a tile of groups is summed: once for each dy that has views in it.
  int64_t uses(int64_t group, int64_t tile) const {
    int64_t count = 0, last = -1;
    for (const auto& view : views) {
      if (view.group / tile != group / tile || view.dy == last) continue;
      ++count;
      last = view.dy;
    }
    return count;
  }
  void split(int64_t offsets_y, int64_t tile) {
    begin.assign(static_cast<size_t>(offsets_y) + 1, 0);
    for (size_t i = 0; i < views.size(); ++i) {
      const int64_t at = views[i].group / tile;
      const bool joins = i > 0 && views[i].dy == views[i - 1].dy && parts.back().tile == at;
      if (!joins) {
        parts.push_back({at, static_cast<int64_t>(i), 0});
        ++begin[static_cast<size_t>(views[i].dy) + 1];
      }
      parts.back().end = static_cast<int64_t>(i) + 1;
    }
    for (size_t d = 1; d < begin.size(); ++d) begin[d] += begin[d - 1];
  }
};

// Splits a row of tokens into segments whose sums fit the cache for a piece of channels. The spans
// of cells of neighbouring segments overlap. Splitting stops when the segments together would read
// more than twice the row: then the range of the offsets dominates, and shorter segments read more.
template <class Acc>
std::vector<Span> choose_segments(const TransposedTable<Acc>& x, int64_t cell_bytes,
                                  MeanBackwardPlan<Acc>& plan) {
  std::vector<Span> spans;
  for (int64_t segments = 1;; segments *= 2) {
    const int64_t segment = div_up(plan.tokens_x, segments);
    std::vector<Span> shorter;
    int64_t longest = 1, read = 0;
    for (int64_t j = 0; j < plan.tokens_x; j += segment) {
      const int64_t j_end = std::min(j + segment, plan.tokens_x);
      const auto [from, to] = inputs_of(x, j * plan.groups, j_end * plan.groups);
      shorter.push_back({from, to});
      longest = std::max(longest, to - from);
      read += to - from;
    }
    if (segments > 1 && read > 2 * plan.width) break;
    spans = std::move(shorter);
    plan.segment = segment;
    plan.longest_span = longest;
    if (segment == 1 || longest * cell_bytes <= sums_bytes) break;
  }
  plan.segments = static_cast<int64_t>(spans.size());
  plan.spans = spans.data();
  return spans;
}

template <class T, class Acc = typename AccumulatorOf<T>::type>
void mean_backward(const EnsembleArgs& args, void* grad_tokens, const Parallel& parallel) {
  const Kernels& isa = kernels();
  constexpr auto kSize = static_cast<int64_t>(sizeof(Acc));
  MeanBackwardPlan<Acc> plan{};
  const Views<Acc> views(args, /*divide=*/false, plan);
  plan.grad_tokens = grad_tokens;
  std::vector<Acc> inverse;
  for (const double weight : cell_weights(plan, /*counts_views=*/false))
    inverse.push_back(weight > 0 ? static_cast<Acc>(1 / weight) : 0);
  plan.inverse = inverse.data();

  const TransposedTable<Acc> y_cells(plan.y, views.y.start, plan.tokens_y, args.border);
  const TransposedTable<Acc> x_cells(plan.x, views.x.start, plan.tokens_x, args.border);
  ViewsByDy<Acc> by_dy(views.views);
  const int64_t tile_y = choose_tile(y_cells, plan.tokens_y, isa.max_tile, kLoadTokens, once);
  const int64_t tile_x =
      choose_tile(x_cells, plan.tokens_x, isa.max_tile, kLoadSums,
                  [&](int64_t group, int64_t tile) { return by_dy.uses(group, tile); });
  by_dy.split(plan.offsets_y, tile_x);
  TileStorage<Acc> y, x;
  y.add_rows(y_cells, plan.tokens_y, tile_y,
             [&](int64_t, int64_t cell) { return cell % plan.height; });
  x.add_rows(x_cells, plan.tokens_x, tile_x, [](int64_t, int64_t cell) { return cell; });
  plan.tile_y = y.table(tile_y, plan.offsets_y);
  plan.tile_x = x.table(tile_x, plan.groups);
  plan.by_dy = by_dy.views.data();
  plan.tile_views = by_dy.parts.data();
  plan.tile_views_begin = by_dy.begin.data();

  const int64_t block = isa.block_bytes / kSize;
  const int64_t piece = std::min(div_up(plan.channels, block) * block, kPieceBytes / kSize);
  const auto spans = choose_segments(x_cells, tile_y * kSize * piece, plan);
  plan.chunk = div_up(plan.channels, block) * block;
  const auto count_tasks = [&] {
    return plan.batch * plan.tokens_y * div_up(plan.channels, plan.chunk);
  };
  split_channels(block, parallel.threads, plan.chunk, count_tasks);
  plan.pass = fitting_channels(plan.chunk, block, plan.longest_span * tile_y * kSize);

  const int64_t inputs = std::max(y.largest(), x.largest());
  Layout layout;
  layout.place(plan.scratch.sums, tile_y * plan.longest_span * plan.pass);
  layout.place(plan.scratch.at, inputs);
  layout.place(plan.scratch.weights, inputs * tile_y);
  const double work =
      static_cast<double>(plan.batch) * static_cast<double>(args.channels) *
      (static_cast<double>(plan.width) * static_cast<double>(y.weight.size()) +
       static_cast<double>(plan.tokens_y * plan.offsets_y) * static_cast<double>(x.weight.size()));
  run_tasks(plan, isa.of<T>().mean_backward, count_tasks(), workers_for(work, parallel),
            layout.bytes, parallel);
}

}  // namespace
}  // namespace srt::cpu

namespace srt {

void mean_backward_cpu(const EnsembleArgs& args, void* grad_tokens, const Parallel& parallel) {
  if (args.batch == 0 || args.channels == 0) return;
  const auto counts = [&](int64_t v) { return !args.weights || args.weights[v] != 0; };
  bool any = false;
  for (int64_t v = 0; v < args.views; ++v) any = any || counts(v);
  dispatch_floating(args.dtype, [&](auto element) {
    using T = decltype(element);
    if (any) cpu::with_memory([&] { cpu::mean_backward<T>(args, grad_tokens, parallel); });
    const int64_t size = args.batch * args.grid[0] * args.grid[1] * args.channels;
    for (int64_t v = 0; v < args.views; ++v) {
      if (counts(v)) continue;
      std::memset(static_cast<void*>(static_cast<T*>(grad_tokens) + v * size), 0,
                  static_cast<size_t>(size) * sizeof(T));
    }
  });
}

}  // namespace srt
