// The gradients of the median and of the moments on the device. What the kernels of per_view.cu
// find goes into a map, a few channels at a time: for each element which view is the median, or the
// mean. A second kernel gathers: a warp makes one token of 7 views, 32 channels, from the cells
// that read it.
#include <type_traits>

#include "../ensemble.h"
#include "adjoint.cuh"

namespace srt::cuda {
namespace {

// Blocks of one launch of per_view.cu, at least: as many channels as that takes have a map at a
// time.
constexpr int64_t kBlocksOfMap = 4096;

template <class Acc>
struct GatherPlan {
  Adjoint<Acc> tables;
  // Of one image and the channels that have a map, or of several images and all channels.
  const void* tokens;        // [V, batch, h*w, channels]
  int64_t token_strides[3];  // of V, B and h*w, in elements
  const void* grad;          // [batch, channels, H', W'], of the median or the mean
  const void* grad_variance;
  int64_t grad_strides[4];  // in elements
  const void* map;          // [batch, H', W', channels], Acc or uint16_t
  int64_t batch, channels;
  void* out;               // [V, batch, h*w, channels]
  int64_t out_strides[3];  // as token_strides
  bool keep;               // out in L2
};

constexpr int kGatherWarps = kThreads / kWarpThreads;
constexpr int kNear = 3;  // token columns that a cell may read beside its own: before, this, behind

// How a token column takes part in a cell of a row, in one view.
template <class Acc>
struct alignas(kVectorBytes) CellPart {
  Acc gets;           // of the gradient of the view's value
  Acc beside[kNear];  // the same, times what the value gets of the columns near it
};
// How a token row takes part in a row of cells, in one view.
template <class Acc>
struct alignas(kVectorBytes) RowPart {
  int32_t first;  // token row that the cells read
  Acc weight[2];  // of it and the next one
  Acc gets;
};
// What a warp makes. Read from shared memory whenever it is needed: kept in registers all the while
// it would cost the sums theirs.
struct GatherTask {
  int32_t view;         // the first one, of those sorted by dx
  int32_t image, i, j;  // of the token
  int32_t channel;      // the first one
  int32_t channels;     // from there on; 0 beyond the last task
};
// Of cells and rows, whose parts are kept.
template <class Acc>
constexpr int kPartCells = 128 / sizeof(Acc);
template <class Acc>
constexpr int kPartRows = 64 / sizeof(Acc);

// What the token in row i and column j of view v gets of the cells x_begin to x_end of row y, for
// its row's weight of 1: of any number of taps, and with a test of each weight. A call, so that
// what is seldom needed takes no registers from the rest.
template <bool kMoments, class T, class Acc>
__device__ __noinline__ Acc sum_exactly(const GatherPlan<Acc>& plan, int v, int64_t b, int64_t y,
                                        int j, int x_begin, int x_end, int channel) {
  const Adjoint<Acc>& tables = plan.tables;
  const AxisTable<Acc>&rows = tables.y.table, &columns = tables.x.table;
  const int64_t slot_y = v * rows.cells + y;
  const T* const tokens = static_cast<const T*>(plan.tokens) +
                          tables.sorted[v].index * plan.token_strides[0] +
                          b * plan.token_strides[1] + channel;
  Acc sum = 0;
#pragma unroll 1
  for (int x = x_begin; x < x_end; ++x) {
    const int64_t slot_x = v * columns.cells + x;
    const Acc gets = weight_of(columns, slot_x, j);
    if (gets == 0) continue;
    const int64_t at = b * plan.grad_strides[0] + channel * plan.grad_strides[1] +
                       y * plan.grad_strides[2] + x * plan.grad_strides[3];
    const int64_t cell = ((b * rows.cells + y) * columns.cells + x) * plan.channels + channel;
    const Acc grad = to_acc(load(static_cast<const T*>(plan.grad) + at));
    if constexpr (kMoments) {
      Acc value = 0;  // to the last bit as the mean has it
#pragma unroll 1
      for (int k = 0; k < rows.taps[slot_y]; ++k) {
        const Acc weight_y =
            rows.weight[slot_y * rows.max_taps + k] / static_cast<Acc>(rows.count[slot_y]);
        if (weight_y == 0) continue;
#pragma unroll 1
        for (int l = 0; l < columns.taps[slot_x]; ++l) {
          const Acc weight_x = columns.weight[slot_x * columns.max_taps + l] /
                               static_cast<Acc>(columns.count[slot_x]);
          const int64_t token =
              (rows.first[slot_y] + k) * tables.x.axis.tokens + columns.first[slot_x] + l;
          if (weight_x != 0)
            value += weight_y * weight_x * to_acc(load(tokens + token * plan.token_strides[2]));
        }
      }
      const Acc mean = load(static_cast<const Acc*>(plan.map) + cell);
      const Acc of_square = to_acc(load(static_cast<const T*>(plan.grad_variance) + at));
      const Acc inverse = tables.inverse[y * columns.cells + x];
      sum += gets * (inverse * (grad + 2 * of_square * (value - mean)));
    } else {
      const int view = load(static_cast<const uint16_t*>(plan.map) + cell);
      if (view == v) sum += gets / static_cast<Acc>(columns.count[slot_x]) * grad;
    }
  }
  return sum;
}

// kFast: 7 views at a time; of moments, only where a cell is a pixel, which reads at most two
// tokens along each axis.
template <class T, bool kMoments, bool kFast>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2)
    gather_kernel(const __grid_constant__ GatherPlan<typename AccumulatorOf<T>::type> plan) {
  using Acc = typename AccumulatorOf<T>::type;
  constexpr int kCells = kPartCells<Acc>, kRows = kPartRows<Acc>;
  constexpr int kViews = kFast ? kEntries : 1;
  __shared__ CellPart<Acc> cell_parts[kGatherWarps][kCells][kViews];
  __shared__ RowPart<Acc> row_parts[kGatherWarps][kRows][kViews];
  __shared__ GatherTask shared_tasks[kGatherWarps];
  static_assert(sizeof(cell_parts) + sizeof(row_parts) + sizeof(shared_tasks) <= 48 * 1024);
  const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  const Adjoint<Acc>& tables = plan.tables;
  const AxisTable<Acc>&rows = tables.y.table, &columns = tables.x.table;
  const int64_t h = tables.y.axis.tokens, w = tables.x.axis.tokens;
  const int64_t parts = div_up(tables.views, kViews);
  const int64_t groups = div_up(plan.channels, kWarpThreads);
  const int64_t tasks = plan.batch * h * w * groups * parts;
  const GatherTask& own = shared_tasks[warp];
  const auto own_views = [&] { return min(static_cast<int>(tables.views) - own.view, kViews); };
  // A lane beyond the last channel does what that one does, and keeps it to itself.
  const auto channel = [&] { return own.channel + min(lane, own.channels - 1); };

  // Warps that follow each other read the same cells.
  SRT_FOR_BLOCK(block, div_up(tasks, kGatherWarps)) {
    if (lane == 0) {
      int64_t rest = block * kGatherWarps + warp;
      const bool works = rest < tasks;
      const auto next_of = [&](int64_t n) {
        const int64_t place = rest % n;
        rest /= n;
        return static_cast<int32_t>(place);
      };
      GatherTask task{};
      task.view = next_of(parts) * kViews;
      task.channel = next_of(groups) * kWarpThreads;
      task.j = next_of(w);
      task.i = next_of(h);
      task.image = static_cast<int32_t>(rest);
      task.channels = works ? static_cast<int32_t>(plan.channels) - task.channel : 0;
      shared_tasks[warp] = task;
    }
    __syncthreads();
    const auto window_of = [&](const AdjointAxis<Acc>& axis, int token) {
      const int64_t at = own.view / kEntries * axis.axis.tokens + token;
      const Window window = own.channels > 0 ? axis.window[at] : Window{0, 0};
      return window.end > 0 ? window : Window{0, 0};
    };
    const Window y_window = window_of(tables.y, own.i), x_window = window_of(tables.x, own.j);
    Acc total[kViews] = {};

    // A part of the rows in a part of the cells at a time.
    int x0 = x_window.begin, y0 = y_window.begin;
    for (;;) {
      const int x_end = min(x_window.end, x0 + kCells), y_end = min(y_window.end, y0 + kRows);
      if constexpr (kFast) {
        for (int n = lane; n < kCells * kViews; n += kWarpThreads) {
          const int e = n % kViews, x = x0 + n / kViews;
          CellPart<Acc> cell{};
          if (x < x_end && e < own_views()) {
            const int64_t slot = (own.view + e) * columns.cells + x;
            cell.gets = weight_of(columns, slot, own.j);
#pragma unroll
            for (int k = 0; k < kNear; ++k)
              cell.beside[k] = cell.gets * weight_of(columns, slot, own.j - 1 + k);
            // A value is divided by the pixels that count. So is that of the moments, whose share
            // of the cell is in proportion to them.
            if (!kMoments && cell.gets != 0) cell.gets /= static_cast<Acc>(columns.count[slot]);
          }
          cell_parts[warp][n / kViews][e] = cell;
        }
      }
      for (int n = lane; n < kRows * kViews; n += kWarpThreads) {
        const int e = n % kViews, y = y0 + n / kViews;
        RowPart<Acc> row{};
        if (y < y_end && e < own_views()) {
          const int64_t slot = (own.view + e) * rows.cells + y;
          row.first = rows.first[slot];
          row.gets = weight_of(rows, slot, own.i);
#pragma unroll
          for (int k = 0; k < 2; ++k) row.weight[k] = weight_of(rows, slot, row.first + k);
          if (!kMoments && row.gets != 0) row.gets /= static_cast<Acc>(rows.count[slot]);
        }
        row_parts[warp][n / kViews][e] = row;
      }
      __syncthreads();

      for (int y = y0; y < y_end && x0 < x_window.end; ++y) {
        const RowPart<Acc>(&row)[kViews] = row_parts[warp][y - y0];
        bool reads = false;
#pragma unroll
        for (int e = 0; e < kViews; ++e) reads = reads || row[e].gets != 0;
        if (!reads) continue;

        Acc sum[kViews] = {};
        bool finite = false;
        if constexpr (kFast) {
          const T* const grad = static_cast<const T*>(plan.grad);
          int64_t at = own.image * plan.grad_strides[0] + channel() * plan.grad_strides[1] +
                       y * plan.grad_strides[2] + x0 * plan.grad_strides[3];
          const int64_t first_cell = (own.image * rows.cells + y) * columns.cells;
          int64_t cell = (first_cell + x0) * plan.channels + channel();
          // Views of one dx, as on a grid, have the same parts in a row of cells.
          const auto sum_cells = [&](auto distinct) {
            constexpr int kDistinct = decltype(distinct)::value;
            if constexpr (kMoments) {
              // With the weights of a cell, its value is linear in the tokens, and so is the
              // gradient of the value: sums over cells of what does not depend on the tokens.
              // Values are taken relative to some mean, so that little is lost where both are
              // large.
              const T* const grad_variance = static_cast<const T*>(plan.grad_variance);
              const Acc* const mean = static_cast<const Acc*>(plan.map);
              const Acc* const inverse = tables.inverse + y * columns.cells;
              const Acc origin = load(mean + cell + (x_end - x0) / 2 * plan.channels);
              Acc constant[kDistinct] = {}, slope[kDistinct][kNear] = {};
#pragma unroll(kDistinct == 1 ? 4 : 1)
              for (int x = x0; x < x_end; ++x) {
                const Acc scale = load(inverse + x);
                const Acc of_square = 2 * scale * to_acc(load(grad_variance + at));
                const Acc rest =
                    scale * to_acc(load(grad + at)) - of_square * (load(mean + cell) - origin);
#pragma unroll
                for (int e = 0; e < kDistinct; ++e) {
                  const CellPart<Acc> part = cell_parts[warp][x - x0][e];
                  constant[e] += part.gets * rest;
#pragma unroll
                  for (int k = 0; k < kNear; ++k) slope[e][k] += part.beside[k] * of_square;
                }
                at += plan.grad_strides[3];
                cell += plan.channels;
              }
#pragma unroll
              for (int e = 0; e < kViews; ++e) {
                if (row[e].gets == 0) continue;
                const int d = kDistinct == 1 ? 0 : e;
                const T* token = static_cast<const T*>(plan.tokens) +
                                 tables.sorted[own.view + e].index * plan.token_strides[0] +
                                 own.image * plan.token_strides[1] + channel() +
                                 (row[e].first * w + own.j - 1) * plan.token_strides[2];
                sum[e] = constant[d];
#pragma unroll
                for (int k = 0; k < kNear; ++k) {
                  if (own.j - 1 + k >= 0 && own.j - 1 + k < w) {
                    Acc value = row[e].weight[0] * to_acc(load(token));
                    if (row[e].weight[1] != 0)
                      value += row[e].weight[1] * to_acc(load(token + w * plan.token_strides[2]));
                    sum[e] += slope[d][k] * (value - origin);
                  }
                  token += plan.token_strides[2];
                }
              }
            } else {
              const uint16_t* const view = static_cast<const uint16_t*>(plan.map);
#pragma unroll 4
              for (int x = x0; x < x_end; ++x) {
                const int place = load(view + cell) - own.view;
                const Acc value = to_acc(load(grad + at));
#pragma unroll
                for (int e = 0; e < kViews; ++e) {
                  const Acc gets = cell_parts[warp][x - x0][kDistinct == 1 ? 0 : e].gets;
                  if (place == e) sum[e] += gets * value;
                }
                at += plan.grad_strides[3];
                cell += plan.channels;
              }
            }
          };
          if (tables.sorted[own.view].dx == tables.sorted[own.view + own_views() - 1].dx) {
            sum_cells(std::integral_constant<int, 1>{});
          } else {
            sum_cells(std::integral_constant<int, kViews>{});
          }
          // A weight of 0 was multiplied, which is wrong for what is not finite.
          Acc check = 0;
#pragma unroll
          for (int e = 0; e < kViews; ++e) check += sum[e];
          finite = isfinite(check);
        }
        if (!finite) {
#pragma unroll 1
          for (int e = 0; e < own_views(); ++e) {
            if (row[e].gets == 0) continue;
            const Acc exact = sum_exactly<kMoments, T>(plan, own.view + e, own.image, y, own.j, x0,
                                                       x_end, channel());
#pragma unroll
            for (int k = 0; k < kViews; ++k) sum[k] = k == e ? exact : sum[k];
          }
        }
#pragma unroll
        for (int e = 0; e < kViews; ++e) {
          if (row[e].gets != 0) total[e] += row[e].gets * sum[e];
        }
      }

      y0 += kRows;
      if (y0 >= y_window.end) {
        y0 = y_window.begin;
        x0 += kCells;
      }
      if (!__syncthreads_or(x0 < x_window.end)) break;
    }

#pragma unroll
    for (int e = 0; e < kViews; ++e) {
      if (lane >= own.channels || e >= own_views()) continue;
      const View view = tables.sorted[own.view + e];
      if (kMoments) total[e] *= static_cast<Acc>(view.weight);
      T* const out = static_cast<T*>(plan.out) + view.index * plan.out_strides[0] +
                     own.image * plan.out_strides[1] + (own.i * w + own.j) * plan.out_strides[2];
      store(out + own.channel + lane, from_acc<T>(total[e]), plan.keep);
    }
    __syncthreads();  // before the next task is chosen
  }
}

// ---- on the host --------------------------------------------------------------------------------

template <class T>
int64_t gather_values(const char* op, const EnsembleArgs& args, const ViewNumbers& offsets,
                      const ViewNumbers& weights, void* grad_tokens, void* base,
                      CUstream_st* stream) {
  using Acc = typename AccumulatorOf<T>::type;
  const bool moments = args.reduce == Reduce::moments;
  if (!moments && args.views >= kNoView)
    throw Error("srt::" + std::string(op) +
                ": on CUDA the gradient of a median takes at most 65534 views; got " +
                std::to_string(args.views));
  Workspace workspace(base);
  GatherPlan<Acc> plan{};
  plan.tables = make_adjoint<Acc>(args, 1, workspace);
  const int64_t rows = plan.tables.y.table.cells, cells = plan.tables.x.table.cells;
  const int64_t h = args.grid[0], w = args.grid[1];

  // A map of one image and a part of the channels, or of several images.
  const int64_t blocks_of_group = rows * div_up(cells, 16);  // at least: a tile has up to 16 cells
  const int64_t groups = div_up(args.channels, kWarpThreads);
  const int64_t wanted = div_up(kBlocksOfMap, blocks_of_group);
  const int64_t images = std::min(args.batch, std::max<int64_t>(1, wanted / groups));
  const int64_t part =
      images > 1 ? args.channels : std::min(args.channels, std::min(wanted, groups) * kWarpThreads);
  const int64_t map_size = moments ? sizeof(Acc) : sizeof(uint16_t);
  char* const map = workspace.take<char>(images * rows * cells * part * map_size);

  EnsembleArgs forward = args;
  forward.reduce = moments ? Reduce::mean : Reduce::median;
  forward.out = map;
  const auto shape_forward = [&](int64_t batch, int64_t channels) {
    forward.batch = batch;
    forward.channels = channels;
    const int64_t strides[4] = {rows * cells * channels, 1, cells * channels, channels};
    std::copy_n(strides, 4, forward.out_strides);
  };
  shape_forward(images, part);
  char* const inner = workspace.take<char>(
      reduce_values(op, forward, offsets, weights, nullptr, stream, /*for_gradient=*/true));
  InlineNumbers numbers;
  const RawViews raw = raw_views(op, offsets, weights, args.views, workspace, numbers, stream);
  if (!base) return workspace.bytes();

  fill_tables_of(op, plan.tables, raw, numbers, stream);
  std::copy_n(args.token_strides, 3, plan.token_strides);
  std::copy_n(args.out_strides, 4, plan.grad_strides);
  const int64_t out_strides[3] = {args.batch * h * w * args.channels, h * w * args.channels,
                                  args.channels};
  std::copy_n(out_strides, 3, plan.out_strides);
  constexpr int64_t kSize = sizeof(T);
  plan.keep = fits_l2(op, kSize * (field_elements(args) + token_elements(args)),
                      kSize * token_elements(args));
  plan.map = map;
  // With weights one view can be nearly all of its mean: what is summed apart from it would cancel.
  const bool weighted = weights.host || weights.device;
  const bool linear = args.stride[0] == 1 && args.stride[1] == 1 && !weighted;
  const auto kernel = !moments ? gather_kernel<T, false, true>
                      : linear ? gather_kernel<T, true, true>
                               : gather_kernel<T, true, false>;
  const int64_t parts = moments && !linear ? args.views : plan.tables.parts;
  for (int64_t b = 0; b < args.batch; b += images) {
    for (int64_t c = 0; c < args.channels; c += part) {
      plan.batch = std::min(images, args.batch - b);
      plan.channels = std::min(part, args.channels - c);
      shape_forward(plan.batch, plan.channels);
      plan.tokens = static_cast<const T*>(args.tokens) + b * args.token_strides[1] + c;
      forward.tokens = plan.tokens;
      reduce_values(op, forward, offsets, weights, inner, stream, /*for_gradient=*/true);
      const int64_t at = b * args.out_strides[0] + c * args.out_strides[1];
      plan.grad = static_cast<const T*>(args.out) + at;
      plan.grad_variance = moments ? static_cast<const T*>(args.variance) + at : nullptr;
      plan.out = static_cast<T*>(grad_tokens) + b * out_strides[1] + c;
      const int64_t tasks = plan.batch * h * w * div_up(plan.channels, kWarpThreads) * parts;
      launch(op, kernel, div_up(tasks, kGatherWarps), stream, plan);
    }
  }
  return workspace.bytes();
}

}  // namespace

int64_t values_backward(const char* op, const EnsembleArgs& args, const ViewNumbers& offsets,
                        const ViewNumbers& weights, void* grad_tokens, void* workspace,
                        CUstream_st* stream) {
  switch (args.dtype) {
    case DType::f32:
      return gather_values<float>(op, args, offsets, weights, grad_tokens, workspace, stream);
    case DType::f16:
      return gather_values<Half>(op, args, offsets, weights, grad_tokens, workspace, stream);
    case DType::bf16:
      return gather_values<BFloat16>(op, args, offsets, weights, grad_tokens, workspace, stream);
    case DType::f64:
      return gather_values<double>(op, args, offsets, weights, grad_tokens, workspace, stream);
    case DType::u8:
      break;  // tokens are floating
  }
  return 0;
}

}  // namespace srt::cuda
