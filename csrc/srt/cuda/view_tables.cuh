// The axis tables of every view, made on the device, wherever the offsets and the weights lie.
#pragma once
#include "../axis.h"
#include "common.cuh"

namespace srt::cuda {

template <class Acc>
struct ViewAxis {
  Axis axis;
  AxisTable<Acc> table;  // [V, cells]

  ViewAxis() = default;
  ViewAxis(const Axis& axis, int64_t views, Workspace& workspace) : axis(axis) {
    table.cells = axis.cells();
    table.max_taps = axis.max_taps();
    table.first = workspace.take<int32_t>(views * table.cells);
    table.taps = workspace.take<int32_t>(views * table.cells);
    table.weight = workspace.take<Acc>(views * table.cells * table.max_taps);
    table.count = workspace.take<double>(views * table.cells);
  }
};

template <class Acc>
struct ViewTables {
  int64_t views;
  View* sorted;  // [V] by dx, as sort_views makes it; both tables are in this order
  ViewAxis<Acc> y, x;

  ViewTables() = default;
  ViewTables(const Call& call, Workspace& workspace)
      : views(call.args.views),
        sorted(workspace.take<View>(views)),
        y(call.axis(0), views, workspace),
        x(call.axis(1), views, workspace) {}

  SRT_HD int64_t cells() const { return y.table.cells + x.table.cells; }  // of both axes

  // The sum of w c_y c_x over the views: what a cell is divided by. `counts_views`: how many count.
  __device__ double total_weight(int64_t cell_y, int64_t cell_x, bool counts_views) const {
    double total = 0;
    for (int64_t v = 0; v < views; ++v) {
      const double count =
          y.table.count[v * y.table.cells + cell_y] * x.table.count[v * x.table.cells + cell_x];
      total += counts_views ? (count > 0 ? 1 : 0) : sorted[v].weight * count;
    }
    return total;
  }
};

template <class Acc>
static __global__ void __launch_bounds__(kThreads)
    fill_view_tables(const __grid_constant__ ViewTables<Acc> tables) {
  const int64_t rows = tables.y.table.cells;
  SRT_FOR_THREAD(i, tables.views * tables.cells()) {
    const int64_t v = i / tables.cells(), cell = i % tables.cells();
    if (cell < rows) {
      fill_axis_cell(tables.y.axis, tables.sorted[v].dy, v, cell, tables.y.table);
    } else {
      fill_axis_cell(tables.x.axis, tables.sorted[v].dx, v, cell - rows, tables.x.table);
    }
  }
}

}  // namespace srt::cuda
