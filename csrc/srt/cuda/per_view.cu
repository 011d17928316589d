// The reductions on the device that need the value of every view in a cell: the median and the
// moments, from tokens [V, B, h*w, C] to a field [B, C, H', W'] (or to mean and variance), and the
// update of a stream by a chunk of views. A block computes a few cells of an output row, 32
// channels at a time. Along a row, a view is linear between its tokens. So the block combines the
// token rows of every view once, into shared memory, and each cell only blends two columns of the
// result per view. A warp processes a run of equal cells, a thread one channel; the median of up to
// 50 views is selected in registers. Small kernels compute the tables from the offsets on the
// device, so nothing is copied back to the host.
#include <type_traits>

#include "../running_median.h"
#include "view_tables.cuh"

namespace srt::cuda {
namespace {

// Token columns of a view in shared memory: as many as the pixels of one token width can read. If a
// cell is more than one pixel, the same memory holds the values of kColumns cells instead.
constexpr int kColumns = 3;

template <class Acc>
struct PerViewPlan : FieldPlan {
  ViewTables<Acc> tables;
  int64_t spread;                // views are added in steps of `spread` (spread_step)
  uint8_t* breaks[2];            // [H'] and [W']; 1 if a cell differs from the one before it
  int64_t row_step, token_step;  // between tokens, in elements
  bool linear;                   // a cell is one pixel: at most two taps along each axis
  int columns;                   // token columns of a view that a tile reads, if `linear`
  int64_t tile;                  // cells of a block
  int64_t groups;                // of 32 channels, which a block processes in sequence
  void* variance;                // as `out`
  // For streams only (ensemble.h).
  int64_t plane_stride;
  double* total_weight;  // [H', W']
  double* scale;         // View::weight * scale is in units of `total_weight`
  bool counts_views;

  // The table index of the view that is added at turn i.
  __device__ int64_t view_at(int64_t i) const { return i * spread % views; }
};

// ---- the tables ---------------------------------------------------------------------------------

template <class Acc>
__device__ bool equals_the_one_before(const AxisTable<Acc>& table, int64_t slot) {
  if (table.count[slot] != table.count[slot - 1] || table.taps[slot] != table.taps[slot - 1] ||
      table.first[slot] != table.first[slot - 1])
    return false;
  bool equal = true;
  const Acc* const weight = table.weight + slot * table.max_taps;
  for (int32_t k = 0; k < table.taps[slot]; ++k)
    equal = equal && weight[k] == weight[k - table.max_taps];
  return equal;
}

// Finds the cells of each axis that differ from the previous one in some view. A block processes
// one cell, a thread some of the views.
template <class Acc>
__global__ void __launch_bounds__(kThreads)
    find_breaks(const __grid_constant__ PerViewPlan<Acc> plan) {
  const AxisTable<Acc>&y = plan.tables.y.table, &x = plan.tables.x.table;
  SRT_FOR_BLOCK(i, plan.tables.cells()) {
    const AxisTable<Acc>& table = i < y.cells ? y : x;
    const int64_t cell = i < y.cells ? i : i - y.cells;
    bool breaks = cell == 0;
    for (int64_t v = threadIdx.x; v < plan.views && !breaks; v += kThreads)
      breaks = !equals_the_one_before(table, v * table.cells + cell);
    breaks = __syncthreads_or(breaks);
    if (threadIdx.x == 0) plan.breaks[i < y.cells ? 0 : 1][cell] = breaks;
  }
}

// ---- values -------------------------------------------------------------------------------------

// Runs of a tile, at most; static shared memory is limited to 48 KB.
template <class Acc>
constexpr int kRuns = sizeof(Acc) == 8 ? kColumns : 16;
constexpr int64_t kEnoughBlocks = 2048;  // with fewer, a block processes one group

// The shared memory of a block: data common to all channels of a tile, and the columns of 32
// channels. The value of a view in a run is `row(at[0]) * weight[0] + row(at[1]) * weight[1]`; an
// absent tap reads a row of zeros.
template <class T, class Reduction>
struct Stage {
  using Acc = typename AccumulatorOf<T>::type;
  static constexpr int kViews = Reduction::kViews;                   // more are staged in turns
  static constexpr int kZeros = 0, kLow = 1, kHigh = 2, kFixed = 3;  // rows of 0, -inf, inf
  static constexpr int kAbsent = -1;  // at[0] of a view that does not count, until it is removed

  struct alignas(kVectorBytes) Blend {
    int32_t at[2];  // byte offsets into `rows`
    Acc weight[2];
  };
  struct Source {
    const T* token;  // channel 0 of the first token that is read if `linear`, otherwise of token 0
    Acc weight[2];   // of the two token rows
    int32_t row;     // distance from the first row to the second
    int32_t column[kColumns - 1];  // distances from the first column to the others
  };
  struct Share {
    Acc weight;  // of the view in the cell
    Acc part;    // `weight` as a fraction of the weights so far
  };

  Blend blend[kRuns<Acc>][kViews];
  Source source[kViews];
  Acc rows[kFixed + kViews * kColumns][kWarpThreads];
  Share share[Reduction::kWeighted ? kRuns<Acc> : 1][kViews];
  int32_t counted[kRuns<Acc>];    // staged views that count
  double weight[kRuns<Acc>];      // of all views so far
  int64_t image, y, y_end;        // of the tile; rows [y, y_end) are equal
  int32_t begin[kRuns<Acc> + 1];  // first cell of each run
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
  int64_t channel;  // may be beyond the last channel: the thread then only helps to stage
  int run;          // may be beyond the last run: the warp then only helps to stage

  static __device__ int lane() { return static_cast<int>(threadIdx.x) % kWarpThreads; }
  static __device__ int warp() { return static_cast<int>(threadIdx.x) / kWarpThreads; }
  __device__ int staged(int64_t first) const {  // number of staged views
    return static_cast<int>(min(int64_t{Stage::kViews}, plan.views - first));
  }
  __device__ bool staged_once() const { return plan.views <= Stage::kViews; }

  // Lists the runs of the tile that begins at row y and cell x. Called by one thread.
  __device__ void stage_runs(int64_t image, int64_t y, int64_t x) const {
    const int32_t end = static_cast<int32_t>(min(x + plan.tile, plan.tables.x.table.cells));
    stage.runs = 0;
    for (int32_t cell = static_cast<int32_t>(x); cell < end; ++cell)
      if (cell == x || !Reduction::kCopies || plan.breaks[1][cell])
        stage.begin[stage.runs++] = cell;
    stage.begin[stage.runs] = end;
    stage.image = image;
    stage.y = y;
    do {
      ++y;
    } while (Reduction::kCopies && y < plan.tables.y.table.cells && !plan.breaks[0][y]);
    stage.y_end = y;
  }

  // Stages the views starting at `first`. First, each thread stages one view of one run; then each
  // thread removes the views of one run that do not count.
  __device__ void stage_views(int64_t first) const {
    constexpr int kViews = Stage::kViews;
    const int views = staged(first), own = static_cast<int>(threadIdx.x);
#pragma unroll 1
    for (int i = own; i < stage.runs * kViews; i += kThreads) {
      const int run = i / kViews, k = i % kViews;
      typename Stage::Blend& blend = stage.blend[run][k];
      blend.at[0] = Stage::kAbsent;
      if (k >= views) continue;
      const int64_t v = plan.view_at(first + k);
      const AxisTable<Acc>&ty = plan.tables.y.table, &tx = plan.tables.x.table;
      const int64_t slot_y = v * ty.cells + stage.y, slot_x = v * tx.cells + stage.begin[run];
      // The first place of the columns in shared memory. tx.first is 0 for a cell that is not
      // covered.
      int32_t from = 0;
      if (plan.linear)
        from = min(tx.first[v * tx.cells + stage.begin[0]],
                   static_cast<int32_t>(plan.tables.x.axis.places()) - plan.columns);
      const View view = plan.tables.sorted[v];
      if (run == 0) stage_source(k, v, view.index, from);
      const double count = ty.count[slot_y] * tx.count[slot_x];
      if (!(count > 0)) continue;
      const int column = plan.linear ? tx.first[slot_x] - from : run;
      for (int j = 0; j < 2; ++j) {
        const Acc weight = plan.linear ? tap(tx, slot_x, j) : static_cast<Acc>(1 - j);
        blend.at[j] = weight != 0 ? Stage::place(k, column + j) : Stage::place(Stage::kZeros);
        blend.weight[j] = weight;
      }
      if constexpr (Reduction::kWeighted)
        stage.share[run][k].weight = static_cast<Acc>(count * view.weight);
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

  // Stages where to read view v, the k-th staged view. If there are fewer columns than kColumns,
  // the last one is read again.
  __device__ void stage_source(int k, int64_t v, int64_t index, int32_t from) const {
    const AxisTable<Acc>& table = plan.tables.y.table;
    const int64_t slot = v * table.cells + stage.y, first = table.first[slot];
    const auto row = [&](int64_t place) { return plan.tables.y.token_at(v, place); };
    const auto column = [&](int64_t place) { return plan.tables.x.token_at(v, place); };
    typename Stage::Source& source = stage.source[k];
    source.token = static_cast<const T*>(plan.tokens) + stage.image * plan.token_strides[1] +
                   index * plan.token_strides[0];
    for (int i = 0; i < 2; ++i) source.weight[i] = tap(table, slot, i);
    if (!plan.linear) return;
    source.token += row(first) * plan.row_step + column(from) * plan.token_step;
    source.row = static_cast<int32_t>(row(first + 1) - row(first));
    for (int j = 1; j < kColumns; ++j)
      source.column[j - 1] =
          static_cast<int32_t>(column(from + min(j, plan.columns - 1)) - column(from));
  }

  // Loads the columns of all staged views for this channel; if a cell is more than one pixel,
  // computes the values themselves.
  __device__ void stage_rows(int64_t first) const {
    const int views = staged(first);
    const bool exists = channel < plan.channels;
    for (int k = warp(); k < views; k += kWarps) {
      const typename Stage::Source source = stage.source[k];
      const T* const token = source.token + channel;
      Acc* const rows = stage.rows[Stage::kFixed + k * kColumns] + lane();
      if (plan.linear) {
        T read[2][kColumns] = {};  // all loads before the first use
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (!exists || source.weight[i] == 0) continue;
          const T* const row = token + i * source.row * plan.row_step;
#pragma unroll
          for (int j = 0; j < kColumns; ++j)
            read[i][j] = load(row + (j > 0 ? source.column[j - 1] : 0) * plan.token_step);
        }
#pragma unroll
        for (int j = 0; j < kColumns; ++j)
          rows[j * kWarpThreads] =
              source.weight[0] * to_acc(read[0][j]) + source.weight[1] * to_acc(read[1][j]);
      } else if (exists) {
#pragma unroll 1
        for (int r = 0; r < stage.runs; ++r)
          rows[r * kWarpThreads] = value(plan.view_at(first + k), stage.begin[r], token);
      }
    }
  }

  // The weight of tap k; 0 if there is no such tap.
  static __device__ Acc tap(const AxisTable<Acc>& table, int64_t slot, int k) {
    return k < table.taps[slot] ? table.weight[slot * table.max_taps + k] : 0;
  }

  // The value of a view in cell x, for any number of taps.
  __device__ Acc value(int64_t v, int64_t x, const T* token) const {
    const AxisTable<Acc>&ty = plan.tables.y.table, &tx = plan.tables.x.table;
    const int64_t slot_y = v * ty.cells + stage.y, slot_x = v * tx.cells + x;
    const Acc* const wy = ty.weight + slot_y * ty.max_taps;
    const Acc* const wx = tx.weight + slot_x * tx.max_taps;
    Acc sum = 0;
#pragma unroll 1
    for (int32_t i = 0; i < ty.taps[slot_y]; ++i) {
      if (wy[i] == 0) continue;
      const T* const row = token + plan.tables.y.token_at(v, ty.first[slot_y] + i) * plan.row_step;
#pragma unroll 1
      for (int32_t j = 0; j < tx.taps[slot_x]; ++j) {
        if (wx[j] == 0) continue;
        const int64_t column = plan.tables.x.token_at(v, tx.first[slot_x] + j);
        sum += wy[i] * wx[j] * to_acc(load(row + column * plan.token_step));
      }
    }
    return sum / static_cast<Acc>(ty.count[slot_y] * tx.count[slot_x]);
  }

  // The value of the k-th staged view in this run. The operations are written explicitly, because
  // the value is computed several times and must be bitwise equal each time.
  __device__ Acc value(int k) const {
    const typename Stage::Blend blend = stage.blend[run][k];
    const auto row = [&](int32_t at) {
      return *reinterpret_cast<const Acc*>(reinterpret_cast<const char*>(stage.rows[0] + lane()) +
                                           at);
    };
    return fma(blend.weight[0], row(blend.at[0]), blend.weight[1] * row(blend.at[1]));
  }

  // Calls visit(value, share) for each view that counts. All threads of the block must call it the
  // same number of times, because more than kViews views are staged in turns, with barriers.
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

  // Calls visit(offset in the output, number of the cell) for each cell of the run.
  template <class Visit>
  __device__ void each_cell(Visit&& visit) const {
    if (channel >= plan.channels || run >= stage.runs) return;
    const int64_t at = stage.image * plan.out_strides[0] + channel * plan.out_strides[1];
    for (int64_t y = stage.y; y < stage.y_end; ++y)
      for (int64_t x = stage.begin[run]; x < stage.begin[run + 1]; ++x)
        visit(at + y * plan.out_strides[2] + x * plan.out_strides[3],
              y * plan.tables.x.table.cells + x);
  }

  __device__ void write(void* to, Acc value) const {
    const T element = from_acc<T>(value);
    each_cell(
        [&](int64_t at, int64_t) { store(static_cast<T*>(to) + at, element, plan.keep_in_l2); });
  }
};

// ---- reductions ---------------------------------------------------------------------------------

// A reduction defines kBlocks, the resident blocks per multiprocessor, which share its 65536
// registers. prepare() is called by one thread per run after its views are staged. reduce()
// computes one channel of a run.

// Defaults of the reductions.
template <class T>
struct Common {
  static constexpr int kViews = 50;
  static constexpr int kBlocks = sizeof(T) == 8 ? 2 : 3;
  static constexpr bool kWeighted = false;  // whether it uses shares
  static constexpr bool kCopies = true;     // whether all cells of a run get the same result
  template <class Stage>
  static __device__ void prepare(Stage&, int, bool) {}
};

// Orders a NaN both below and above every number, so that it propagates to the median.
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

  // Pads the views that count with infinities of alternating sign, which keeps the median
  // (low_padding); -inf comes first if N is odd.
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

// The median of any number of views. Determines the bits of the result from the highest to the
// lowest; for each bit it computes all values again and counts those below a candidate. Numbers are
// compared by integer keys of the same order.
template <class T>
struct CountingMedian : Common<T> {
  using Acc = typename AccumulatorOf<T>::type;
  using Key = typename std::conditional<sizeof(Acc) == 8, int64_t, int32_t>::type;
  static constexpr int kBits = 8 * sizeof(Key);
  static constexpr Key kTop = Key{1} << (kBits - 2);  // the highest bit below the sign

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
    const auto reach = [&](Key key) {  // whether at most half of the keys are below `key`
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

// Mean and variance; in a stream, of the state and the chunk combined. The sum of squared
// deviations is updated as in West (1979), for the distances from the first value: compared with a
// large mean they are small, and so are their rounding errors.
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
    Acc first = NAN, distance = 0, sum = 0, squares = 0;
    cell.each_value([&](Acc value, auto share) {
      if (first != first) first = value;
      sum += share.weight * value;
      const Acc own = value - first, apart = own - distance;
      distance += share.part * apart;
      squares += share.weight * apart * (own - distance);
    });
    if (cell.run >= cell.stage.runs) return;
    const double weight = cell.stage.weight[cell.run];
    const Acc mean = weight > 0 ? sum / static_cast<Acc>(weight) : 0;
    const Acc variance = weight > 0 ? squares / static_cast<Acc>(weight) : 0;
    if (cell.plan.total_weight) {
      join(cell, weight, mean, variance);
    } else {
      cell.write(cell.plan.out, mean);
      cell.write(cell.plan.variance, variance);
    }
  }

  // Combines the state and a chunk as two samples (Chan, Golub and LeVeque 1979). The stream of a
  // mean has no variance.
  template <class Cell>
  static __device__ void join(const Cell& cell, double weight, Acc mean, Acc variance) {
    const PerViewPlan<Acc>& plan = cell.plan;
    const double chunk = *plan.scale * weight;
    cell.each_cell([&](int64_t at, int64_t number) {
      const double before = plan.total_weight[number], total = before + chunk;
      Acc* const old_mean = static_cast<Acc*>(plan.out) + at;
      Acc* const old_variance = static_cast<Acc*>(plan.variance) + at;
      const double share = total > 0 ? 1 / total : 0;
      const Acc keep = static_cast<Acc>(before * share), added = static_cast<Acc>(chunk * share);
      Acc new_mean = mean, new_variance = variance;
      if (keep != 0 && added == 0) {  // below the precision of the state
        new_mean = *old_mean;
        if (plan.variance) new_variance = *old_variance;
      } else if (keep != 0) {  // a cell that has no weight yet has no state
        const Acc old = *old_mean, apart = mean - old;
        // The first form has the smaller rounding error; the second keeps an infinite mean.
        new_mean = apart - apart == 0 ? old + added * apart : keep * old + added * mean;
        if (plan.variance)
          new_variance = keep * *old_variance + added * variance + keep * added * apart * apart;
      }
      store(old_mean, new_mean, plan.keep_in_l2);
      if (plan.variance) store(old_variance, new_variance, plan.keep_in_l2);
    });
  }
};

template <class T>
struct StreamMedian : Common<T> {
  using Acc = typename AccumulatorOf<T>::type;
  static constexpr bool kCopies = false;  // every cell has its own state
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
  const int64_t rows = plan.tables.y.table.cells;
  const int64_t tiles = div_up(plan.tables.x.table.cells, plan.tile);
  const int64_t step = plan.groups * kWarpThreads, parts = div_up(plan.channels, step);
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  if (threadIdx.x < kWarpThreads) {
    stage.rows[Stage::kZeros][lane] = 0;
    stage.rows[Stage::kLow][lane] = -static_cast<Acc>(INFINITY);
    stage.rows[Stage::kHigh][lane] = static_cast<Acc>(INFINITY);
  }
  // Tiles of a row vary fastest, because consecutive blocks then read the same token rows.
  SRT_FOR_BLOCK(i, plan.batch * rows * parts * tiles) {
    const int64_t y = i / tiles / parts % rows, begin = i / tiles % parts * step;
    if (Reduction::kCopies && !plan.breaks[0][y]) continue;
    Cell<T, Reduction> cell{plan, stage, begin + lane, 0};
    __syncthreads();
    if (threadIdx.x == 0) cell.stage_runs(i / tiles / parts / rows, y, i % tiles * plan.tile);
    __syncthreads();
    if (cell.staged_once()) cell.stage_views(0);
    // Whole warps enter the loops, because all threads help to stage.
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

// Adds the weight of a chunk to the total weight of each cell, after per_view_kernel has read it.
template <class Acc>
__global__ void __launch_bounds__(kThreads)
    add_weights(const __grid_constant__ PerViewPlan<Acc> plan) {
  plan.tables.visit_weights(plan.counts_views, [&](int64_t cell, double total) {
    plan.total_weight[cell] += plan.counts_views ? total : *plan.scale * total;
  });
}

// ---- on the host --------------------------------------------------------------------------------

template <class T>
using Kernel = void (*)(PerViewPlan<typename AccumulatorOf<T>::type>);

template <class T>
Kernel<T> choose_kernel(const EnsembleArgs& args) {
  if (args.reduce != Reduce::median) return per_view_kernel<T, Moments<T>>;  // a mean: a stream
  if (args.total_weight) return per_view_kernel<T, StreamMedian<T>>;
  return with_network(
      args.views, [](auto n) -> Kernel<T> { return per_view_kernel<T, NetworkMedian<T, n>>; },
      []() -> Kernel<T> { return per_view_kernel<T, CountingMedian<T>>; });
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
  plan.row_step = args.grid[1] * args.token_strides[2];
  plan.token_step = args.token_strides[2];
  plan.tables = ViewTables<Acc>(call, workspace);
  plan.scale = workspace.take<double>(1);
  plan.breaks[0] = workspace.take<uint8_t>(plan.tables.y.table.cells);
  plan.breaks[1] = workspace.take<uint8_t>(plan.tables.x.table.cells);
  plan.linear = args.stride[0] == 1 && args.stride[1] == 1;
  plan.tile = plan.linear ? std::min<int64_t>(args.patch[1], kRuns<Acc>) : kColumns;
  plan.columns = static_cast<int>(std::min<int64_t>(
      plan.tables.x.axis.places(), args.upsample == Upsample::nearest ? 2 : kColumns));
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

  const int64_t rows = plan.tables.y.table.cells, cells = plan.tables.x.table.cells;
  sort_views(call, raw, parameters, plan.tables.sorted, plan.scale);
  launch(call.op, fill_view_tables<Acc>, div_up(args.views * (rows + cells), kThreads), call.stream,
         plan.tables);
  launch(call.op, find_breaks<Acc>, rows + cells, call.stream, plan);
  const int64_t tiles = args.batch * rows * div_up(cells, plan.tile);
  const int64_t groups = div_up(args.channels, kWarpThreads);
  if (tiles * groups > 0) {
    plan.groups = std::min(groups, div_up(tiles * groups, kEnoughBlocks));
    launch(call.op, choose_kernel<T>(args), tiles * div_up(groups, plan.groups), call.stream, plan);
  }
  if (args.total_weight)
    launch(call.op, add_weights<Acc>, plan.tables.weight_blocks(), call.stream, plan);
  return workspace.bytes();
}

}  // namespace

int64_t run_per_view(const Call& call) {
  if (!call.args.total_weight && (call.args.batch == 0 || call.args.channels == 0)) return 0;
  return dispatch_floating(call.args.dtype,
                           [&](auto element) { return reduce_as<decltype(element)>(call); });
}

}  // namespace srt::cuda
