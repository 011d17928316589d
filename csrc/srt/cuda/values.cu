// The reductions on the device that need the value of every view in a cell: the median, the
// moments, and what a chunk of a stream adds to its state. A warp makes 32 channels of one run of
// cells, a thread one channel: it gathers each view's value straight from the tokens. Small kernels
// make the tables from the offsets, wherever these lie. Nothing ever comes back to the host.
#include <type_traits>

#include "../axis.h"
#include "../window.h"
#include "views.cuh"

namespace srt::cuda {
namespace {

// What one view reads for one cell of an axis.
template <class Acc>
struct alignas(kVectorBytes) Reads {
  int64_t at;     // of the first token, in elements; of a row in `tokens`, then of a token in a row
  double count;   // counted pixels; the view has no value where it is 0
  Acc weight[2];  // of the first two taps, divided by count
  int64_t taps;
};

template <class Acc>
struct ReadsPlan {
  Axis axis;
  int64_t cells, max_taps;
  int64_t step;       // from a tap to the next, in elements
  uint8_t* breaks;    // [cells], 1 where a cell differs from the one before it
  Reads<Acc>* reads;  // [cells, V]
  Acc* weight;        // [cells, V, max_taps]
};

template <class Acc>
struct ValuePlan {
  const void* tokens;        // [V, B, h*w, C]
  int64_t token_strides[3];  // of V, B and h*w, in elements
  int64_t views, batch, channels;
  View* sorted;  // [V] by dx
  ReadsPlan<Acc> y, x;
  void* out;               // [B, C, H', W']
  int64_t out_strides[4];  // in elements
  void* variance;          // as out
  // Of a stream (ensemble.h).
  int64_t plane_stride;
  double* seen;         // [H', W']
  const double* scale;  // of the weights, in units of `seen`
  int64_t spread;       // in which steps it goes through the views
  bool counts_views;
};

// ---- the tables ---------------------------------------------------------------------------------

template <class Acc>
__device__ void fill_reads(const ReadsPlan<Acc>& plan, double offset, int64_t origin, int64_t cell,
                           int64_t slot) {
  Acc* const weight = plan.weight + slot * plan.max_taps;
  Reads<Acc> reads{};
  int32_t first = 0;
  const int32_t count = visit_axis_cell(plan.axis, offset, cell, [&](int32_t token, double value) {
    if (reads.taps == 0) first = token;
    while (first + reads.taps < token) weight[reads.taps++] = 0;
    weight[reads.taps++] = static_cast<Acc>(value);
  });
  for (int64_t k = 0; k < reads.taps; ++k) {
    weight[k] /= static_cast<Acc>(count);
    if (k < 2) reads.weight[k] = weight[k];
  }
  reads.at = origin + first * plan.step;
  reads.count = count;
  plan.reads[slot] = reads;
}

template <class Acc>
__global__ void __launch_bounds__(kThreads)
    fill_reads_kernel(const __grid_constant__ ValuePlan<Acc> plan) {
  const int64_t rows = plan.y.cells, cells = plan.x.cells;
  SRT_FOR_THREAD(i, plan.views * (rows + cells)) {
    const int64_t v = i % plan.views, cell = i / plan.views;
    const View view = plan.sorted[v];
    if (cell < rows) {
      fill_reads(plan.y, view.dy, view.index * plan.token_strides[0], cell, i);
    } else {
      fill_reads(plan.x, view.dx, 0, cell - rows, i - rows * plan.views);
    }
  }
}

template <class Acc>
__device__ bool equals_the_one_before(const ReadsPlan<Acc>& plan, int64_t slot, int64_t views) {
  const Reads<Acc>&here = plan.reads[slot], &before = plan.reads[slot - views];
  bool equal = here.count == before.count && here.taps == before.taps && here.at == before.at;
  const Acc* const weight = plan.weight + slot * plan.max_taps;
  for (int64_t k = 0; equal && k < here.taps; ++k)
    equal = weight[k] == weight[k - views * plan.max_taps];
  return equal;
}

template <class Acc>
__global__ void __launch_bounds__(kThreads)
    find_changes(const __grid_constant__ ValuePlan<Acc> plan) {
  const int64_t rows = plan.y.cells, cells = plan.x.cells;
  SRT_FOR_THREAD(i, plan.views * (rows + cells)) {
    const int64_t cell = i / plan.views;
    const ReadsPlan<Acc>& axis = cell < rows ? plan.y : plan.x;
    const int64_t own = cell < rows ? cell : cell - rows;
    if (own == 0 || !equals_the_one_before(axis, own * plan.views + i % plan.views, plan.views))
      axis.breaks[own] = 1;
  }
}

// ---- values -------------------------------------------------------------------------------------

// One channel of one run of cells.
template <class T>
struct Cell {
  using Acc = typename AccumulatorOf<T>::type;
  const ValuePlan<Acc>& plan;
  const T* tokens;  // of the image and channel
  int64_t y, y_end, x, x_end;
  int64_t at;  // of the channel and cell (0, 0) in the output, in elements

  // Whether view v counts; then its value, and its weight.
  __device__ bool value(int64_t v, Acc& value, double& weight) const {
    const Reads<Acc> ry = plan.y.reads[y * plan.views + v], rx = plan.x.reads[x * plan.views + v];
    if (!(ry.count > 0 && rx.count > 0)) return false;
    weight = ry.count * rx.count;
    const T* const token = tokens + ry.at + rx.at;
    value = 0;
    if (ry.taps <= 2 && rx.taps <= 2) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (i >= ry.taps || ry.weight[i] == 0) continue;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if (j >= rx.taps || rx.weight[j] == 0) continue;
          value +=
              ry.weight[i] * rx.weight[j] * to_acc(load(token + i * plan.y.step + j * plan.x.step));
        }
      }
      return true;
    }
    const Acc* const wy = plan.y.weight + (y * plan.views + v) * plan.y.max_taps;
    const Acc* const wx = plan.x.weight + (x * plan.views + v) * plan.x.max_taps;
#pragma unroll 1
    for (int64_t i = 0; i < ry.taps; ++i) {
      if (wy[i] == 0) continue;
#pragma unroll 1
      for (int64_t j = 0; j < rx.taps; ++j)
        if (wx[j] != 0)
          value += wy[i] * wx[j] * to_acc(load(token + i * plan.y.step + j * plan.x.step));
    }
    return true;
  }

  // Calls visit(value, weight) for each view that counts.
  template <class Visit>
  __device__ void each_value(Visit&& visit) const {
#pragma unroll 1
    for (int64_t v = 0; v < plan.views; ++v) {
      Acc x_v;
      double weight;
      if (value(v, x_v, weight)) visit(x_v, weight * plan.sorted[v].weight);
    }
  }

  // Calls visit(offset in the output, number of the cell) for each cell.
  template <class Visit>
  __device__ void each_cell(Visit&& visit) const {
    for (int64_t row = y; row < y_end; ++row)
      for (int64_t cell = x; cell < x_end; ++cell)
        visit(at + row * plan.out_strides[2] + cell * plan.out_strides[3],
              row * plan.x.cells + cell);
  }
};

template <class T, class Acc>
__device__ void write(const Cell<T>& cell, void* to, Acc value) {
  const T element = from_acc<T>(value);
  cell.each_cell([&](int64_t at, int64_t) { store(static_cast<T*>(to) + at, element); });
}

// ---- reductions ---------------------------------------------------------------------------------

// Each has kBlocks: how many blocks a processor holds, which share its 65536 registers.

struct NumberOrder {
  template <class V>
  static SRT_INLINE V min(V a, V b) {
    return a < b ? a : b;
  }
  template <class V>
  static SRT_INLINE V max(V a, V b) {
    return a > b ? a : b;
  }
};

// Of up to N views, in registers.
template <class T, int N>
struct NetworkMedian {
  using Acc = typename AccumulatorOf<T>::type;
  static constexpr int kBlocks = N * sizeof(Acc) <= 200 ? 2 : 1;
  static __device__ void reduce(const Cell<T>& cell) {
    const Acc infinity = static_cast<Acc>(INFINITY);
    Acc value[N], poison = 0;
    bool any = false;
    // In turn, which leaves the median where it is (low_padding): -inf first if N is odd.
    Acc padding = N % 2 ? -infinity : infinity;
#pragma unroll
    for (int v = 0; v < N; ++v) {
      double weight;
      if (v < cell.plan.views && cell.value(v, value[v], weight)) {
        any = true;
        if (value[v] != value[v]) poison = value[v];
      } else {
        value[v] = padding;
        padding = -padding;
      }
    }
    Acc median = MedianOf<N, NumberOrder, Acc>::lower(value);
    if (poison != poison) median = poison;
    write(cell, cell.plan.out, any ? median : Acc{0});
  }
};

// Of any number of views: the bits of the result are found from the top, by counting the values
// below, which are gathered again each time. A number is ordered as its key, an integer.
template <class T>
struct CountingMedian {
  using Acc = typename AccumulatorOf<T>::type;
  using Key = typename std::conditional<sizeof(Acc) == 8, int64_t, int32_t>::type;
  static constexpr int kBlocks = 2;
  static constexpr int kBits = 8 * sizeof(Key);
  static constexpr Key kTop = Key{1} << (kBits - 2);  // the highest bit but the sign

  static __device__ Key flip(Key bits) {
    return bits ^ ((bits >> (kBits - 1)) & (kTop - 1 + kTop));
  }
  static __device__ void reduce(const Cell<T>& cell) {
    int64_t count = 0;
    Acc poison = 0;
    cell.each_value([&](Acc value, double) {
      ++count;
      if (value != value) poison = value;
    });
    Acc median = poison;
    if (count > 0 && poison == poison) {
      const auto reach = [&](Key key) {  // whether no more than half of the keys are below it
        int64_t below = 0;
        cell.each_value([&](Acc value, double) {
          Key bits;
          memcpy(&bits, &value, sizeof(bits));
          below += flip(bits) < key;
        });
        return below <= (count - 1) / 2;
      };
      Key key = reach(0) ? 0 : -kTop - kTop;
#pragma unroll 1
      for (Key bit = kTop; bit > 0; bit /= 2)
        if (reach(key | bit)) key |= bit;
      key = flip(key);
      memcpy(&median, &key, sizeof(median));
    }
    write(cell, cell.plan.out, median);
  }
};

// Mean and variance of the views. The sum of squared deviations is kept as West does (1979), of the
// distances from the first value: beside a large mean they are small, and so are their roundings.
template <class T>
struct Sample {
  using Acc = typename AccumulatorOf<T>::type;
  Acc mean = 0, variance = 0;
  double weight = 0;

  explicit __device__ Sample(const Cell<T>& cell) {
    Acc first = 0, distance = 0, sum = 0, squares = 0;
    cell.each_value([&](Acc value, double part) {
      if (weight == 0) first = value;
      weight += part;
      sum += static_cast<Acc>(part) * value;
      const Acc own = value - first, apart = own - distance;
      distance += static_cast<Acc>(part / weight) * apart;
      squares += static_cast<Acc>(part) * apart * (own - distance);
    });
    if (weight > 0) {
      mean = sum / static_cast<Acc>(weight);
      variance = squares / static_cast<Acc>(weight);
    }
  }
};

template <class T>
struct Moments {
  static constexpr int kBlocks = 2;
  static __device__ void reduce(const Cell<T>& cell) {
    const Sample<T> sample(cell);
    write(cell, cell.plan.out, sample.mean);
    write(cell, cell.plan.variance, sample.variance);
  }
};

// The state and a chunk are joined as two samples are (Chan, Golub and LeVeque 1979).
template <class T, bool kVariance>
struct StreamSample {
  using Acc = typename AccumulatorOf<T>::type;
  static constexpr int kBlocks = 2;
  static __device__ void reduce(const Cell<T>& cell) {
    const ValuePlan<Acc>& plan = cell.plan;
    const Sample<T> sample(cell);
    const double chunk = *plan.scale * sample.weight;
    cell.each_cell([&](int64_t at, int64_t number) {
      const double seen = plan.seen[number], total = seen + chunk;
      Acc* const mean = static_cast<Acc*>(plan.out) + at;
      const Acc keep = total > 0 ? static_cast<Acc>(seen / total) : 0;
      const Acc added = total > 0 ? static_cast<Acc>(chunk / total) : 0;
      // Where nothing was seen the state is not read.
      Acc joined = sample.mean, spread = sample.variance;
      if (keep != 0) {
        const Acc old = *mean, apart = sample.mean - old;
        // The first form rounds less, the second keeps an infinite mean.
        if (added == 0) {
          joined = old;
        } else if (apart - apart == 0) {
          joined = old + added * apart;
        } else {
          joined = keep * old + added * sample.mean;
        }
        if (kVariance) {
          const Acc before = static_cast<const Acc*>(plan.variance)[at];
          spread = added == 0
                       ? before
                       : keep * before + added * sample.variance + keep * added * apart * apart;
        }
      }
      store(mean, joined);
      if (kVariance) store(static_cast<Acc*>(plan.variance) + at, spread);
    });
  }
};

template <class T>
struct StreamMedian {
  using Acc = typename AccumulatorOf<T>::type;
  static constexpr int kBlocks = 2;
  static __device__ void reduce(const Cell<T>& cell) {
    const ValuePlan<Acc>& plan = cell.plan;
    cell.each_cell([&](int64_t at, int64_t number) {
      Acc* const state = static_cast<Acc*>(plan.out) + at;
      double seen = plan.seen[number];
      Acc window[kWindow], place = 0;
#pragma unroll
      for (int i = 0; i < kWindow; ++i)
        window[i] = seen > 0 ? state[i * plan.plane_stride] : static_cast<Acc>(INFINITY);
      if (seen > 0) place = state[kWindow * plan.plane_stride];
#pragma unroll 1
      for (int64_t k = 0, v = 0; k < plan.views; ++k, v = (v + plan.spread) % plan.views) {
        Acc value;
        double weight;
        if (!cell.value(v, value, weight)) continue;
        add_to_window(window, place, value, WindowStep<Acc>(seen));
        seen += 1;
      }
#pragma unroll
      for (int i = 0; i < kWindow; ++i) store(state + i * plan.plane_stride, window[i]);
      store(state + kWindow * plan.plane_stride, place);
    });
  }
};

template <class T, class Reduction>
__global__ void __launch_bounds__(kThreads, Reduction::kBlocks)
    values_kernel(const __grid_constant__ ValuePlan<typename AccumulatorOf<T>::type> plan) {
  const int64_t rows = plan.y.cells, cells = plan.x.cells;
  const int64_t groups = div_up(plan.channels, kWarpThreads);
  // The warps of a block take cells that follow each other: they read the same tokens.
  const int64_t warps = plan.batch * rows * groups * cells;
  SRT_FOR_THREAD(i, warps * kWarpThreads) {
    const int64_t x = i / kWarpThreads % cells;
    const int64_t c = i / kWarpThreads / cells % groups * kWarpThreads + i % kWarpThreads;
    const int64_t y = i / kWarpThreads / cells / groups % rows;
    const int64_t b = i / kWarpThreads / cells / groups / rows;
    if (!plan.y.breaks[y] || !plan.x.breaks[x] || c >= plan.channels) continue;
    Cell<T> cell{plan,
                 static_cast<const T*>(plan.tokens) + b * plan.token_strides[1] + c,
                 y,
                 y + 1,
                 x,
                 x + 1,
                 b * plan.out_strides[0] + c * plan.out_strides[1]};
    while (cell.y_end < rows && !plan.y.breaks[cell.y_end]) ++cell.y_end;
    while (cell.x_end < cells && !plan.x.breaks[cell.x_end]) ++cell.x_end;
    Reduction::reduce(cell);
  }
}

// What the chunk adds to what each cell has got; the kernel above has read it.
template <class Acc>
__global__ void __launch_bounds__(kThreads)
    add_to_seen(const __grid_constant__ ValuePlan<Acc> plan) {
  SRT_FOR_THREAD(i, plan.y.cells * plan.x.cells) {
    double total = 0;
    for (int64_t v = 0; v < plan.views; ++v) {
      const double count_y = plan.y.reads[i / plan.x.cells * plan.views + v].count;
      const double count = count_y * plan.x.reads[i % plan.x.cells * plan.views + v].count;
      total += plan.counts_views ? (count > 0 ? 1 : 0) : plan.sorted[v].weight * count;
    }
    plan.seen[i] += plan.counts_views ? total : *plan.scale * total;
  }
}

// ---- on the host --------------------------------------------------------------------------------

template <class T>
using Kernel = void (*)(ValuePlan<typename AccumulatorOf<T>::type>);

template <class T>
Kernel<T> median_kernel(int64_t views) {
  // Fewer sizes than on the CPU: each is a kernel for every dtype and architecture.
  if (views <= 9) return values_kernel<T, NetworkMedian<T, 9>>;
  if (views <= 25) return values_kernel<T, NetworkMedian<T, 25>>;
  if (views <= 50) return values_kernel<T, NetworkMedian<T, 50>>;
  if constexpr (sizeof(T) < sizeof(double)) {  // 64 doubles do not fit into the registers
    if (views <= 64) return values_kernel<T, NetworkMedian<T, 64>>;
  }
  return values_kernel<T, CountingMedian<T>>;
}

template <class T>
Kernel<T> choose_kernel(const EnsembleArgs& args) {
  switch (args.reduce) {
    case Reduce::median:
      return args.seen ? values_kernel<T, StreamMedian<T>> : median_kernel<T>(args.views);
    case Reduce::moments:
      return args.seen ? values_kernel<T, StreamSample<T, true>> : values_kernel<T, Moments<T>>;
    case Reduce::mean:
      return values_kernel<T, StreamSample<T, false>>;
  }
  return nullptr;
}

template <class T>
int64_t reduce_values(const char* op, const EnsembleArgs& args, const ViewNumbers& offsets,
                      const ViewNumbers& weights, void* base, CUstream_st* stream) {
  using Acc = typename AccumulatorOf<T>::type;
  Workspace workspace(base);
  ValuePlan<Acc> plan{};
  plan.tokens = args.tokens;
  std::copy_n(args.token_strides, 3, plan.token_strides);
  plan.views = args.views;
  plan.batch = args.batch;
  plan.channels = args.channels;
  plan.y.axis = {args.grid[0], args.patch[0], args.stride[0], args.upsample, args.border};
  plan.x.axis = {args.grid[1], args.patch[1], args.stride[1], args.upsample, args.border};
  plan.y.step = args.grid[1] * args.token_strides[2];
  plan.x.step = args.token_strides[2];
  plan.sorted = workspace.take<View>(args.views);
  double* const scale = workspace.take<double>(1);
  for (ReadsPlan<Acc>* axis : {&plan.y, &plan.x}) {
    axis->cells = axis->axis.cells();
    axis->max_taps = axis->axis.max_taps();
  }
  const int64_t rows = plan.y.cells, cells = plan.x.cells;
  plan.y.breaks = workspace.take<uint8_t>(rows + cells);
  plan.x.breaks = plan.y.breaks + rows;
  for (ReadsPlan<Acc>* axis : {&plan.y, &plan.x}) {
    axis->reads = workspace.take<Reads<Acc>>(axis->cells * args.views);
    axis->weight = workspace.take<Acc>(axis->cells * args.views * axis->max_taps);
  }
  plan.out = args.out;
  std::copy_n(args.out_strides, 4, plan.out_strides);
  plan.variance = args.variance;
  plan.plane_stride = args.plane_stride;
  plan.seen = args.seen;
  plan.scale = scale;
  plan.spread = spread_step(args.views);
  plan.counts_views = args.reduce == Reduce::median;
  InlineNumbers numbers;
  RawViews raw = raw_views(op, offsets, weights, args.views, workspace, numbers, stream);
  raw.stream = args.seen != nullptr;
  if (!base) return workspace.bytes();

  launch(op, sort_views, div_up(std::max(args.views, rows + cells), kThreads), stream, raw, numbers,
         plan.sorted, scale, plan.y.breaks, rows + cells);
  launch(op, fill_reads_kernel<Acc>, div_up(args.views * (rows + cells), kThreads), stream, plan);
  launch(op, find_changes<Acc>, div_up(args.views * (rows + cells), kThreads), stream, plan);
  const int64_t warps = args.batch * rows * cells * div_up(args.channels, kWarpThreads);
  if (warps > 0)
    launch(op, choose_kernel<T>(args), div_up(warps, kThreads / kWarpThreads), stream, plan);
  if (args.seen) launch(op, add_to_seen<Acc>, div_up(rows * cells, kThreads), stream, plan);
  return workspace.bytes();
}

}  // namespace

int64_t reduce_values(const char* op, const EnsembleArgs& args, const ViewNumbers& offsets,
                      const ViewNumbers& weights, void* base, CUstream_st* stream) {
  if (!args.seen && (args.batch == 0 || args.channels == 0)) return 0;
  switch (args.dtype) {
    case DType::f32:
      return reduce_values<float>(op, args, offsets, weights, base, stream);
    case DType::f16:
      return reduce_values<Half>(op, args, offsets, weights, base, stream);
    case DType::bf16:
      return reduce_values<BFloat16>(op, args, offsets, weights, base, stream);
    case DType::f64:
      return reduce_values<double>(op, args, offsets, weights, base, stream);
    case DType::u8:
      break;  // tokens are floating
  }
  return 0;
}

}  // namespace srt::cuda
