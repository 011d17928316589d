#include "../ensemble.h"

#include <algorithm>
#include <vector>

#include "../axis.h"
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

  AxisTable<Acc> fill(const Axis& axis, const std::vector<double>& offsets) {
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
    return table;
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

template <class Acc>
void mean(const EnsembleArgs& args, cpu::Kernel<cpu::MeanPlan<Acc>> kernel, int64_t block_bytes,
          const Parallel& parallel) {
  using Plan = cpu::MeanPlan<Acc>;
  const Axis axis_y{args.grid[0], args.patch[0], args.stride[0], args.upsample, args.border};
  const Axis axis_x{args.grid[1], args.patch[1], args.stride[1], args.upsample, args.border};

  // Only ratios of weights matter: scaled to at most 1, their sums overflow in no type.
  double scale = 1;
  if (args.weights) scale = *std::max_element(args.weights, args.weights + args.views);
  std::vector<double> all_dy, all_dx;
  std::vector<int64_t> counted;
  for (int64_t v = 0; v < args.views; ++v) {
    if (args.weights && args.weights[v] == 0) continue;
    counted.push_back(v);
    all_dy.push_back(args.offsets[2 * v]);
    all_dx.push_back(args.offsets[2 * v + 1]);
  }
  const std::vector<double> dy = distinct(all_dy), dx = distinct(all_dx);
  std::stable_sort(counted.begin(), counted.end(), [&](int64_t a, int64_t b) {
    return args.offsets[2 * a + 1] < args.offsets[2 * b + 1];
  });
  std::vector<typename Plan::View> views;
  std::vector<int64_t> group_begin(dx.size() + 1, 0);
  for (const int64_t v : counted) {
    views.push_back({v, position(dy, args.offsets[2 * v]),
                     static_cast<Acc>(args.weights ? args.weights[v] / scale : 1)});
    ++group_begin[static_cast<size_t>(position(dx, args.offsets[2 * v + 1])) + 1];
  }
  for (size_t g = 0; g < dx.size(); ++g) group_begin[g + 1] += group_begin[g];

  AxisTableStorage<Acc> storage_y, storage_x;
  Plan plan{};
  plan.tokens = args.tokens;
  std::copy_n(args.token_strides, 3, plan.token_strides);
  plan.batch = args.batch;
  plan.channels = args.channels;
  plan.rows = axis_y.cells();
  plan.columns = axis_x.cells();
  plan.tokens_x = args.grid[1];
  plan.y = storage_y.fill(axis_y, dy);
  plan.x = storage_x.fill(axis_x, dx);
  plan.groups = static_cast<int64_t>(dx.size());
  plan.group_begin = group_begin.data();
  plan.views = views.data();
  plan.out = args.out;
  std::copy_n(args.out_strides, 4, plan.out_strides);

  // A task reads the same token rows for all the output rows of a band, which is as tall as a
  // token, and writes whole cells one after the other, as long as its sums fit the cache. Where
  // that leaves a thread without work, bands get lower, then chunks of channels narrower.
  const int64_t block = block_bytes / static_cast<int64_t>(sizeof(Acc));
  const int64_t blocks = (args.channels + block - 1) / block;
  // At least one group: with all weights 0 there is none.
  const int64_t block_sums = std::max<int64_t>(1, plan.groups) * plan.tokens_x * block_bytes;
  int64_t chunk_blocks = std::clamp<int64_t>(kSumsBytes / block_sums, 1, blocks);
  plan.band = std::max<int64_t>(1, args.patch[0] / args.stride[0]);
  const auto count_tasks = [&] {
    const auto parts = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
    return plan.batch * parts(plan.rows, plan.band) * parts(blocks, chunk_blocks);
  };
  while (plan.band > 1 && count_tasks() < 4 * parallel.threads) plan.band /= 2;
  while (chunk_blocks > 1 && count_tasks() < 4 * parallel.threads) chunk_blocks /= 2;
  plan.chunk = chunk_blocks * block;

  int64_t largest_group = 0;
  for (size_t g = 0; g < dx.size(); ++g)
    largest_group = std::max(largest_group, group_begin[g + 1] - group_begin[g]);
  int64_t at = 0;
  const auto place = [&at](int64_t bytes) {
    const int64_t begin = at;
    at += cpu::align_up(bytes);
    return begin;
  };
  plan.scratch.sums = place(block_sums * chunk_blocks);
  plan.scratch.rows =
      place(largest_group * plan.y.max_taps * static_cast<int64_t>(sizeof(cpu::TokenRow<Acc>)));
  plan.scratch.filters = place(plan.groups * static_cast<int64_t>(sizeof(cpu::GroupFilter<Acc>)));
  plan.scratch.count = place(plan.columns * static_cast<int64_t>(sizeof(double)));
  plan.scratch.inverse = place(plan.columns * static_cast<int64_t>(sizeof(Acc)));
  plan.scratch.bytes = at;

  // Multiply-adds in all; below about a hundred microseconds of them a second thread costs more
  // than it brings.
  const double work =
      static_cast<double>(plan.batch) * static_cast<double>(args.channels * plan.rows) *
      static_cast<double>(plan.groups * plan.columns * plan.x.max_taps +
                          static_cast<int64_t>(views.size()) * plan.tokens_x * plan.y.max_taps);
  const int64_t workers = work < 2e6 ? 1 : parallel.threads;
  cpu::run_tasks(plan, kernel, count_tasks(), workers, plan.scratch.bytes, parallel);
}

}  // namespace

void ensemble_mean_cpu(const EnsembleArgs& args, const Parallel& parallel) {
  if (args.batch == 0 || args.channels == 0) return;
  const cpu::Kernels& kernels = cpu::kernels();
  switch (args.dtype) {
    case DType::f32:
      return mean(args, kernels.mean_f32, kernels.block_bytes, parallel);
    case DType::f16:
      return mean(args, kernels.mean_f16, kernels.block_bytes, parallel);
    case DType::bf16:
      return mean(args, kernels.mean_bf16, kernels.block_bytes, parallel);
    case DType::f64:
      return mean(args, kernels.mean_f64, kernels.block_bytes, parallel);
    case DType::u8:
      break;  // tokens are floating
  }
}

}  // namespace srt
