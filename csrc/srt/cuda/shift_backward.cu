// The gradient of shift on the device: from the gradient of the views [V, B*C, H, W] to the
// gradient of the images [B*C, H, W]. Each image pixel gathers, from every view, the output pixels
// that read it, at its own position and at its copies in the padding. So no atomic operations are
// needed, and the result does not depend on timing. Padding is rare: its positions are only
// computed for tiles that have some.

#include "../shift.h"
#include "common.cuh"

namespace srt::cuda {
namespace {

// A block computes a tile of one plane: a lane processes one column, with a few rows per thread,
// and the warps divide the views among them. The results of the warps are added in shared memory in
// a fixed order.
constexpr int kImageRows = kWarps;
constexpr int kViewsStaged = kThreads / 2;
constexpr int kMostTaps = 4;
constexpr int kImageResident = 3;  // resident blocks per multiprocessor

// The taps of one axis of one view, as in ShiftTaps.
template <class Acc>
struct AxisTaps {
  int32_t first, taps;
  Acc weight[kMostTaps];

  // The output pixels of an axis of n pixels read the positions first .. last(n).
  __device__ int last(int n) const { return first + n + taps - 2; }
};

// Whether a pixel of [low, high] may occur at several of the padded positions [begin, last].
__device__ inline bool repeats(int low, int high, int n, Padding padding, int begin, int last) {
  switch (padding) {
    case Padding::zeros:
      return false;
    case Padding::border:
      return (low == 0 && begin < 0) || (high >= n - 1 && last >= n);
    case Padding::circular:
      return begin <= high - n || last >= low + n;
    case Padding::reflect:
      return begin <= -low || last >= 2 * (n - 1) - high;
  }
  return false;
}

// The smallest position from `begin` on that is congruent to i modulo `period`.
__device__ inline int first_from(int begin, int i, int period) {
  const int rest = (i - begin) % period;
  return begin + (rest < 0 ? rest + period : rest);
}

// Calls visit(position) for each of the positions [begin, last] at which pixel i occurs. They form
// one or two sequences of the same step. No array is used, because it would be in local memory.
template <class Visit>
__device__ void visit_positions(int i, int n, Padding padding, int begin, int last, Visit&& visit) {
  int start = i, end = i, step = 1, sequences = 1;  // its own position only
  if (repeats(i, i, n, padding, begin, last)) {
    if (padding == Padding::border || n == 1) {
      start = i == 0 ? begin : max(begin, i);
      end = i == n - 1 ? last : min(last, i);
    } else {
      step = padding == Padding::circular ? n : 2 * (n - 1);
      start = first_from(begin, i, step);
      end = last;
      if (padding == Padding::reflect && i != 0 && i != n - 1) sequences = 2;
    }
  }
#pragma unroll 1
  for (int s = 0; s < sequences; ++s) {
#pragma unroll 1
    for (int p = s == 0 ? start : first_from(begin, -i, step); p <= end; p += step) visit(p);
  }
}

// Calls visit(value) for each position of column x. value[N] is the gradient that the position
// receives from N output rows, starting at `row`; 0 for rows that do not exist.
template <int N, class T, class Acc, class Visit>
__device__ void each_position(const ShiftPlan& plan, const T* grad, const AxisTaps<Acc>& taps,
                              int x, int row, Visit&& visit) {
  const int height = static_cast<int>(plan.height), width = static_cast<int>(plan.width);
  visit_positions(x, width, plan.padding, taps.first, taps.last(width), [&](int p) {
    Acc value[N] = {};
#pragma unroll 1
    for (int k = 0; k < taps.taps; ++k) {
      const int column = p - taps.first - k;
      if (column < 0 || column >= width) continue;
      const Acc weight = taps.weight[k];
      const T* from = grad + row * plan.width + column;
#pragma unroll
      for (int r = 0; r < N; ++r) {
        if (row + r >= 0 && row + r < height) value[r] += weight * to_acc(load(from));
        from += plan.width;
      }
    }
    visit(value);
  });
}

// Adds the contribution of one view to N pixels of column x, starting at row y, through their own
// row positions (not those in the padding).
template <int kTaps, int N, class T, class Acc>
__device__ void add_own_rows(const ShiftPlan& plan, const T* grad, const AxisTaps<Acc>& taps_y,
                             const AxisTaps<Acc>& taps_x, int y, int x, Acc* share) {
  // Image row y receives output row y - first - k through tap k.
  constexpr int kReads = N + kTaps - 1;
  each_position<kReads>(plan, grad, taps_x, x, y - taps_y.first - (kTaps - 1),
                        [&](const Acc(&value)[kReads]) {
#pragma unroll
                          for (int r = 0; r < N; ++r) {
                            Acc own = 0;
#pragma unroll
                            for (int k = 0; k < kTaps; ++k)
                              own += taps_y.weight[k] * value[r + kTaps - 1 - k];
                            share[r * kWarpThreads] += own;
                          }
                        });
}

// The contribution of one view to the gradient of pixel (y, x) through row positions in the
// padding.
template <class T, class Acc>
__device__ Acc sum_padded_rows(const ShiftPlan& plan, const T* grad, const AxisTaps<Acc>& taps_y,
                               const AxisTaps<Acc>& taps_x, int y, int x) {
  const int height = static_cast<int>(plan.height);
  Acc sum = 0;
  visit_positions(y, height, plan.padding, taps_y.first, taps_y.last(height), [&](int p) {
    if (p == y) return;  // its own position
    Acc position = 0;
#pragma unroll 1
    for (int k = 0; k < taps_y.taps; ++k) {
      Acc row = 0;
      each_position<1>(plan, grad, taps_x, x, p - taps_y.first - k,
                       [&](const Acc(&value)[1]) { row += value[0]; });
      position += taps_y.weight[k] * row;
    }
    sum += position;
  });
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : kImageResident)
    shift_backward_kernel(const __grid_constant__ ShiftPlan plan,
                          const __grid_constant__ InlineArrays inline_offsets) {
  using Acc = typename AccumulatorOf<T>::type;
  __shared__ AxisTaps<Acc> axes[kViewsStaged][2];
  __shared__ Acc shares[kWarps][kImageRows][kWarpThreads];
  const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  const int height = static_cast<int>(plan.height), width = static_cast<int>(plan.width);
  const int64_t tiles_y = div_up(plan.height, kImageRows);
  const int64_t tiles_x = div_up(plan.width, kWarpThreads);
  bool staged = false;  // whether the taps of all views are in shared memory

  SRT_FOR_BLOCK(tile, plan.planes * tiles_y * tiles_x) {
    const int x = static_cast<int>(tile % tiles_x) * kWarpThreads + lane;
    const int y0 = static_cast<int>(tile / tiles_x % tiles_y) * kImageRows;
    const int64_t plane = tile / tiles_x / tiles_y;
    const int y_end = min(y0 + kImageRows, height);
#pragma unroll
    for (int r = 0; r < kImageRows; ++r) shares[warp][r][lane] = 0;
    const int all_views = static_cast<int>(plan.views);
    for (int v0 = 0; v0 < all_views; v0 += kViewsStaged) {
      const int views = min(all_views - v0, kViewsStaged);
      if (!staged) {
        __syncthreads();
        if (static_cast<int>(threadIdx.x) < 2 * views) {
          const ShiftTaps taps =
              plan.taps(inline_offsets, int64_t{2} * v0 + threadIdx.x, plan.interpolation);
          AxisTaps<Acc>& own = axes[threadIdx.x / 2][threadIdx.x % 2];
          own.first = static_cast<int32_t>(taps.first);
          own.taps = taps.taps;
#pragma unroll
          for (int k = 0; k < kMostTaps; ++k) own.weight[k] = static_cast<Acc>(taps.weight[k]);
        }
        __syncthreads();
        staged = plan.views <= kViewsStaged;
      }
      // Calls add(rows, columns, gradient) for the views of this warp.
      const auto each_view = [&](auto&& add) {
#pragma unroll 1
        for (int v = warp; v < views; v += kWarps) {
          if (axes[v][0].taps == 0 || axes[v][1].taps == 0 || x >= width) continue;
          add(axes[v][0], axes[v][1],
              static_cast<const T*>(plan.from) +
                  ((v0 + v) * plan.planes + plane) * (plan.height * plan.width));
        }
      };
      Acc* const share = &shares[warp][0][lane];
      each_view([&](const auto& rows, const auto& columns, const T* grad) {
        if (rows.taps == 1) {
          add_own_rows<1, kImageRows>(plan, grad, rows, columns, y0, x, share);
        } else if (rows.taps == 2) {
          add_own_rows<2, kImageRows>(plan, grad, rows, columns, y0, x, share);
        } else {  // in two halves, because all rows at once need too many registers
          constexpr int kHalf = kImageRows / 2;
#pragma unroll 1
          for (int r = 0; r < kImageRows; r += kHalf)
            add_own_rows<4, kHalf>(plan, grad, rows, columns, y0 + r, x, share + r * kWarpThreads);
        }
      });
      each_view([&](const auto& rows, const auto& columns, const T* grad) {
        if (!repeats(y0, y_end - 1, height, plan.padding, rows.first, rows.last(height))) return;
#pragma unroll 1
        for (int y = y0; y < y_end; ++y)
          share[(y - y0) * kWarpThreads] += sum_padded_rows(plan, grad, rows, columns, y, x);
      });
    }
    __syncthreads();
    if (x < width && y0 + warp < height) {
      Acc total = 0;
#pragma unroll
      for (int k = 0; k < kWarps; ++k) total += shares[k][warp][lane];
      store(static_cast<T*>(plan.out) + (plane * plan.height + y0 + warp) * plan.width + x,
            from_acc<T>(total), /*keep_in_l2=*/true);  // V times smaller than the input
    }
    __syncthreads();  // before the next tile overwrites the sums
  }
}

}  // namespace
}  // namespace srt::cuda

namespace srt {

int64_t shift_backward_cuda_workspace(const ShiftArgs& args) { return shift_cuda_workspace(args); }

void shift_backward_cuda(const ShiftArgs& args, const ViewArray& offsets, void* grad_image,
                         void* workspace, CUstream_st* stream) {
  using namespace cuda;
  const char* const op = "_shift_backward";
  if (args.planes == 0 || args.height == 0 || args.width == 0) return;
  check_views(op, args.views);
  InlineArrays inline_offsets{};
  ShiftPlan plan = make_shift_plan(op, args, offsets, workspace, stream, inline_offsets);
  plan.from = args.out;
  plan.out = grad_image;
  const int64_t tiles =
      args.planes * div_up(args.height, kImageRows) * div_up(args.width, kWarpThreads);
  const int64_t blocks = std::min(tiles, kImageResident * std::max<int64_t>(1, processors(op)));
  dispatch_floating(args.dtype, [&](auto element) {
    launch(op, shift_backward_kernel<decltype(element)>, blocks, stream, plan, inline_offsets);
  });
}

}  // namespace srt
