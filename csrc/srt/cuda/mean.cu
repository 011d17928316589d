// The mean on the device: its sums along y are dense, those along x a walk (walk.h). The views that
// share a dx are a group. For each row of the output, a "column" is one token position of a group,
// summed over its views and the token rows that they read. A walk over the columns makes the cells.
// Two small kernels make the tables from the offsets, wherever these lie. Nothing ever comes back
// to the host.
#include <limits>

#include "../axis.h"
#include "../walk.h"
#include "common.cuh"

namespace srt::cuda {
namespace {

// A block makes a tile of rows x intervals of cells x channels, and so many columns at a time: a
// "round". Their sums stay in shared memory, which has 48 KB.
constexpr int kLanes = 8;  // along the channels
constexpr int kRows = 8;
constexpr int kIntervals = 4;
constexpr int kCells = 16;  // of an interval; as many sums does a thread keep for each channel
constexpr int kTileCells = kIntervals * kCells;
constexpr int kRoundColumns = 44;
constexpr int kResident = 2;  // blocks that a processor holds at a time
constexpr int kSumRows = 4;   // that a thread sums
constexpr int kAhead = 3;     // tokens that it loads before it uses the first of them

template <class Acc>
constexpr int kChannels = kVectorBytes / static_cast<int>(sizeof(Acc));  // of a thread

// One token column of the views begin to end - 1, which share a dx.
struct alignas(kVectorBytes) Column {
  int32_t begin, end;
  int32_t token;
};

// What a step of the walk adds for a column of the round.
template <class Acc>
struct alignas(kVectorBytes) Tap {
  int32_t column;
  Acc value, slope;
};

// The step before a cell: taps begin to end - 1.
template <class Acc>
struct alignas(kVectorBytes) Step {
  int32_t begin, end;
  Acc t;            // the distance of the cell from the centre of its interval
  int32_t is_anew;  // the taps are added to sums of 0
};

// A token row of a view: its first token, in elements, and its weights in the rows of a tile, times
// that of the view.
template <class Acc>
struct alignas(kVectorBytes) Input {
  int64_t offset;
  Pack<Acc, kSumRows> weight[kRows / kSumRows];
};

template <class Acc>
struct MeanPlan : FieldPlan {
  Axis y, x;
  int64_t row_blocks, x_tiles, tiles;
  int64_t interval;  // cells of one: whole intervals of the walk; kCells where cells are larger
  View* sorted;      // [V] by dx
  // Along y: the token rows that kRows rows read in a view, from the first one on.
  int64_t inputs;
  Input<Acc>* input;  // [row_blocks, V, inputs]
  // Along x: the columns of a tile, of each group the same number, and the steps of its walk.
  int64_t columns, max_columns, max_rounds, max_taps;
  int32_t* total_columns;  // [x_tiles]
  Column* column;          // [x_tiles, max_columns]
  Step<Acc>* step;         // [x_tiles, max_rounds, kTileCells]
  Tap<Acc>* tap;           // [x_tiles, max_taps]
  Acc* inverse;  // [row_blocks * kRows, x_tiles * kTileCells] 1 / total weight, 0 for none

  // The cell at a place of the tiles of a row; -1 where there is none.
  __device__ int64_t cell_at(int64_t place) const {
    const int64_t cell = place / kCells * interval + place % kCells;
    return place % kCells < interval && cell < x.cells() ? cell : -1;
  }
};

// ---- the tables ---------------------------------------------------------------------------------

// Whether v is the first of the views that share its dx, and counts.
__device__ inline bool leads(const View* sorted, int64_t v) {
  return sorted[v].weight > 0 && (v == 0 || sorted[v - 1].dx != sorted[v].dx);
}

// The first of `count` tokens among which are all that a view reads from pixel y on.
__device__ inline int32_t first_token(Axis axis, double offset, int64_t y, int64_t count) {
  axis.border = Border::clamp;
  return min(read_pixel(axis, offset, y).token, static_cast<int32_t>(axis.tokens - count));
}

// What a block of rows reads in a view.
template <class Acc>
__device__ void fill_rows(const MeanPlan<Acc>& plan, int64_t block, int64_t v) {
  const View view = plan.sorted[v];
  if (!(view.weight > 0)) return;
  const int64_t y = block * kRows;
  const int32_t first = first_token(plan.y, view.dy, y * plan.y.stride, plan.inputs);
  Input<Acc>* const input = plan.input + (block * plan.views + v) * plan.inputs;
  for (int64_t i = 0; i < plan.inputs; ++i)
    input[i] = {
        view.index * plan.token_strides[0] + (first + i) * plan.x.tokens * plan.token_strides[2],
        {}};
  for (int64_t r = 0; r < min(int64_t{kRows}, plan.y.cells() - y); ++r) {
    visit_axis_cell(plan.y, view.dy, y + r, [&](int32_t token, double value) {
      input[token - first].weight[r / kSumRows].at[r % kSumRows] =
          static_cast<Acc>(view.weight) * static_cast<Acc>(value);
    });
  }
}

// The columns of one tile, group by group. Returns how many. By a whole block.
template <class Acc>
__device__ int32_t list_columns(const MeanPlan<Acc>& plan, int64_t tile, Column* columns) {
  const int64_t x = tile * kIntervals * plan.interval * plan.x.stride;
  int32_t groups = 0;
  for (int64_t from = 0; from < plan.views; from += kThreads) {
    const int64_t v = from + threadIdx.x;
    const bool makes = v < plan.views && leads(plan.sorted, v);
    int64_t group = groups;
    group += exclusive_sum(makes, groups);
    if (!makes) continue;
    const double dx = plan.sorted[v].dx;
    int64_t end = v + 1;
    while (end < plan.views && plan.sorted[end].dx == dx) ++end;
    const int32_t first = first_token(plan.x, dx, x, plan.columns);
    for (int32_t i = 0; i < plan.columns; ++i)
      columns[group * plan.columns + i] = {static_cast<int32_t>(v), static_cast<int32_t>(end),
                                           first + i};
  }
  return groups * static_cast<int32_t>(plan.columns);
}

// The walk of one tile, by a whole block: a thread a cell.
template <class Acc>
__device__ void fill_steps(const MeanPlan<Acc>& plan, int64_t tile) {
  Column* const columns = plan.column + tile * plan.max_columns;
  const int32_t total = list_columns(plan, tile, columns);
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) plan.total_columns[tile] = total;
  const int64_t x = thread < kTileCells ? plan.cell_at(tile * kTileCells + thread) : -1;
  // A cell of several pixels is no walk.
  const bool pixels = plan.x.stride == 1;
  bool anew = x < 0 || !pixels || x % walk_interval(plan.x) == 0;
  for (int32_t i = 0; !anew && i < total; i += static_cast<int32_t>(plan.columns))
    anew = stops_at(plan.x, plan.sorted[columns[i].begin].dx, x);
  const Acc t = x >= 0 && pixels ? static_cast<Acc>(walk_position(plan.x, x)) : 0;

  Step<Acc>* step = plan.step + tile * plan.max_rounds * kTileCells + thread;
  int32_t taps = 0;
  for (int32_t round = 0; round < total; round += kRoundColumns, step += kTileCells) {
    // Calls tap(column, value, slope) for the columns of the round, ascending.
    const auto visit = [&](auto&& tap) {
      const int32_t group = static_cast<int32_t>(plan.columns);
      const int32_t end = x < 0 ? 0 : min(round + kRoundColumns, total);
      for (int32_t i = round / group * group; i < end; i += group) {
        const auto add = [&](int32_t token, double value, double slope) {
          const int32_t column = i + token - columns[i].token;
          if (column >= round && column < end) tap(column - round, value, slope);
        };
        const double dx = plan.sorted[columns[i].begin].dx;
        if (pixels) {
          visit_step(plan.x, dx, x, anew, add);
        } else {
          visit_axis_cell(plan.x, dx, x,
                          [&](int32_t token, double value) { add(token, value, 0); });
        }
      }
    };
    int32_t count = 0, begin = taps;
    visit([&](int32_t, double, double) { ++count; });
    begin += exclusive_sum(count, taps);
    if (thread < kTileCells) *step = {begin, begin + count, t, anew};
    Tap<Acc>* tap = plan.tap + tile * plan.max_taps + begin;
    visit([&](int32_t column, double value, double slope) {
      *tap++ = {column, static_cast<Acc>(value), static_cast<Acc>(slope)};
    });
  }
}

__device__ inline int32_t counted_pixels(const Axis& axis, double offset, int64_t cell) {
  int32_t counted = 0;
  for (int64_t y = cell * axis.stride; y < (cell + 1) * axis.stride; ++y)
    counted += read_pixel(axis, offset, y).counts;
  return counted;
}

// The inverses of a block of rows, by a whole block: a thread a cell, some views at a time.
template <class Acc>
__device__ void fill_inverse(const MeanPlan<Acc>& plan, int64_t block, int64_t place) {
  constexpr int kViews = kThreads / kRows;
  __shared__ double counts[kRows][kViews];  // along y, times the weight of the view
  const int own = static_cast<int>(threadIdx.x) % kViews,
            row = static_cast<int>(threadIdx.x) / kViews;
  const int64_t y = block * kRows + row, x = plan.cell_at(place);
  double total[kRows] = {};
  for (int64_t v = 0; v < plan.views; v += kViews) {
    __syncthreads();
    if (v + own < plan.views && y < plan.y.cells()) {
      // As it stands in the sums, in their type.
      const double weight = static_cast<double>(static_cast<Acc>(plan.sorted[v + own].weight));
      counts[row][own] = weight * counted_pixels(plan.y, plan.sorted[v + own].dy, y);
    } else {
      counts[row][own] = 0;
    }
    __syncthreads();
    for (int64_t i = 0; x >= 0 && i < min(int64_t{kViews}, plan.views - v); ++i) {
      const double count = counted_pixels(plan.x, plan.sorted[v + i].dx, x);
#pragma unroll
      for (int r = 0; r < kRows; ++r) total[r] += count * counts[r][i];
    }
  }
  if (place >= plan.x_tiles * kTileCells) return;
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    plan.inverse[(block * kRows + r) * plan.x_tiles * kTileCells + place] =
        total[r] > 0 ? static_cast<Acc>(1 / total[r]) : 0;
}

// Blocks make columns and steps, then rows, then inverses.
template <class Acc>
__global__ void __launch_bounds__(kThreads)
    fill_tables(const __grid_constant__ MeanPlan<Acc> plan, int64_t row_parts, int64_t cell_parts) {
  SRT_FOR_BLOCK(block, plan.x_tiles + row_parts + plan.row_blocks * cell_parts) {
    const int64_t rows = block - plan.x_tiles, inverse = rows - row_parts;
    if (rows < 0) {
      fill_steps(plan, block);
    } else if (inverse < 0) {
      const int64_t i = rows * kThreads + threadIdx.x;
      if (i < plan.row_blocks * plan.views) fill_rows(plan, i / plan.views, i % plan.views);
    } else {
      fill_inverse(plan, inverse / cell_parts, inverse % cell_parts * kThreads + threadIdx.x);
    }
  }
}

// ---- the mean -----------------------------------------------------------------------------------

// What all threads of a block share. It is read from shared memory whenever it is needed: in
// registers it would displace the sums.
template <class T, class Acc>
struct Tile {
  const T* tokens;  // of the image, from the first channel of the tile on
  T* out;
  int64_t y, x;  // its first row, and its first place in the tables of a row
  int32_t channels, columns;
  const Input<Acc>* input;
  const Column* column;
  const Step<Acc>* step;
  const Tap<Acc>* tap;
};

template <class T, class Acc>
__device__ Tile<T, Acc> tile_at(const MeanPlan<Acc>& plan, int64_t i) {
  // Blocks that run together share token rows: channels first, then along the row.
  constexpr int64_t kSize = kLanes * kChannels<Acc>;
  const int64_t chunks = div_up(plan.channels, kSize);
  const int64_t c = i % chunks * kSize, x = i / chunks % plan.x_tiles;
  const int64_t row = i / chunks / plan.x_tiles;
  const int64_t y = row % plan.row_blocks, b = row / plan.row_blocks;
  return {static_cast<const T*>(plan.tokens) + b * plan.token_strides[1] + c,
          static_cast<T*>(plan.out) + b * plan.out_strides[0] + c * plan.out_strides[1],
          y * kRows,
          x * kTileCells,
          static_cast<int32_t>(min(plan.channels - c, kSize)),
          plan.total_columns[x],
          plan.input + y * plan.views * plan.inputs,
          plan.column + x * plan.max_columns,
          plan.step + x * plan.max_rounds * kTileCells,
          plan.tap + x * plan.max_taps};
}

// The channels of a thread, of which there are n. kVector: all of them, aligned and dense.
template <class T, bool kVector>
struct Channels {
  using Acc = typename AccumulatorOf<T>::type;
  static constexpr int size = kChannels<Acc>;
  using Tokens = Pack<T, size>;

  static __device__ Tokens load_from(const T* from, int n) {
    Tokens tokens;
    if constexpr (kVector) {
      tokens = load(reinterpret_cast<const Tokens*>(from));
    } else {
#pragma unroll
      for (int e = 0; e < size; ++e) tokens.at[e] = e < n ? from[e] : T{};
    }
    return tokens;
  }
  // Adding 0 turns -0 into 0.
  static __device__ void store_to(T* to, const Acc (&sum)[size], Acc inverse, int n, int64_t step,
                                  bool keep_in_l2) {
    Tokens tokens;
#pragma unroll
    for (int e = 0; e < size; ++e) tokens.at[e] = from_acc<T>(sum[e] * inverse + Acc{0});
    if constexpr (kVector) {
      store(reinterpret_cast<Tokens*>(to), tokens, keep_in_l2);
    } else {
#pragma unroll
      for (int e = 0; e < size; ++e) {
        if (e < n) store(to + e * step, tokens.at[e], keep_in_l2);
      }
    }
  }
};

// Along y: the columns of a round from `first` on.
template <class T, bool kVector, class Acc, class Sums>
__device__ void sum_columns(const MeanPlan<Acc>& plan, const Tile<T, Acc>& tile, int32_t first,
                            Sums& sums) {
  using Channels = cuda::Channels<T, kVector>;
  constexpr int kThread = Channels::size, kParts = kRows / kSumRows;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int part = static_cast<int>(threadIdx.x) / kLanes % kParts;
  const int channels = tile.channels - lane * kThread;
  const int columns = channels > 0 ? min(kRoundColumns, tile.columns - first) : 0;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) / (kLanes * kParts); i < columns;
       i += kThreads / (kLanes * kParts)) {
    const Column column = load(tile.column + first + i);
    const T* const tokens = tile.tokens + lane * kThread + column.token * plan.token_strides[2];
    const Input<Acc>* input = tile.input + column.begin * plan.inputs;
    Acc sum[kSumRows][kThread] = {};
    int rest = (column.end - column.begin) * static_cast<int>(plan.inputs);
#pragma unroll 1
    for (; rest > 0; rest -= kAhead, input += kAhead) {
      typename Channels::Tokens token[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        if (j < rest) token[j] = Channels::load_from(tokens + load(&input[j].offset), channels);
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (j >= rest) break;
        const auto value = to_acc(token[j]);
        const auto of_row = load(&input[j].weight[part]);
#pragma unroll
        for (int r = 0; r < kSumRows; ++r) {
#pragma unroll
          for (int e = 0; e < kThread; ++e) sum[r][e] += of_row.at[r] * value.at[e];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kSumRows; ++r) {
#pragma unroll
      for (int e = 0; e < kThread; ++e) sums[i][part * kSumRows + r][lane].at[e] = sum[r][e];
    }
  }
}

// Along x: adds the columns of a round to the cells of an interval, in one row and in the channels
// of a thread. `sums`: of the first column; the next one is kRows * kLanes further.
template <class Acc, int kThread>
__device__ void walk(const Step<Acc>* steps, const Tap<Acc>* taps, const Pack<Acc, kThread>* sums,
                     Acc (&cells)[kCells][kThread]) {
  Step<Acc> next_step = load(steps);
  taps += next_step.begin;
  Tap<Acc> next_tap = load(taps);
  Acc value[kThread] = {}, slope[kThread] = {};
#pragma unroll
  for (int i = 0; i < kCells; ++i) {
    const Step<Acc> step = next_step;
    if (i + 1 < kCells) next_step = load(steps + i + 1);
    if (step.is_anew) {
#pragma unroll
      for (int e = 0; e < kThread; ++e) value[e] = slope[e] = 0;
    }
#pragma unroll 1
    for (int rest = step.end - step.begin; rest > 0; --rest) {
      const Tap<Acc> tap = next_tap;
      next_tap = load(++taps);
      const Pack<Acc, kThread> sum = sums[tap.column * kRows * kLanes];
#pragma unroll
      for (int e = 0; e < kThread; ++e) {
        value[e] += tap.value * sum.at[e];
        slope[e] += tap.slope * sum.at[e];
      }
    }
#pragma unroll
    for (int e = 0; e < kThread; ++e) cells[i][e] += step.t * slope[e] + value[e];
  }
}

// Cells whose walk is not finite, by the formula itself: a token that is not finite reaches only
// those that read it, and finite ones have no large sum on their way.
template <class T, bool kVector, class Acc>
__device__ __noinline__ void write_directly(const MeanPlan<Acc>& plan, const T* tokens, T* out,
                                            const Acc* inverse, int64_t y, int64_t x, int cells,
                                            int channels) {
  using Channels = cuda::Channels<T, kVector>;
  for (; cells > 0; --cells, ++x, ++inverse, out += plan.out_strides[3]) {
    Acc sum[Channels::size] = {};
    for (int64_t v = 0; v < plan.views && plan.sorted[v].weight > 0; ++v) {
      const View view = plan.sorted[v];
      visit_axis_cell(plan.y, view.dy, y, [&](int32_t row, double weight_y) {
        visit_axis_cell(plan.x, view.dx, x, [&](int32_t column, double weight_x) {
          const Acc weight = static_cast<Acc>(view.weight) * static_cast<Acc>(weight_y) *
                             static_cast<Acc>(weight_x);
          const int64_t n = row * plan.x.tokens + column;
          const auto value = to_acc(Channels::load_from(
              tokens + view.index * plan.token_strides[0] + n * plan.token_strides[2], channels));
#pragma unroll
          for (int e = 0; e < Channels::size; ++e) sum[e] += weight * value.at[e];
        });
      });
    }
    Channels::store_to(out, sum, *inverse, channels, plan.out_strides[1], plan.keep_in_l2);
  }
}

template <class T, bool kVector, class Acc = typename AccumulatorOf<T>::type>
__global__ void __launch_bounds__(kThreads, kResident)
    mean_kernel(const __grid_constant__ MeanPlan<Acc> plan) {
  using Channels = cuda::Channels<T, kVector>;
  constexpr int kThread = Channels::size;
  __shared__ Pack<Acc, kThread> sums[kRoundColumns][kRows][kLanes];
  __shared__ Tile<T, Acc> tile;

  // A warp walks along one interval of some rows: it takes the same steps in all of them.
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpThreads;
  const int lane = thread % kLanes, interval = warp % kIntervals;
  const int row = thread % kWarpThreads / kLanes + warp / kIntervals * (kWarpThreads / kLanes);
  SRT_FOR_BLOCK(i, plan.tiles) {
    __syncthreads();
    if (thread == 0) tile = tile_at<T>(plan, i);
    __syncthreads();
    Acc cells[kCells][kThread] = {};
    const Step<Acc>* steps = tile.step + interval * kCells;
#pragma unroll 1
    for (int32_t first = 0; first < tile.columns; first += kRoundColumns, steps += kTileCells) {
      sum_columns<T, kVector>(plan, tile, first, sums);
      __syncthreads();
      walk(steps, tile.tap, &sums[0][row][lane], cells);
      __syncthreads();
    }

    const int64_t y = tile.y + row, place = tile.x + interval * kCells;
    const int64_t x = place / kCells * plan.interval;
    const int channels = tile.channels - lane * kThread;
    const int count = static_cast<int>(min(plan.interval, plan.x.cells() - x));
    if (channels <= 0 || y >= plan.y.cells() || count <= 0) continue;
    T* to = tile.out + lane * kThread * plan.out_strides[1] + y * plan.out_strides[2] +
            x * plan.out_strides[3];
    const Acc* inverse = plan.inverse + y * plan.x_tiles * kTileCells + place;
    Acc check = 0;
#pragma unroll
    for (int c = 0; c < kCells; ++c) {
#pragma unroll
      for (int e = 0; e < kThread; ++e) check += cells[c][e];
    }
    if (!isfinite(check)) {
      write_directly<T, kVector>(plan, tile.tokens + lane * kThread, to, inverse, y, x, count,
                                 channels);
      continue;
    }
    Pack<Acc, 4> inverses;
#pragma unroll
    for (int c = 0; c < kCells; ++c, to += plan.out_strides[3]) {
      if (c % 4 == 0) inverses = load(reinterpret_cast<const Pack<Acc, 4>*>(inverse + c));
      if (c < count)
        Channels::store_to(to, cells[c], inverses.at[c % 4], channels, plan.out_strides[1],
                           plan.keep_in_l2);
    }
  }
}

// ---- on the host --------------------------------------------------------------------------------

// Whether every row of channels on both sides is a whole number of aligned vectors of n elements.
bool vectors_fit(const EnsembleArgs& args, int64_t n, int64_t element_size) {
  const auto fits = [&](int64_t size, int64_t stride) { return size == 1 || stride % n == 0; };
  const auto aligned = [&](const void* p) {
    return reinterpret_cast<uintptr_t>(p) % (n * element_size) == 0;
  };
  return aligned(args.tokens) && aligned(args.out) && args.channels % n == 0 &&
         args.out_strides[1] == 1 && fits(args.views, args.token_strides[0]) &&
         fits(args.batch, args.token_strides[1]) &&
         fits(args.grid[0] * args.grid[1], args.token_strides[2]) &&
         fits(args.batch, args.out_strides[0]) && fits(0, args.out_strides[2]) &&
         fits(0, args.out_strides[3]);
}

template <class T, class Acc = typename AccumulatorOf<T>::type>
MeanPlan<Acc> make_plan(const Call& call, Workspace& workspace) {
  MeanPlan<Acc> plan{};
  call.set_field(plan, sizeof(T), sizeof(T));
  const Axis &y = plan.y = call.axis(0), &x = plan.x = call.axis(1);
  plan.interval = kCells;
  if (x.stride == 1) plan.interval -= kCells % walk_interval(x);
  plan.row_blocks = div_up(y.cells(), kRows);
  plan.x_tiles = div_up(x.cells(), kIntervals * plan.interval);
  plan.tiles =
      plan.batch * plan.row_blocks * plan.x_tiles * div_up(plan.channels, kLanes * kChannels<Acc>);
  // So many cells span (pixels - 1) / patch tokens. Their first pixel may lie anywhere in a token,
  // and interpolation adds one.
  const auto tokens = [](const Axis& axis, int64_t cells) {
    const int64_t more = axis.upsample == Upsample::nearest ? 2 : 3;
    return std::min(axis.tokens, (cells * axis.stride - 1) / axis.patch + more);
  };
  plan.inputs = tokens(y, kRows);
  plan.columns = tokens(x, kIntervals * plan.interval);
  plan.max_columns = plan.views * plan.columns;
  plan.max_rounds = div_up(plan.max_columns, kRoundColumns);
  // A kink changes three tokens.
  plan.max_taps = plan.views * kTileCells * (x.stride == 1 ? 3 : x.max_taps());
  const int64_t most = std::max(plan.max_taps, plan.views * std::max(plan.inputs, plan.columns));
  if (most > INT32_MAX - kThreads)
    throw Error("srt::ensemble: on CUDA views * (tokens of " + std::to_string(kTileCells) +
                " output cells) must be below 2^31; got " + std::to_string(most));

  plan.sorted = workspace.take<View>(plan.views);
  plan.input = workspace.take<Input<Acc>>(plan.row_blocks * plan.views * plan.inputs);
  plan.total_columns = workspace.take<int32_t>(plan.x_tiles);
  plan.column = workspace.take<Column>(plan.x_tiles * plan.max_columns);
  plan.step = workspace.take<Step<Acc>>(plan.x_tiles * plan.max_rounds * kTileCells);
  // The walk loads the next one while it uses the last one.
  plan.tap = workspace.take<Tap<Acc>>(plan.x_tiles * plan.max_taps + 1);
  plan.inverse = workspace.take<Acc>(plan.row_blocks * kRows * plan.x_tiles * kTileCells);
  return plan;
}

template <class T>
int64_t mean(const Call& call) {
  using Acc = typename AccumulatorOf<T>::type;
  Workspace workspace(call.workspace);
  const auto plan = make_plan<T>(call, workspace);
  InlineArrays parameters;
  const RawViews raw = raw_views(call, workspace, parameters);
  if (!call.workspace) return workspace.bytes();

  sort_views(call, raw, parameters, plan.sorted, nullptr);
  const int64_t row_parts = div_up(plan.row_blocks * plan.views, kThreads);
  const int64_t cell_parts = div_up(plan.x_tiles * kTileCells, kThreads);
  launch(call.op, fill_tables<Acc>, plan.x_tiles + row_parts + plan.row_blocks * cell_parts,
         call.stream, plan, row_parts, cell_parts);
  const bool vector = vectors_fit(call.args, kChannels<Acc>, sizeof(T));
  launch(call.op, vector ? mean_kernel<T, true> : mean_kernel<T, false>, plan.tiles, call.stream,
         plan);
  return workspace.bytes();
}

}  // namespace

int64_t run_mean(const Call& call) {
  return dispatch_floating(call.args.dtype,
                           [&](auto element) { return mean<decltype(element)>(call); });
}

}  // namespace srt::cuda
