// Setup that windows and its gradients share: the layout of the scratch of a worker.
#pragma once
#include <algorithm>
#include <cstdint>

#include "plan.h"
#include "workspace.h"

namespace srt::cpu {

inline Layout lay_out(const WindowsArgs& args, WindowsPlan& plan) {
  static_cast<WindowsArgs&>(plan) = args;
  Layout layout;
  for (int axis = 0; axis < 2; ++axis) {
    plan.length[axis] = (args.size[axis] + 2 * kBehind) / kBehind * kBehind;
    layout.place(plan.scratch.axis[axis].pixels, 2 * plan.length[axis]);
    layout.place(plan.scratch.axis[axis].weights, 2 * plan.length[axis]);
  }
  layout.place(plan.scratch.lines, 6 * plan.length[1]);
  layout.place(plan.scratch.tile, WindowsPlan::kTile * WindowsPlan::kTile);
  return layout;
}

// The work of a call: four taps per sample. In double, because the product can overflow int64.
inline double window_work(const WindowsArgs& args) {
  return 4.0 * static_cast<double>(args.batch) * static_cast<double>(args.count) *
         static_cast<double>(args.channels) * static_cast<double>(args.size[0]) *
         static_cast<double>(args.size[1]);
}

}  // namespace srt::cpu
