// The tables of the gradients of ensemble: what each view reads along both axes, the cells that
// read a token, and what the weights of a cell are divided by. They are made on the device,
// wherever the offsets and the weights lie.
#pragma once
#include "../axis.h"
#include "../ensemble.h"
#include "views.cuh"

namespace srt::cuda {

// Views are handled in entries, which share a dx, and entries in parts: so many at a time. The
// views of a grid of 7 x 7 offsets are one part.
constexpr int kEntries = 7;

// The cells that read a token in a part, and cells between them; none if `end` is 0.
struct Window {
  int32_t begin, end;
};

template <class Acc>
struct AdjointAxis {
  Axis axis;
  AxisTable<Acc> table;  // of the views, in their order
  Window* window;        // [parts, tokens]
};

template <class Acc>
struct Adjoint {
  int64_t views;
  int64_t slots;      // views of an entry, at most
  int64_t parts;      // at most
  View* sorted;       // [V] by dx
  int32_t* begin;     // [V + 1], of each entry among the views; V behind the last one
  int32_t* entry_of;  // [V]
  int32_t* entries;
  AdjointAxis<Acc> y, x;
  Acc* inverse;  // [H', W'] 1 / total weight, 0 where no view counts
};

template <class Acc>
__device__ Acc weight_of(const AxisTable<Acc>& table, int64_t slot, int64_t token) {
  const int64_t tap = token - table.first[slot];
  return tap >= 0 && tap < table.taps[slot] ? table.weight[slot * table.max_taps + tap] : 0;
}

// Empty windows, by all blocks; entries, by the first one.
template <class Acc>
__global__ void __launch_bounds__(kThreads)
    list_entries(const __grid_constant__ Adjoint<Acc> plan) {
  __shared__ int32_t begins[kThreads];
  const int64_t windows = plan.parts * (plan.y.axis.tokens + plan.x.axis.tokens);
  SRT_FOR_THREAD(i, windows) plan.y.window[i] = {INT32_MAX, 0};  // those of x lie behind
  if (blockIdx.x != 0) return;
  const int thread = static_cast<int>(threadIdx.x);
  const auto same = [&](int64_t u, int64_t v) {
    const double a = plan.sorted[u].dx, b = plan.sorted[v].dx;
    return a == b || (isnan(a) && isnan(b));  // NaN: views that cover nothing
  };
  int32_t total = 0;
  for (int64_t from = 0; from < plan.views; from += kThreads) {
    const int64_t v = from + thread;
    bool begin = false;
    if (v < plan.views) {
      int64_t leader = v;
      while (leader > 0 && same(leader - 1, v)) --leader;
      begin = (v - leader) % plan.slots == 0;
    }
    begins[thread] = begin;
    __syncthreads();
    int32_t place = total;
    for (int i = 0; i < kThreads; ++i) {
      if (i < thread) place += begins[i];
      total += begins[i];
    }
    if (begin) plan.begin[place] = static_cast<int32_t>(v);
    if (v < plan.views) plan.entry_of[v] = begin ? place : place - 1;
    __syncthreads();
  }
  if (thread == 0) {
    plan.begin[total] = static_cast<int32_t>(plan.views);
    *plan.entries = total;
  }
}

template <class Acc>
__global__ void __launch_bounds__(kThreads)
    fill_adjoint(const __grid_constant__ Adjoint<Acc> plan) {
  const int64_t rows = plan.y.table.cells, cells = plan.x.table.cells;
  SRT_FOR_THREAD(i, plan.views * (rows + cells)) {
    const int64_t v = i / (rows + cells), own = i % (rows + cells);
    const bool vertical = own < rows;
    const AdjointAxis<Acc>& axis = vertical ? plan.y : plan.x;
    const int32_t cell = static_cast<int32_t>(vertical ? own : own - rows);
    fill_axis_cell(axis.axis, vertical ? plan.sorted[v].dy : plan.sorted[v].dx, v, cell,
                   axis.table);
    const int64_t slot = v * axis.table.cells + cell;
    Window* const window = axis.window + plan.entry_of[v] / kEntries * axis.axis.tokens;
    for (int32_t k = 0; k < axis.table.taps[slot]; ++k) {
      if (axis.table.weight[slot * axis.table.max_taps + k] == 0) continue;
      Window& own_window = window[axis.table.first[slot] + k];
      atomicMin(&own_window.begin, cell);
      atomicMax(&own_window.end, cell + 1);
    }
  }
}

// Rows of a thread: each count of a column is read once for them.
constexpr int kRowsOfInverse = 8;

template <class Acc>
__global__ void __launch_bounds__(kThreads)
    fill_inverse_of_cells(const __grid_constant__ Adjoint<Acc> plan) {
  const int64_t rows = plan.y.table.cells, cells = plan.x.table.cells;
  SRT_FOR_THREAD(i, div_up(rows, kRowsOfInverse) * cells) {
    const int64_t x = i % cells, y = i / cells * kRowsOfInverse;
    double total[kRowsOfInverse] = {};
    for (int64_t v = 0; v < plan.views; ++v) {
      // As it stands in the sums, in their type.
      const double weight = static_cast<double>(static_cast<Acc>(plan.sorted[v].weight));
      const double count = weight * plan.x.table.count[v * cells + x];
#pragma unroll
      for (int r = 0; r < kRowsOfInverse; ++r)
        if (y + r < rows) total[r] += count * plan.y.table.count[v * rows + y + r];
    }
#pragma unroll
    for (int r = 0; r < kRowsOfInverse; ++r)
      if (y + r < rows)
        plan.inverse[(y + r) * cells + x] = total[r] > 0 ? static_cast<Acc>(1 / total[r]) : 0;
  }
}

// ---- on the host --------------------------------------------------------------------------------

template <class Acc>
Adjoint<Acc> make_adjoint(const EnsembleArgs& args, int64_t slots, Workspace& workspace) {
  Adjoint<Acc> plan{};
  plan.views = args.views;
  plan.slots = slots;
  plan.parts = div_up(args.views, kEntries);
  plan.sorted = workspace.take<View>(args.views);
  plan.begin = workspace.take<int32_t>(args.views + 1);
  plan.entry_of = workspace.take<int32_t>(args.views);
  plan.entries = workspace.take<int32_t>(1);
  AdjointAxis<Acc>* const axes[2] = {&plan.y, &plan.x};
  for (int i = 0; i < 2; ++i) {
    axes[i]->axis = {args.grid[i], args.patch[i], args.stride[i], args.upsample, args.border};
    AxisTable<Acc>& table = axes[i]->table;
    table.cells = axes[i]->axis.cells();
    table.max_taps = axes[i]->axis.max_taps();
    table.first = workspace.take<int32_t>(args.views * table.cells);
    table.taps = workspace.take<int32_t>(args.views * table.cells);
    table.weight = workspace.take<Acc>(args.views * table.cells * table.max_taps);
    table.count = workspace.take<double>(args.views * table.cells);
  }
  plan.y.window = workspace.take<Window>(plan.parts * (args.grid[0] + args.grid[1]));
  plan.x.window = plan.y.window + plan.parts * args.grid[0];
  plan.inverse = workspace.take<Acc>(plan.y.table.cells * plan.x.table.cells);
  return plan;
}

template <class Acc>
void fill_tables_of(const char* op, const Adjoint<Acc>& plan, const RawViews& raw,
                    const InlineNumbers& numbers, CUstream_st* stream) {
  const int64_t rows = plan.y.table.cells, cells = plan.x.table.cells;
  const int64_t windows = plan.parts * (plan.y.axis.tokens + plan.x.axis.tokens);
  launch(op, sort_views, div_up(plan.views, kThreads), stream, raw, numbers, plan.sorted, nullptr,
         nullptr, int64_t{0});
  launch(op, list_entries<Acc>, div_up(windows, kThreads), stream, plan);
  launch(op, fill_adjoint<Acc>, div_up(plan.views * (rows + cells), kThreads), stream, plan);
  launch(op, fill_inverse_of_cells<Acc>, div_up(div_up(rows, kRowsOfInverse) * cells, kThreads),
         stream, plan);
}

// per_view_backward.cu: of a median and of moments. With no workspace: tells how large it must be.
int64_t values_backward(const char* op, const EnsembleArgs& args, const ViewNumbers& offsets,
                        const ViewNumbers& weights, void* grad_tokens, void* workspace,
                        CUstream_st* stream);

}  // namespace srt::cuda
