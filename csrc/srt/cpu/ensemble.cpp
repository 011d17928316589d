#include "../ensemble.h"

#include <algorithm>
#include <vector>

#include "../axis.h"
#include "../window.h"
#include "kernels.h"
#include "scratch.h"

namespace srt {
namespace {

// For the sums of a task: about half of a second-level cache.
constexpr int64_t kSumsBytes = 512 * 1024;

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
std::vector<double> distinct(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  values.erase(std::unique(values.begin(), values.end()), values.end());
  return values;
}

int64_t position(const std::vector<double>& sorted, double value) {
  return std::lower_bound(sorted.begin(), sorted.end(), value) - sorted.begin();
}

// Sorts the views and fills the tables of a plan; owns what it points to.
template <class Acc>
struct Views {
  std::vector<double> dy, dx;
  std::vector<typename cpu::ViewsPlan<Acc>::View> views;
  std::vector<int64_t> group_begin;
  AxisTableStorage<Acc> y, x;

  // `divide`: the weights of the tables by the counted pixels.
  Views(const EnsembleArgs& args, bool divide, cpu::ViewsPlan<Acc>& plan) {
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

// A task reads the same token rows for all the output rows of a band, which is as tall as a token,
// and writes whole cells one after the other, as long as its sums fit the cache. Where that leaves
// a thread without work, bands get lower, then chunks of channels narrower. `block_sums`: bytes of
// the sums of one block of channels. Returns the number of tasks.
template <class Acc>
int64_t split(const EnsembleArgs& args, int64_t block_bytes, int64_t block_sums, int64_t threads,
              cpu::ViewsPlan<Acc>& plan) {
  const int64_t block = block_bytes / static_cast<int64_t>(sizeof(Acc));
  const int64_t blocks = (args.channels + block - 1) / block;
  int64_t chunk_blocks = std::clamp<int64_t>(kSumsBytes / block_sums, 1, blocks);
  plan.band = std::max<int64_t>(1, args.patch[0] / args.stride[0]);
  const auto count_tasks = [&] {
    const auto parts = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
    return plan.batch * parts(plan.rows, plan.band) * parts(blocks, chunk_blocks);
  };
  while (plan.band > 1 && count_tasks() < 4 * threads) plan.band /= 2;
  while (chunk_blocks > 1 && count_tasks() < 4 * threads) chunk_blocks /= 2;
  plan.chunk = chunk_blocks * block;
  return count_tasks();
}

// Byte offsets of arrays that follow each other.
struct Layout {
  int64_t bytes = 0;
  template <class T>
  int64_t place(int64_t n) {
    const int64_t begin = bytes;
    bytes += cpu::align_up(n * static_cast<int64_t>(sizeof(T)));
    return begin;
  }
};

// Multiply-adds in all; below about a hundred microseconds of them a second thread costs more than
// it brings.
int64_t workers_for(double work, const Parallel& parallel) {
  return work < 2e6 ? 1 : parallel.threads;
}

template <class Acc>
void mean(const EnsembleArgs& args, const cpu::EnsembleKernels<Acc>& kernels, int64_t block_bytes,
          const Parallel& parallel) {
  cpu::MeanPlan<Acc> plan{};
  const Views<Acc> views(args, /*divide=*/false, plan);
  // At least one group: with all weights 0 there is none.
  const int64_t block_sums = std::max<int64_t>(1, plan.groups) * plan.tokens_x * block_bytes;
  const int64_t tasks = split(args, block_bytes, block_sums, parallel.threads, plan);
  Layout layout;
  plan.scratch.sums = layout.place<Acc>(plan.groups * plan.tokens_x * plan.chunk);
  plan.scratch.rows = layout.place<cpu::TokenRow<Acc>>(views.largest_group() * plan.y.max_taps);
  plan.scratch.filters = layout.place<cpu::GroupFilter<Acc>>(plan.groups);
  plan.scratch.count = layout.place<double>(plan.columns);
  plan.scratch.inverse = layout.place<Acc>(plan.columns);
  plan.scratch.keep = layout.place<Acc>(args.seen ? plan.columns : 0);
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
  const int64_t block_sums = std::max<int64_t>(1, counted) * plan.tokens_x * block_bytes;
  const int64_t tasks = split(args, block_bytes, block_sums, parallel.threads, plan);
  Layout layout;
  plan.scratch.sums = layout.place<Acc>(counted * plan.tokens_x * plan.chunk);
  plan.scratch.rows = layout.place<cpu::TokenRow<Acc>>(plan.y.max_taps);
  plan.scratch.row_of = layout.place<int64_t>(counted);
  plan.scratch.values = layout.place<cpu::ViewValue<Acc>>(counted);
  plan.scratch.weights = layout.place<double>(counted);
  plan.scratch.shares = layout.place<Acc>(counted);
  plan.scratch.steps = layout.place<WindowStep<Acc>>(counted);
  plan.scratch.buffer =
      layout.place<char>(std::max<int64_t>(counted, kLargestNetwork) * block_bytes);
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
  const bool count_views = args.reduce == Reduce::median;
  const auto part = [&](double pixels) { return count_views && pixels > 0 ? 1.0 : pixels; };
  std::vector<double> added(static_cast<size_t>(plan.rows * plan.columns));
  for (int64_t y = 0; y < plan.rows; ++y) {
    double* const row = added.data() + y * plan.columns;
    for (int64_t g = 0; g < plan.groups; ++g) {
      double weight = 0;
      for (int64_t i = plan.group_begin[g]; i < plan.group_begin[g + 1]; ++i)
        weight += plan.views[i].weight * part(plan.y.count[plan.views[i].dy * plan.rows + y]);
      for (int64_t x = 0; x < plan.columns; ++x)
        row[x] += plan.scale * weight * part(plan.x.count[g * plan.columns + x]);
    }
  }
  return added;
}

template <class Acc>
void reduce(const EnsembleArgs& args, const cpu::EnsembleKernels<Acc>& kernels, int64_t block_bytes,
            const Parallel& parallel) {
  switch (args.reduce) {
    case Reduce::mean:
      return mean(args, kernels, block_bytes, parallel);
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
  const int64_t block_bytes = kernels.block_bytes;
  std::vector<double> added;
  if (args.seen) added = chunk_weights(args);
  if (args.batch > 0 && args.channels > 0) {
    switch (args.dtype) {
      case DType::f32:
        reduce(args, kernels.ensemble_f32, block_bytes, parallel);
        break;
      case DType::f16:
        reduce(args, kernels.ensemble_f16, block_bytes, parallel);
        break;
      case DType::bf16:
        reduce(args, kernels.ensemble_bf16, block_bytes, parallel);
        break;
      case DType::f64:
        reduce(args, kernels.ensemble_f64, block_bytes, parallel);
        break;
      case DType::u8:
        break;  // tokens are floating
    }
  }
  for (size_t cell = 0; cell < added.size(); ++cell) args.seen[cell] += added[cell];
}

}  // namespace srt
