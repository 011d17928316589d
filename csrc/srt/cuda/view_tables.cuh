// The axis tables of all views of a call and the total weights of cells, computed on the device
// from offsets and weights on the host or the device.
#pragma once
#include "../axis.h"
#include "common.cuh"

namespace srt::cuda {

constexpr int kWeightRows = 8;

// Computes the total weight of cells, by which their sums are divided: the sum of w c_y c_x over
// the views, or with `counts_views` the number of views that count. `total` receives column x of
// kWeightRows rows, starting at y. Called by a whole block; x is -1 for a thread without a column.
// pixels_y(v, row) and pixels_x(v, x) return the number of pixels of view v that count.
template <class PixelsY, class PixelsX>
__device__ void sum_weights(const View* sorted, int64_t views, bool counts_views, int64_t y,
                            int64_t x, PixelsY&& pixels_y, PixelsX&& pixels_x,
                            double (&total)[kWeightRows]) {
  constexpr int kViews = kThreads / kWeightRows;  // staged at a time
  __shared__ double of_rows[kViews][kWeightRows];
  const auto count = [&](double pixels) { return counts_views ? min(pixels, 1.0) : pixels; };
  const int row = static_cast<int>(threadIdx.x) % kWeightRows;
  const int own = static_cast<int>(threadIdx.x) / kWeightRows;
  for (double& sum : total) sum = 0;
  for (int64_t first = 0; first < views; first += kViews) {
    const int64_t view = first + own;
    const double weight = view < views ? sorted[view].weight : 0;
    __syncthreads();
    of_rows[own][row] =
        weight > 0 ? (counts_views ? 1 : weight) * count(pixels_y(view, y + row)) : 0;
    __syncthreads();
    for (int64_t v = 0; x >= 0 && v < min(int64_t{kViews}, views - first); ++v) {
      const double columns = count(pixels_x(first + v, x));
      for (int r = 0; r < kWeightRows; ++r) total[r] += columns * of_rows[v][r];
    }
  }
}

// The tables of one axis for all views.
template <class Acc>
struct ViewAxis {
  Axis axis;
  int32_t* start;        // [V], Axis::start
  AxisTable<Acc> table;  // [V, cells]

  ViewAxis() = default;
  ViewAxis(const Axis& axis, int64_t views, Workspace& workspace) : axis(axis) {
    start = workspace.take<int32_t>(views);
    table.cells = axis.cells();
    table.max_taps = axis.max_taps();
    table.first = workspace.take<int32_t>(views * table.cells);
    table.taps = workspace.take<int32_t>(views * table.cells);
    table.weight = workspace.take<Acc>(views * table.cells * table.max_taps);
    table.count = workspace.take<double>(views * table.cells);
  }

  __device__ int64_t token_at(int64_t v, int64_t place) const {
    return axis.token_at(start[v], place);
  }
  // Fills one cell of view v; does nothing if the cell does not exist.
  __device__ void fill(double offset, int64_t v, int64_t cell) const {
    if (cell < 0 || cell >= table.cells) return;
    if (cell == 0) start[v] = static_cast<int32_t>(axis.start(offset));
    fill_axis_cell(axis, offset, v, cell, table);
  }
};

// The tables of both axes for all views.
template <class Acc>
struct ViewTables {
  int64_t views;
  View* sorted;  // [V], sorted by dx (sort_views); both tables are in this order
  ViewAxis<Acc> y, x;

  ViewTables() = default;
  ViewTables(const Call& call, Workspace& workspace)
      : views(call.args.views),
        sorted(workspace.take<View>(views)),
        y(call.axis(0), views, workspace),
        x(call.axis(1), views, workspace) {}

  SRT_HD int64_t cells() const { return y.table.cells + x.table.cells; }  // of both axes

  // Calls body(number of the cell, its total weight) for all cells, with weight_blocks() blocks.
  SRT_HD int64_t weight_blocks() const {
    return div_up(y.table.cells, kWeightRows) * div_up(x.table.cells, kThreads);
  }
  template <class Body>
  __device__ void visit_weights(bool counts_views, Body&& body) const {
    const int64_t rows = y.table.cells, columns = x.table.cells;
    SRT_FOR_BLOCK(i, weight_blocks()) {
      const int64_t chunks = div_up(columns, kThreads), y0 = i / chunks * kWeightRows;
      const int64_t x0 = i % chunks * kThreads + threadIdx.x;
      const auto pixels_y = [&](int64_t v, int64_t row) {
        return row < rows ? y.table.count[v * rows + row] : 0;
      };
      const auto pixels_x = [&](int64_t v, int64_t column) {
        return x.table.count[v * columns + column];
      };
      double total[kWeightRows];
      sum_weights(sorted, views, counts_views, y0, x0 < columns ? x0 : -1, pixels_y, pixels_x,
                  total);
      for (int r = 0; x0 < columns && r < kWeightRows; ++r)
        if (y0 + r < rows) body((y0 + r) * columns + x0, total[r]);
    }
  }
};

// Fills both tables, one cell of an axis per thread.
template <class Acc>
static __global__ void __launch_bounds__(kThreads)
    fill_view_tables(const __grid_constant__ ViewTables<Acc> tables) {
  const int64_t rows = tables.y.table.cells;
  SRT_FOR_THREAD(i, tables.views * tables.cells()) {
    const int64_t v = i / tables.cells(), cell = i % tables.cells();
    tables.y.fill(tables.sorted[v].dy, v, cell);
    tables.x.fill(tables.sorted[v].dx, v, cell - rows);
  }
}

}  // namespace srt::cuda
