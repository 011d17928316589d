// Setup that ensemble and its gradient share: sorts the views by dx, builds the axis tables of
// their distinct offsets and tiles of them, and owns the memory.
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "../axis.h"
#include "../ensemble.h"
#include "plan.h"
#include "workspace.h"

namespace srt::cpu {

// The channels of a cell are read or written in pieces of at least this many bytes. Pieces of a few
// cache lines, each a whole cell apart, cost more than the taller tiles that they allow would save.
constexpr int64_t kPieceBytes = 1024;

// The cost of loading a vector, in multiply-adds: of tokens from memory, and of sums in the cache.
constexpr int64_t kLoadTokens = 4, kLoadSums = 1;

// Owns the table of one axis for its distinct offsets.
template <class Acc>
struct AxisTableStorage {
  std::vector<int64_t> start, token;  // [offsets] and [offsets, places]
  std::vector<int32_t> first, taps;
  std::vector<Acc> weight;
  std::vector<double> count;

  // Builds the table. With `divide`, the weights are divided by the counted pixels of their cell.
  AxisTable<Acc> fill(const Axis& axis, const std::vector<double>& offsets, bool divide) {
    const int64_t cells = axis.cells();
    const size_t slots = offsets.size() * static_cast<size_t>(cells);
    first.resize(slots);
    taps.resize(slots);
    weight.resize(slots * static_cast<size_t>(axis.max_taps()));
    count.resize(slots);
    const AxisTable<Acc> table{first.data(), taps.data(), weight.data(),
                               count.data(), cells,       axis.max_taps()};
    for (size_t d = 0; d < offsets.size(); ++d) {
      start.push_back(axis.start(offsets[d]));
      for (int64_t place = 0; place < axis.places(); ++place)
        token.push_back(axis.token_at(start.back(), place));
      for (int64_t cell = 0; cell < cells; ++cell)
        fill_axis_cell(axis, offsets[d], static_cast<int64_t>(d), cell, table);
    }
    for (size_t slot = 0; divide && slot < slots; ++slot) {
      Acc* const cell = table.weight + static_cast<int64_t>(slot) * table.max_taps;
      for (int32_t k = 0; k < taps[slot]; ++k) cell[k] /= static_cast<Acc>(count[slot]);
    }
    return table;
  }

  // [cells]: for each cell, the first later cell whose table entries differ in at least one offset.
  std::vector<int32_t> ends(const AxisTable<Acc>& table, int64_t offsets) const {
    std::vector<int32_t> end(static_cast<size_t>(table.cells));
    const auto same = [&](int64_t a, int64_t b) {
      for (int64_t d = 0; d < offsets; ++d) {
        const int64_t i = d * table.cells + a, j = d * table.cells + b;
        const Acc* const weight = table.weight;
        if (table.count[i] != table.count[j] || table.taps[i] != table.taps[j] ||
            (table.taps[i] > 0 && table.first[i] != table.first[j]) ||
            !std::equal(weight + i * table.max_taps, weight + i * table.max_taps + table.taps[i],
                        weight + j * table.max_taps))
          return false;
      }
      return true;
    };
    for (int64_t cell = table.cells; cell-- > 0;) {
      const bool joins = cell + 1 < table.cells && same(cell, cell + 1);
      end[static_cast<size_t>(cell)] =
          joins ? end[static_cast<size_t>(cell) + 1] : static_cast<int32_t>(cell + 1);
    }
    return end;
  }
};

// The distinct values in ascending order: a grid of n x n views needs n tables per axis, not n * n.
inline std::vector<double> distinct(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  values.erase(std::unique(values.begin(), values.end()), values.end());
  return values;
}

inline int64_t position(const std::vector<double>& sorted, double value) {
  return std::lower_bound(sorted.begin(), sorted.end(), value) - sorted.begin();
}

// Sorts the views and builds the tables of a plan; owns the memory that the plan points to.
template <class Acc>
struct Views {
  std::vector<double> dy, dx;
  std::vector<typename ViewsPlan<Acc>::View> views;
  std::vector<int64_t> group_begin;
  AxisTableStorage<Acc> y, x;

  // With `divide`, the weights of the tables are divided by the counted pixels of their cell.
  Views(const EnsembleArgs& args, bool divide, ViewsPlan<Acc>& plan) {
    // Only ratios of weights matter. Scaled to at most 1, their sums cannot overflow in any type.
    double scale = 1;
    if (args.weights) scale = *std::max_element(args.weights, args.weights + args.views);
    std::vector<int64_t> counted;
    for (int64_t v = 0; v < args.views; ++v) {
      if (args.weights && args.weights[v] == 0) continue;
      counted.push_back(v);
      dy.push_back(args.offsets[2 * v]);
      dx.push_back(args.offsets[2 * v + 1]);
    }
    dy = distinct(dy);
    dx = distinct(dx);
    std::stable_sort(counted.begin(), counted.end(), [&](int64_t a, int64_t b) {
      return args.offsets[2 * a + 1] < args.offsets[2 * b + 1];
    });
    group_begin.assign(dx.size() + 1, 0);
    for (const int64_t v : counted) {
      const int64_t group = position(dx, args.offsets[2 * v + 1]);
      views.push_back({v, position(dy, args.offsets[2 * v]), group,
                       static_cast<Acc>(args.weights ? args.weights[v] / scale : 1)});
      ++group_begin[static_cast<size_t>(group) + 1];
    }
    for (size_t g = 0; g < dx.size(); ++g) group_begin[g + 1] += group_begin[g];

    const Axis axis_y{args.grid[0], args.patch[0], args.stride[0], args.upsample, args.border};
    const Axis axis_x{args.grid[1], args.patch[1], args.stride[1], args.upsample, args.border};
    static_cast<EnsembleArgs&>(plan) = args;
    plan.height = axis_y.cells();
    plan.width = axis_x.cells();
    plan.tokens_y = args.grid[0];
    plan.tokens_x = args.grid[1];
    plan.places_y = axis_y.places();
    plan.places_x = axis_x.places();
    plan.y = y.fill(axis_y, dy, divide);
    plan.x = x.fill(axis_x, dx, divide);
    plan.token_y = y.token.data();
    plan.token_x = x.token.data();
    plan.offsets_y = static_cast<int64_t>(dy.size());
    plan.groups = static_cast<int64_t>(dx.size());
    plan.group_begin = group_begin.data();
    plan.counted_views = views.data();
    plan.counted = static_cast<int64_t>(views.size());
    plan.scale = args.total_weight ? scale : 1;
  }

  int64_t largest_group() const {
    int64_t largest = 0;
    for (size_t g = 0; g < dx.size(); ++g)
      largest = std::max(largest, group_begin[g + 1] - group_begin[g]);
    return largest;
  }
};

// The range [first, end) of inputs that slots [slot, slot_end) of a table read. Not every input in
// the range need be read.
template <class Table>
std::pair<int64_t, int64_t> inputs_of(const Table& table, int64_t slot, int64_t slot_end) {
  int64_t first = INT32_MAX, end = 0;
  for (; slot < slot_end; ++slot) {
    if (table.taps[slot] == 0) continue;
    first = std::min<int64_t>(first, table.first[slot]);
    end = std::max<int64_t>(end, table.first[slot] + table.taps[slot]);
  }
  return {std::min(first, end), end};
}

// The same for up to `tile` outputs of a row, starting at `output`.
template <class Table>
std::pair<int64_t, int64_t> inputs_of_tile(const Table& table, int64_t row, int64_t output,
                                           int64_t tile) {
  const int64_t slot = row * table.cells;
  return inputs_of(table, slot + output, slot + std::min(output + tile, table.cells));
}

// Builds and owns a TileTable: call add() with the inputs of a tile, then close() to end the tile.
// A Table is an AxisTable (outputs are cells, inputs are places) or a TransposedTable.
template <class Acc>
struct TileStorage {
  std::vector<int64_t> begin{0}, input;
  std::vector<Acc> weight;

  // Adds the inputs that `tile` outputs of a row read with a nonzero weight. at(i) returns the
  // position of input i.
  template <class Table, class Position>
  void add(const Table& table, int64_t row, int64_t output, int64_t tile, Position&& at) {
    const auto [first, end] = inputs_of_tile(table, row, output, tile);
    for (int64_t i = first; i < end; ++i) {
      bool any = false;
      for (int64_t k = 0; k < tile; ++k) {
        weight.push_back(output + k < table.cells ? table.weight_of(row, output + k, i) : 0);
        any = any || weight.back() != 0;
      }
      if (any) {
        input.push_back(at(i));
      } else {
        weight.resize(weight.size() - static_cast<size_t>(tile));
      }
    }
  }
  void close() { begin.push_back(static_cast<int64_t>(input.size())); }

  // Adds a set of tiles for each row of a table. at(row, i) returns the position of input i.
  template <class Table, class Position>
  void add_rows(const Table& table, int64_t rows, int64_t tile, Position&& at) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t output = 0; output < table.cells; output += tile) {
        add(table, row, output, tile, [&](int64_t i) { return at(row, i); });
        close();
      }
    }
  }

  TileTable<Acc> table(int64_t tile, int64_t outputs) const {
    return {tile, div_up(outputs, tile), begin.data(), input.data(), weight.data()};
  }
  // The largest number of inputs of a tile.
  int64_t largest() const {
    int64_t most = 0;
    for (size_t i = 1; i < begin.size(); ++i) most = std::max(most, begin[i] - begin[i - 1]);
    return most;
  }
};

// Returns the outputs per tile, a power of two of at most `largest`, that need the least work over
// the rows of a table. `load` is the cost of loading a vector, in multiply-adds. uses(output, tile)
// returns how often the tile that starts at `output` is used.
template <class Table, class Uses>
int64_t choose_tile(const Table& table, int64_t rows, int64_t largest, int64_t load, Uses&& uses) {
  int64_t best = 1, least = INT64_MAX;
  for (int64_t tile = 1; tile <= largest && tile < 2 * table.cells; tile *= 2) {
    int64_t work = 0;
    for (int64_t output = 0; output < table.cells; output += tile) {
      int64_t inputs = 0;
      for (int64_t row = 0; row < rows; ++row) {
        const auto [first, end] = inputs_of_tile(table, row, output, tile);
        inputs += end - first;
      }
      work += inputs * (tile + load) * uses(output, tile);
    }
    if (work >= least) continue;
    least = work;
    best = tile;
  }
  return best;
}
inline int64_t once(int64_t, int64_t) { return 1; }

// Halves the chunk of channels until there are at least four tasks per thread, or one block per
// chunk.
template <class Count>
void split_channels(int64_t block, int64_t threads, int64_t& chunk, Count&& count_tasks) {
  while (chunk > block && count_tasks() < 4 * threads) chunk = div_up(chunk / block, 2) * block;
}

// The total weight of each cell, [H', W'], or with `counts_views` its number of views.
template <class Acc>
std::vector<double> cell_weights(const ViewsPlan<Acc>& plan, bool counts_views) {
  std::vector<double> total(static_cast<size_t>(plan.height * plan.width));
  for (int64_t y = 0; y < plan.height; ++y)
    sum_weights(plan, y, 0, plan.width, counts_views, total.data() + y * plan.width);
  for (double& weight : total) weight *= counts_views ? 1 : plan.scale;
  return total;
}

// The two reductions of ensemble_cpu (mean.cpp and per_view.cpp). Batch and channels must not be 0.
void run_mean(const EnsembleArgs& args, const Parallel& parallel);
void run_per_view(const EnsembleArgs& args, const Parallel& parallel);

}  // namespace srt::cpu
