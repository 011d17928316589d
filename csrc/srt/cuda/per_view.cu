// The reductions on the device that need the value of every view in a cell: the median, the
// moments, and what a chunk of a stream adds to its state. A block makes a few cells of a row, 32
// channels at a time. Along a row a view is linear between its tokens: the block combines the token
// rows of every view once, in shared memory, and a cell blends two columns of that. A warp is a run
// of cells, a thread a channel. Small kernels make the tables from the offsets, wherever these lie.
// Nothing ever comes back to the host.
#include <type_traits>

#include "../axis.h"
#include "../running_median.h"
#include "common.cuh"

namespace srt::cuda {
namespace {

// Token columns of a view, in shared memory. As many as a token's width of pixels can read; where
// cells are larger, there is a place for the values of so many of them instead.
constexpr int kColumns = 3;

// What one view reads for one cell of an axis.
template <class Acc>
struct alignas(kVectorBytes) Reads {
  int32_t first, taps;  // tokens
  double count;         // counted pixels; the view has no value where it is 0
  Acc weight[2];        // of the first two taps, divided by count
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
struct PerViewPlan : FieldPlan {
  View* sorted;    // [V] by dx
  int64_t spread;  // the step between views that are taken one after the other
  View* ordered;   // [V] in the order in which they are taken
  ReadsPlan<Acc> y, x;
  bool linear;  // a cell is a pixel: of at most two taps along each axis
  // If `linear`, a tile reads these tokens of a view, two rows of them: bytes from the first token.
  // Where there are fewer columns than kColumns, the last one is read again.
  int columns;
  int64_t near[2][kColumns];
  int64_t tile;    // cells of a block
  int64_t groups;  // of 32 channels, that a block makes one after the other
  void* variance;  // as out
  // For a stream alone (ensemble.h).
  int64_t plane_stride;
  double* total_weight;  // [H', W']
  double* scale;         // of the weights, in units of `total_weight`
  bool counts_views;
};

// ---- the tables ---------------------------------------------------------------------------------

template <class Acc>
__device__ void fill_reads(const ReadsPlan<Acc>& plan, double offset, int64_t cell, int64_t slot) {
  Acc* const weight = plan.weight + slot * plan.max_taps;
  Reads<Acc> reads{};
  const int32_t count = visit_axis_cell(plan.axis, offset, cell, [&](int32_t token, double value) {
    if (reads.taps == 0) reads.first = token;
    while (reads.first + reads.taps < token) weight[reads.taps++] = 0;
    weight[reads.taps++] = static_cast<Acc>(value);
  });
  for (int32_t k = 0; k < reads.taps; ++k) {
    weight[k] /= static_cast<Acc>(count);
    if (k < 2) reads.weight[k] = weight[k];
  }
  reads.count = count;
  plan.reads[slot] = reads;
}

template <class Acc>
__global__ void __launch_bounds__(kThreads)
    fill_reads_kernel(const __grid_constant__ PerViewPlan<Acc> plan) {
  const int64_t rows = plan.y.cells, cells = plan.x.cells;
  SRT_FOR_THREAD(i, plan.views * (rows + cells)) {
    const int64_t v = i % plan.views, cell = i / plan.views;
    const View view = plan.sorted[v * plan.spread % plan.views];
    if (cell == 0) plan.ordered[v] = view;
    if (v == 0) plan.y.breaks[cell] = 0;  // of both axes; they are found next
    if (cell < rows) {
      fill_reads(plan.y, view.dy, cell, i);
    } else {
      fill_reads(plan.x, view.dx, cell - rows, i - rows * plan.views);
    }
  }
}

template <class Acc>
__device__ bool equals_the_one_before(const ReadsPlan<Acc>& plan, int64_t slot, int64_t views) {
  const Reads<Acc>&here = plan.reads[slot], &before = plan.reads[slot - views];
  bool equal = here.count == before.count && here.taps == before.taps && here.first == before.first;
  const Acc* const weight = plan.weight + slot * plan.max_taps;
  for (int64_t k = 0; equal && k < here.taps; ++k)
    equal = weight[k] == weight[k - views * plan.max_taps];
  return equal;
}

template <class Acc>
__global__ void __launch_bounds__(kThreads)
    find_changes(const __grid_constant__ PerViewPlan<Acc> plan) {
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

constexpr int kWarps = kThreads / kWarpThreads;
// In a tile, at most; static shared memory has 48 KB.
template <class Acc>
constexpr int kRuns = sizeof(Acc) == 8 ? kColumns : 16;
constexpr int64_t kEnoughBlocks = 2048;  // before one makes several groups of channels

// What all channels of a tile share, and the columns of 32 of them. A view's value in a run is
// `row(at[0]) * weight[0] + row(at[1]) * weight[1]`; a tap that is none reads zeros.
template <class T, class Reduction>
struct Stage {
  using Acc = typename AccumulatorOf<T>::type;
  static constexpr int kViews = Reduction::kViews;                   // more come in several turns
  static constexpr int kZeros = 0, kLow = 1, kHigh = 2, kFixed = 3;  // rows of 0, -inf, inf
  static constexpr int kAbsent = -1;  // at[0] of a view that does not count, until it is left out

  struct alignas(kVectorBytes) Blend {
    int32_t at[2];  // bytes from the beginning of `rows`
    Acc weight[2];
  };
  struct Source {
    const T* token;  // the first one, channel 0
    Acc weight[2];   // of token rows
  };
  struct Share {
    Acc weight;  // of the view in the cell
    Acc part;    // that it is of the weights so far
  };

  Blend blend[kRuns<Acc>][kViews];
  Source source[kViews];
  Acc rows[kFixed + kViews * kColumns][kWarpThreads];
  Share share[Reduction::kWeighted ? kRuns<Acc> : 1][kViews];
  int32_t counted[kRuns<Acc>];    // views that count, of those staged
  double weight[kRuns<Acc>];      // of all views so far
  int64_t image, y, y_end;        // of the tile; rows y to y_end are alike
  int32_t begin[kRuns<Acc> + 1];  // cells
  int32_t runs;

  static __device__ int32_t place(int row) {
    return row * kWarpThreads * static_cast<int32_t>(sizeof(Acc));
  }
  static __device__ int32_t place(int view, int column) {
    return place(kFixed + view * kColumns + column);
  }
};

// One channel of one run of cells.
template <class T, class Reduction>
struct Cell {
  using Acc = typename AccumulatorOf<T>::type;
  using Stage = cuda::Stage<T, Reduction>;
  const PerViewPlan<Acc>& plan;
  Stage& stage;
  int64_t channel;  // of a lane beyond the last channel there is none
  int run;          // beyond the last one: a warp that only helps to stage

  static __device__ int lane() { return static_cast<int>(threadIdx.x) % kWarpThreads; }
  static __device__ int warp() { return static_cast<int>(threadIdx.x) / kWarpThreads; }
  __device__ int staged(int64_t first) const {  // views, from this one on
    return static_cast<int>(min(int64_t{Stage::kViews}, plan.views - first));
  }
  __device__ bool staged_once() const { return plan.views <= Stage::kViews; }

  // The runs of the tile that begins at row y and cell x. They end with it.
  __device__ void stage_runs(int64_t image, int64_t y, int64_t x) const {
    const int cells = static_cast<int>(min(plan.tile, plan.x.cells - x));
    const int own = static_cast<int>(threadIdx.x);
    if (own >= cells) return;
    const auto begins = [&](int cell) {
      return cell == 0 || !Reduction::kCopies || plan.x.breaks[x + cell];
    };
    int before = 0;
#pragma unroll 1
    for (int cell = 0; cell < own; ++cell) before += begins(cell);
    if (begins(own)) stage.begin[before++] = static_cast<int32_t>(x) + own;
    if (own < cells - 1) return;
    stage.begin[before] = static_cast<int32_t>(x) + cells;
    stage.runs = before;
    stage.image = image;
    stage.y = y;
    do {
      ++y;
    } while (Reduction::kCopies && y < plan.y.cells && !plan.y.breaks[y]);
    stage.y_end = y;
  }

  // Views `first` and on: a thread a view in a run, then a run with all its views.
  __device__ void stage_views(int64_t first) const {
    constexpr int kViews = Stage::kViews;
    const int views = staged(first), own = static_cast<int>(threadIdx.x);
#pragma unroll 1
    for (int i = own; i < stage.runs * kViews; i += kThreads) {
      const int run = i / kViews, k = i % kViews;
      typename Stage::Blend& blend = stage.blend[run][k];
      blend.at[0] = Stage::kAbsent;
      if (k >= views) continue;
      const int64_t v = first + k;
      const Reads<Acc> ry = plan.y.reads[stage.y * plan.views + v];
      const Reads<Acc> rx = plan.x.reads[stage.begin[run] * plan.views + v];
      // The first token that the tile reads. 0 for a cell that is not covered.
      int32_t from = 0;
      if (plan.linear)
        from = min(plan.x.reads[stage.begin[0] * plan.views + v].first,
                   static_cast<int32_t>(plan.x.axis.tokens) - plan.columns);
      const View view = plan.ordered[v];
      if (run == 0) {
        const int64_t token = stage.image * plan.token_strides[1] +
                              view.index * plan.token_strides[0] + ry.first * plan.y.step +
                              from * plan.x.step;
        stage.source[k] = {static_cast<const T*>(plan.tokens) + token,
                           {ry.weight[0], ry.weight[1]}};
      }
      if (!(ry.count > 0 && rx.count > 0)) continue;
      const int column = plan.linear ? rx.first - from : run;
      for (int j = 0; j < 2; ++j) {
        const Acc weight = plan.linear ? rx.weight[j] : static_cast<Acc>(1 - j);
        blend.at[j] = weight != 0 ? Stage::place(k, column + j) : Stage::place(Stage::kZeros);
        blend.weight[j] = weight;
      }
      if constexpr (Reduction::kWeighted)
        stage.share[run][k].weight = static_cast<Acc>(ry.count * rx.count * view.weight);
    }
    __syncthreads();
    if (own >= stage.runs) return;
    int counted = 0;
#pragma unroll 1
    for (int k = 0; k < views; ++k) {
      if (stage.blend[own][k].at[0] == Stage::kAbsent) continue;
      if (counted != k) {
        stage.blend[own][counted] = stage.blend[own][k];
        if constexpr (Reduction::kWeighted) stage.share[own][counted] = stage.share[own][k];
      }
      ++counted;
    }
    stage.counted[own] = counted;
    Reduction::prepare(stage, own, first == 0);
  }

  // This channel of the columns of all views; of the values themselves, where a cell is more than a
  // pixel.
  __device__ void stage_rows(int64_t first) const {
    const int views = staged(first);
    const bool exists = channel < plan.channels;
    for (int k = warp(); k < views; k += kWarps) {
      const typename Stage::Source source = stage.source[k];
      const T* const token = source.token + channel;
      Acc* const rows = stage.rows[Stage::kFixed + k * kColumns] + lane();
      if (plan.linear) {
        const char* const bytes = reinterpret_cast<const char*>(token);
        T read[2][kColumns] = {};  // all loads before the first use
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (!exists || source.weight[i] == 0) continue;
#pragma unroll
          for (int j = 0; j < kColumns; ++j)
            read[i][j] = load(reinterpret_cast<const T*>(bytes + plan.near[i][j]));
        }
#pragma unroll
        for (int j = 0; j < kColumns; ++j)
          rows[j * kWarpThreads] =
              source.weight[0] * to_acc(read[0][j]) + source.weight[1] * to_acc(read[1][j]);
      } else if (exists) {
#pragma unroll 1
        for (int r = 0; r < stage.runs; ++r)
          rows[r * kWarpThreads] = value(stage.y * plan.views + first + k,
                                         stage.begin[r] * plan.views + first + k, token);
      }
    }
  }

  // The value for any number of taps.
  __device__ Acc value(int64_t slot_y, int64_t slot_x, const T* token) const {
    const Acc* const wy = plan.y.weight + slot_y * plan.y.max_taps;
    const Acc* const wx = plan.x.weight + slot_x * plan.x.max_taps;
    const int32_t rows = plan.y.reads[slot_y].taps, columns = plan.x.reads[slot_x].taps;
    token += plan.x.reads[slot_x].first * plan.x.step;
    Acc sum = 0;
#pragma unroll 1
    for (int32_t i = 0; i < rows; ++i) {
      if (wy[i] == 0) continue;
#pragma unroll 1
      for (int32_t j = 0; j < columns; ++j)
        if (wx[j] != 0)
          sum += wy[i] * wx[j] * to_acc(load(token + i * plan.y.step + j * plan.x.step));
    }
    return sum;
  }

  // Every time the same to the last bit, so not left to the compiler.
  __device__ Acc value(int k) const {
    const typename Stage::Blend blend = stage.blend[run][k];
    const auto row = [&](int32_t at) {
      return *reinterpret_cast<const Acc*>(reinterpret_cast<const char*>(stage.rows[0] + lane()) +
                                           at);
    };
    return fma(blend.weight[0], row(blend.at[0]), blend.weight[1] * row(blend.at[1]));
  }

  // Calls visit(value, share) for each view that counts. All threads of the block call it equally
  // often: more than kViews are staged in turns.
  template <class Visit>
  __device__ void each_value(Visit&& visit) const {
    for (int64_t first = 0; first < plan.views; first += Stage::kViews) {
      if (!staged_once()) {
        __syncthreads();
        stage_views(first);
        stage_rows(first);
        __syncthreads();
      }
      const int counted = run < stage.runs ? stage.counted[run] : 0;
#pragma unroll 4
      for (int k = 0; k < counted; ++k)
        visit(value(k), stage.share[Reduction::kWeighted ? run : 0][k]);
    }
  }

  // Calls visit(offset in the output, number of the cell) for each cell.
  template <class Visit>
  __device__ void each_cell(Visit&& visit) const {
    if (channel >= plan.channels || run >= stage.runs) return;
    const int64_t at = stage.image * plan.out_strides[0] + channel * plan.out_strides[1];
    for (int64_t y = stage.y; y < stage.y_end; ++y)
      for (int64_t x = stage.begin[run]; x < stage.begin[run + 1]; ++x)
        visit(at + y * plan.out_strides[2] + x * plan.out_strides[3], y * plan.x.cells + x);
  }

  __device__ void write(void* to, Acc value) const {
    const T element = from_acc<T>(value);
    each_cell(
        [&](int64_t at, int64_t) { store(static_cast<T*>(to) + at, element, plan.keep_in_l2); });
  }
};

// ---- reductions ---------------------------------------------------------------------------------

// Each has kBlocks: how many blocks a processor holds, which share its 65536 registers. `prepare`
// is one thread's turn with a run, when its views are staged.

// What most of them have in common.
template <class T>
struct Common {
  static constexpr int kViews = 50;
  static constexpr int kBlocks = sizeof(T) == 8 ? 2 : 3;
  static constexpr bool kWeighted = false;  // whether it asks for shares
  static constexpr bool kCopies = true;     // whether all cells of a run get the same
  template <class Stage>
  static __device__ void prepare(Stage&, int, bool) {}
};

// A NaN is both less and more than any number: it reaches the median.
struct NanOrder {
  template <class V>
  static SRT_INLINE V min(V a, V b) {
    return a < b || a != a ? a : b;
  }
  template <class V>
  static SRT_INLINE V max(V a, V b) {
    return a > b || a != a ? a : b;
  }
#if __CUDA_ARCH__ >= 800  // one instruction
  static SRT_INLINE float min(float a, float b) {
    float value;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(value) : "f"(a), "f"(b));
    return value;
  }
  static SRT_INLINE float max(float a, float b) {
    float value;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(value) : "f"(a), "f"(b));
    return value;
  }
#endif
};

// The median of up to N views, in registers.
template <class T, int N>
struct NetworkMedian : Common<T> {
  using Acc = typename AccumulatorOf<T>::type;
  static constexpr int kViews = N;
  static constexpr int kBlocks = N * sizeof(Acc) <= 100 ? 3 : N * sizeof(Acc) <= 256 ? 2 : 1;

  // Behind the views that count infinities of both signs, in turn, which leaves the
  // median where it is (low_padding): -inf first if N is odd.
  template <class Stage>
  static __device__ void prepare(Stage& stage, int run, bool) {
    int padding = N % 2 ? Stage::kLow : Stage::kHigh;
#pragma unroll 1
    for (int k = stage.counted[run]; k < N; ++k) {
      stage.blend[run][k] = {{Stage::place(padding), Stage::place(Stage::kZeros)}, {1, 0}};
      padding = Stage::kLow + Stage::kHigh - padding;
    }
  }
  template <class Cell>
  static __device__ void reduce(const Cell& cell) {
    if (cell.run >= cell.stage.runs) return;
    Acc value[N];
#pragma unroll
    for (int k = 0; k < N; ++k) value[k] = cell.value(k);
    const Acc median = MedianOf<N, NanOrder, Acc>::lower(value);
    cell.write(cell.plan.out, cell.stage.counted[cell.run] > 0 ? median : Acc{0});
  }
};

// The median of any number of views. It finds the bits of the result from the top, by counting the
// values below, which it gathers again for each bit. Numbers are compared by integer keys.
template <class T>
struct CountingMedian : Common<T> {
  using Acc = typename AccumulatorOf<T>::type;
  using Key = typename std::conditional<sizeof(Acc) == 8, int64_t, int32_t>::type;
  static constexpr int kBits = 8 * sizeof(Key);
  static constexpr Key kTop = Key{1} << (kBits - 2);  // the highest bit but the sign

  static __device__ Key flip(Key bits) {
    return bits ^ ((bits >> (kBits - 1)) & (kTop - 1 + kTop));
  }
  template <class Cell>
  static __device__ void reduce(const Cell& cell) {
    int64_t count = 0;
    Acc poison = 0;
    cell.each_value([&](Acc value, auto) {
      ++count;
      if (value != value) poison = value;
    });
    const auto reach = [&](Key key) {  // whether no more than half of the keys are below it
      int64_t below = 0;
      cell.each_value([&](Acc value, auto) {
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
    Acc median;
    memcpy(&median, &key, sizeof(median));
    if (count == 0 || poison != poison) median = poison;
    cell.write(cell.plan.out, median);
  }
};

// Mean and variance of the views. The sum of squared deviations is kept as West does (1979), of the
// distances from the first value: beside a large mean they are small, and so are their roundings.
template <class T>
struct Sample {
  using Acc = typename AccumulatorOf<T>::type;
  Acc mean = 0, variance = 0;
  double weight = 0;

  template <class Cell>
  explicit __device__ Sample(const Cell& cell) {
    Acc first = NAN, distance = 0, sum = 0, squares = 0;
    cell.each_value([&](Acc value, auto share) {
      if (first != first) first = value;
      sum += share.weight * value;
      const Acc own = value - first, apart = own - distance;
      distance += share.part * apart;
      squares += share.weight * apart * (own - distance);
    });
    if (cell.run < cell.stage.runs) weight = cell.stage.weight[cell.run];
    if (weight > 0) {
      mean = sum / static_cast<Acc>(weight);
      variance = squares / static_cast<Acc>(weight);
    }
  }
};

// Mean and variance; in a stream, of the state and the chunk.
template <class T>
struct Moments : Common<T> {
  using Acc = typename AccumulatorOf<T>::type;
  static constexpr bool kWeighted = true;

  template <class Stage>
  static __device__ void prepare(Stage& stage, int run, bool first) {
    double weight = first ? 0 : stage.weight[run];
#pragma unroll 1
    for (int k = 0; k < stage.counted[run]; ++k) {
      weight += stage.share[run][k].weight;
      stage.share[run][k].part = static_cast<Acc>(stage.share[run][k].weight / weight);
    }
    stage.weight[run] = weight;
  }

  template <class Cell>
  static __device__ void reduce(const Cell& cell) {
    const Sample<T> sample(cell);
    if (cell.plan.total_weight) {
      join(cell, sample);
    } else {
      cell.write(cell.plan.out, sample.mean);
      cell.write(cell.plan.variance, sample.variance);
    }
  }

  // The state and a chunk are joined as two samples are (Chan, Golub and LeVeque 1979). The stream
  // of a mean has no variance.
  template <class Cell>
  static __device__ void join(const Cell& cell, const Sample<T>& sample) {
    const PerViewPlan<Acc>& plan = cell.plan;
    const double chunk = *plan.scale * sample.weight;
    cell.each_cell([&](int64_t at, int64_t number) {
      const double before = plan.total_weight[number], total = before + chunk;
      Acc* const mean = static_cast<Acc*>(plan.out) + at;
      Acc* const variance = static_cast<Acc*>(plan.variance) + at;
      const double share = total > 0 ? 1 / total : 0;
      const Acc keep = static_cast<Acc>(before * share), added = static_cast<Acc>(chunk * share);
      // A cell that has no weight yet has no state.
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
        if (plan.variance) {
          spread = added == 0
                       ? *variance
                       : keep * *variance + added * sample.variance + keep * added * apart * apart;
        }
      }
      store(mean, joined, plan.keep_in_l2);
      if (plan.variance) store(variance, spread, plan.keep_in_l2);
    });
  }
};

template <class T>
struct StreamMedian : Common<T> {
  using Acc = typename AccumulatorOf<T>::type;
  static constexpr bool kCopies = false;  // every cell has a state of its own
  template <class Cell>
  static __device__ void reduce(const Cell& cell) {
    const PerViewPlan<Acc>& plan = cell.plan;
    double count = 0;  // views so far
    Acc window[kWindow], place = 0;
#pragma unroll
    for (int i = 0; i < kWindow; ++i) window[i] = static_cast<Acc>(INFINITY);
    cell.each_cell([&](int64_t at, int64_t number) {
      const Acc* const state = static_cast<const Acc*>(plan.out) + at;
      count = plan.total_weight[number];
      if (!(count > 0)) return;
#pragma unroll
      for (int i = 0; i < kWindow; ++i) window[i] = state[i * plan.plane_stride];
      place = state[kWindow * plan.plane_stride];
    });
    cell.each_value([&](Acc value, auto) {
      add_to_window(window, place, value, WindowStep<Acc>(count));
      count += 1;
    });
    cell.each_cell([&](int64_t at, int64_t) {
      Acc* const state = static_cast<Acc*>(plan.out) + at;
#pragma unroll
      for (int i = 0; i < kWindow; ++i)
        store(state + i * plan.plane_stride, window[i], plan.keep_in_l2);
      store(state + kWindow * plan.plane_stride, place, plan.keep_in_l2);
    });
  }
};

template <class T, class Reduction>
__global__ void __launch_bounds__(kThreads, Reduction::kBlocks)
    per_view_kernel(const __grid_constant__ PerViewPlan<typename AccumulatorOf<T>::type> plan) {
  using Acc = typename AccumulatorOf<T>::type;
  using Stage = cuda::Stage<T, Reduction>;
  __shared__ Stage stage;
  static_assert(sizeof(Stage) <= 48 * 1024);
  const int64_t rows = plan.y.cells, tiles = div_up(plan.x.cells, plan.tile);
  const int64_t step = plan.groups * kWarpThreads, parts = div_up(plan.channels, step);
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  if (threadIdx.x < kWarpThreads) {
    stage.rows[Stage::kZeros][lane] = 0;
    stage.rows[Stage::kLow][lane] = -static_cast<Acc>(INFINITY);
    stage.rows[Stage::kHigh][lane] = static_cast<Acc>(INFINITY);
  }
  // Blocks that follow each other read the same token rows.
  SRT_FOR_BLOCK(i, plan.batch * rows * parts * tiles) {
    const int64_t y = i / tiles / parts % rows, begin = i / tiles % parts * step;
    if (Reduction::kCopies && !plan.y.breaks[y]) continue;
    Cell<T, Reduction> cell{plan, stage, begin + lane, 0};
    __syncthreads();
    cell.stage_runs(i / tiles / parts / rows, y, i % tiles * plan.tile);
    __syncthreads();
    if (cell.staged_once()) cell.stage_views(0);
    // Whole warps enter the loops: some of their threads only help to stage.
    for (int group = 0; group < plan.groups && cell.channel - lane < plan.channels; ++group) {
      __syncthreads();
      if (cell.staged_once()) {
        cell.stage_rows(0);
        __syncthreads();
      }
      for (cell.run = cell.warp(); cell.run - cell.warp() < stage.runs; cell.run += kWarps)
        Reduction::reduce(cell);
      cell.channel += kWarpThreads;
    }
  }
}

// What the chunk adds to the total weight of each cell; the kernel above has read it.
template <class Acc>
__global__ void __launch_bounds__(kThreads)
    add_weights(const __grid_constant__ PerViewPlan<Acc> plan) {
  SRT_FOR_THREAD(i, plan.y.cells * plan.x.cells) {
    double total = 0;
    for (int64_t v = 0; v < plan.views; ++v) {
      const double count_y = plan.y.reads[i / plan.x.cells * plan.views + v].count;
      const double count = count_y * plan.x.reads[i % plan.x.cells * plan.views + v].count;
      total += plan.counts_views ? (count > 0 ? 1 : 0) : plan.ordered[v].weight * count;
    }
    plan.total_weight[i] += plan.counts_views ? total : *plan.scale * total;
  }
}

// ---- on the host --------------------------------------------------------------------------------

template <class T>
using Kernel = void (*)(PerViewPlan<typename AccumulatorOf<T>::type>);

template <class T>
Kernel<T> choose_median(const EnsembleArgs& args) {
  if (args.total_weight) return per_view_kernel<T, StreamMedian<T>>;
  // Fewer sizes than on the CPU: each is a kernel for every dtype and architecture.
  if (args.views <= 9) return per_view_kernel<T, NetworkMedian<T, 9>>;
  if (args.views <= 25) return per_view_kernel<T, NetworkMedian<T, 25>>;
  if (args.views <= 50) return per_view_kernel<T, NetworkMedian<T, 50>>;
  return per_view_kernel<T, CountingMedian<T>>;
}

template <class T>
Kernel<T> choose_kernel(const EnsembleArgs& args) {
  switch (args.reduce) {
    case Reduce::median:
      return choose_median<T>(args);
    case Reduce::mean:  // of a stream
    case Reduce::moments:
      break;
  }
  return per_view_kernel<T, Moments<T>>;
}

template <class T, class Acc = typename AccumulatorOf<T>::type>
PerViewPlan<Acc> make_plan(const Call& call, Workspace& workspace) {
  const EnsembleArgs& args = call.args;
  const bool stream = args.total_weight != nullptr, median = args.reduce == Reduce::median;
  PerViewPlan<Acc> plan{};
  const int64_t planes = args.reduce == Reduce::moments && args.variance ? 2
                         : stream && median                              ? kWindowPlanes
                                                                         : 1;
  call.set_field(plan, sizeof(T), planes * (stream ? sizeof(Acc) : sizeof(T)));
  plan.spread = stream && median ? spread_step(args.views) : 1;
  plan.y.step = args.grid[1] * args.token_strides[2];
  plan.x.step = args.token_strides[2];
  plan.ordered = workspace.take<View>(args.views);
  plan.sorted = workspace.take<View>(args.views);
  plan.scale = workspace.take<double>(1);
  ReadsPlan<Acc>* const axes[2] = {&plan.y, &plan.x};
  for (int i = 0; i < 2; ++i) {
    axes[i]->axis = call.axis(i);
    axes[i]->cells = axes[i]->axis.cells();
    axes[i]->max_taps = axes[i]->axis.max_taps();
    axes[i]->reads = workspace.take<Reads<Acc>>(axes[i]->cells * args.views);
    axes[i]->weight = workspace.take<Acc>(axes[i]->cells * args.views * axes[i]->max_taps);
  }
  plan.y.breaks = workspace.take<uint8_t>(plan.y.cells + plan.x.cells);
  plan.x.breaks = plan.y.breaks + plan.y.cells;
  plan.linear = args.stride[0] == 1 && args.stride[1] == 1;
  plan.tile = plan.linear ? std::min<int64_t>(args.patch[1], kRuns<Acc>) : kColumns;
  plan.columns = static_cast<int>(
      std::min<int64_t>(args.grid[1], args.upsample == Upsample::nearest ? 2 : kColumns));
  for (int64_t i = 0; i < 2; ++i)
    for (int j = 0; j < kColumns; ++j)
      plan.near[i][j] = (i * plan.y.step + std::min(j, plan.columns - 1) * plan.x.step) *
                        static_cast<int64_t>(sizeof(T));
  plan.variance = args.reduce == Reduce::moments ? args.variance : nullptr;
  plan.plane_stride = args.plane_stride;
  plan.total_weight = args.total_weight;
  plan.counts_views = median;
  return plan;
}

template <class T, class Acc = typename AccumulatorOf<T>::type>
int64_t reduce_as(const Call& call) {
  const EnsembleArgs& args = call.args;
  Workspace workspace(call.workspace);
  PerViewPlan<Acc> plan = make_plan<T>(call, workspace);
  InlineArrays parameters;
  RawViews raw = raw_views(call, workspace, parameters);
  raw.absolute_weights = args.total_weight != nullptr;
  if (!call.workspace) return workspace.bytes();

  const int64_t rows = plan.y.cells, cells = plan.x.cells;
  const int64_t reads = div_up(args.views * (rows + cells), kThreads);
  sort_views(call, raw, parameters, plan.sorted, plan.scale);
  launch(call.op, fill_reads_kernel<Acc>, reads, call.stream, plan);
  launch(call.op, find_changes<Acc>, reads, call.stream, plan);
  const int64_t tiles = args.batch * rows * div_up(cells, plan.tile);
  const int64_t groups = div_up(args.channels, kWarpThreads);
  if (tiles * groups > 0) {
    plan.groups = std::min(groups, div_up(tiles * groups, kEnoughBlocks));
    launch(call.op, choose_kernel<T>(args), tiles * div_up(groups, plan.groups), call.stream, plan);
  }
  if (args.total_weight)
    launch(call.op, add_weights<Acc>, div_up(rows * cells, kThreads), call.stream, plan);
  return workspace.bytes();
}

}  // namespace

int64_t run_per_view(const Call& call) {
  if (!call.args.total_weight && (call.args.batch == 0 || call.args.channels == 0)) return 0;
  return dispatch_floating(call.args.dtype,
                           [&](auto element) { return reduce_as<decltype(element)>(call); });
}

}  // namespace srt::cuda
