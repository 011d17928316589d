// What a call takes before its kernels run: the views sorted, the tables of the axes, the sizes of
// tasks and of their scratch. For ensemble and its backward.
#pragma once
#if defined(__linux__)
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../axis.h"
#include "../ensemble.h"
#include "dispatch.h"
#include "workspace.h"

namespace srt::cpu {

// For the sums of a task: what stays in the second-level cache beside the tokens and the output.
inline int64_t sums_bytes() {
  static const int64_t bytes = [] {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    const int64_t cache = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (cache > 0) return cache / 4 * 3;
#endif
    return int64_t{768 * 1024};
  }();
  return bytes;
}

// Of the channels of a cell, read or written in one piece: pieces of a few cache lines, a whole
// cell apart, cost more than what taller tiles save.
constexpr int64_t kPieceBytes = 1024;

// What it costs to load a vector in multiply-adds: of tokens, and of sums in the cache.
constexpr int64_t kLoadTokens = 6, kLoadSums = 1;

// Owns the table of one axis for its distinct offsets.
template <class Acc>
struct AxisTableStorage {
  std::vector<int32_t> first, taps;
  std::vector<Acc> weight;
  std::vector<double> count;

  // `divide`: the weights by the counted pixels of their cell.
  AxisTable<Acc> fill(const Axis& axis, const std::vector<double>& offsets, bool divide) {
    const int64_t cells = axis.cells();
    const size_t slots = offsets.size() * static_cast<size_t>(cells);
    first.resize(slots);
    taps.resize(slots);
    weight.resize(slots * static_cast<size_t>(axis.max_taps()));
    count.resize(slots);
    const AxisTable<Acc> table{first.data(), taps.data(), weight.data(),
                               count.data(), cells,       axis.max_taps()};
    for (size_t d = 0; d < offsets.size(); ++d)
      for (int64_t cell = 0; cell < cells; ++cell)
        fill_axis_cell(axis, offsets[d], static_cast<int64_t>(d), cell, table);
    for (size_t slot = 0; divide && slot < slots; ++slot) {
      Acc* const cell = table.weight + static_cast<int64_t>(slot) * table.max_taps;
      for (int32_t k = 0; k < taps[slot]; ++k) cell[k] /= static_cast<Acc>(count[slot]);
    }
    return table;
  }

  // For each cell, the first one after it that differs in some view.
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

// The distinct values, ascending: a grid of n x n views needs n tables an axis, not n * n.
inline std::vector<double> distinct(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  values.erase(std::unique(values.begin(), values.end()), values.end());
  return values;
}

inline int64_t position(const std::vector<double>& sorted, double value) {
  return std::lower_bound(sorted.begin(), sorted.end(), value) - sorted.begin();
}

// Sorts the views and fills the tables of a plan; owns what it points to.
template <class Acc>
struct Views {
  std::vector<double> dy, dx;
  std::vector<typename ViewsPlan<Acc>::View> views;
  std::vector<int64_t> group_begin;
  AxisTableStorage<Acc> y, x;

  // `divide`: the weights of the tables by the counted pixels.
  Views(const EnsembleArgs& args, bool divide, ViewsPlan<Acc>& plan) {
    // Only ratios of weights matter: scaled to at most 1, their sums overflow in no type.
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
    plan.tokens = args.tokens;
    std::copy_n(args.token_strides, 3, plan.token_strides);
    plan.batch = args.batch;
    plan.channels = args.channels;
    plan.rows = axis_y.cells();
    plan.columns = axis_x.cells();
    plan.tokens_x = args.grid[1];
    plan.y = y.fill(axis_y, dy, divide);
    plan.x = x.fill(axis_x, dx, divide);
    plan.groups = static_cast<int64_t>(dx.size());
    plan.group_begin = group_begin.data();
    plan.views = views.data();
    plan.view_count = static_cast<int64_t>(views.size());
    plan.out = args.out;
    std::copy_n(args.out_strides, 4, plan.out_strides);
    plan.seen = args.seen;
    plan.scale = args.seen ? scale : 1;
  }

  int64_t largest_group() const {
    int64_t largest = 0;
    for (size_t g = 0; g < dx.size(); ++g)
      largest = std::max(largest, group_begin[g + 1] - group_begin[g]);
    return largest;
  }
};

// Channels, in whole blocks, of which `bytes` each fit the cache.
inline int64_t fitting_channels(int64_t channels, int64_t block, int64_t bytes) {
  const int64_t blocks = div_up(channels, block);
  const int64_t fit = std::clamp<int64_t>(sums_bytes() / (bytes * block), 1, blocks);
  return div_up(blocks, div_up(blocks, fit)) * block;  // parts of equal size
}

// Byte offsets of arrays that follow each other.
struct Layout {
  int64_t bytes = 0;
  template <class T>
  int64_t place(int64_t n) {
    const int64_t begin = bytes;
    bytes += align_up(n * static_cast<int64_t>(sizeof(T)));
    return begin;
  }
};

// Multiply-adds in all; below about a hundred microseconds of them a second thread costs more than
// it brings.
inline int64_t workers_for(double work, const Parallel& parallel) {
  return work < 2e6 ? 1 : parallel.threads;
}

// The scratch of a ValuePlan whose sizes are set.
template <class Acc>
void place_values(ValuePlan<Acc>& plan, Layout& layout, int64_t block_bytes) {
  const int64_t counted = plan.view_count;
  plan.scratch.sums = layout.place<Acc>(counted * plan.tokens_x * plan.chunk);
  plan.scratch.row_at = layout.place<int64_t>(plan.y.max_taps);
  plan.scratch.row_weights = layout.place<Acc>(plan.y.max_taps);
  plan.scratch.row_of = layout.place<int64_t>(counted);
  plan.scratch.values = layout.place<ViewValue<Acc>>(counted);
  plan.scratch.weights = layout.place<double>(counted);
  plan.scratch.shares = layout.place<Acc>(counted);
  plan.scratch.steps = layout.place<WindowStep<Acc>>(counted);
  plan.scratch.buffer =
      layout.place<char>(std::max<int64_t>(counted, kLargestNetwork) * block_bytes);
}

// The weight that each cell gets: [H', W'], in units of plan.scale; with `count_views` the number
// of views.
template <class Acc>
std::vector<double> cell_weights(const ViewsPlan<Acc>& plan, bool count_views) {
  const auto part = [&](double pixels) { return count_views && pixels > 0 ? 1.0 : pixels; };
  std::vector<double> total(static_cast<size_t>(plan.rows * plan.columns));
  for (int64_t y = 0; y < plan.rows; ++y) {
    double* const row = total.data() + y * plan.columns;
    for (int64_t g = 0; g < plan.groups; ++g) {
      double weight = 0;
      for (int64_t i = plan.group_begin[g]; i < plan.group_begin[g + 1]; ++i)
        weight += static_cast<double>(plan.views[i].weight) *
                  part(plan.y.count[plan.views[i].dy * plan.rows + y]);
      for (int64_t x = 0; x < plan.columns; ++x)
        row[x] += plan.scale * weight * part(plan.x.count[g * plan.columns + x]);
    }
  }
  return total;
}

}  // namespace srt::cpu
