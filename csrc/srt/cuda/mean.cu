// The mean on the device:
//     mean = sum_v w_v A_v T_v B_v^T / sum_v w_v c_v d_v^T
// computes a field [B, C, H', W'] from tokens [V, B, h*w, C]. A_v [H', h] and B_v [W', w] are the
// weights with which view v reads the rows and columns of its tokens T_v [h, w]; c_v [H'] and d_v
// [W'] are the numbers of pixels that count in each row and column of cells. Views that share a dx
// share B_v and form a group. A "column" is one token position of a group: for an output row, it is
// the sum over the views of the group and over the token rows that they read.
//
// A block computes a tile of 8 rows x 64 cells x a few channels. It sums columns along y into
// shared memory, and walks along x (walk.h) over the columns of all groups, with the sums of the
// cells in registers. So tokens are loaded per tile rather than per cell, the cost of a cell
// between kinks does not depend on the number of views, and every output element is written once.
// Two small kernels compute the tables from the offsets on the device, so nothing is copied back to
// the host.
#include "../axis.h"
#include "../walk.h"
#include "common.cuh"
#include "view_tables.cuh"

namespace srt::cuda {
namespace {

// A block computes a tile of kRows rows x kStrips strips of cells x channels. It processes the
// columns in rounds of kRoundColumns, whose sums fit 48 KB of shared memory.
constexpr int kLanes = 8;  // threads along the channels
constexpr int kRows = 8;
constexpr int kStrips = 4;
constexpr int kCells = 16;  // of a strip, at most; all of them are summed by one thread
constexpr int kTileCells = kStrips * kCells;
constexpr int kRoundColumns = 44;
constexpr int kResident = 2;  // resident blocks per multiprocessor

// kSumRows: the rows that a thread sums for a column. kAhead: the tokens that it loads before it
// uses the first of them. Both are as large as the registers allow in addition to the sums of the
// cells.
template <class T, bool kVector>
constexpr int kSumRows = sizeof(T) == 2 && kVector ? 8 : 4;
template <class T, bool kVector>
constexpr int kAhead = sizeof(T) == 4 || !kVector ? 3 : 2;
// Channels per thread.
template <class Acc>
constexpr int kChannels = kVectorBytes / static_cast<int>(sizeof(Acc));
template <class Acc>
using Sum = Pack<Acc, kChannels<Acc>>;

// A token row of a view that a tile reads.
template <class Acc>
struct alignas(kVectorBytes) Input {
  int64_t offset;                           // of its first token, in elements
  alignas(kVectorBytes) Acc weight[kRows];  // for each row of the tile, times the view's weight
};

struct alignas(kVectorBytes) Column {
  int32_t view;           // the first view of the group
  int32_t place;          // along x (axis.h)
  int32_t token;          // along x
  int32_t group_columns;  // columns of the group in this tile
};

// The change of value and slope that a step of the walk makes for a column of the round.
template <class Acc>
struct alignas(kVectorBytes) Tap {
  int32_t at;  // index into the sums of the round
  Acc value, slope;
};

template <class Acc>
struct MeanPlan : FieldPlan {
  Axis y, x;
  int64_t rows, cells;
  int64_t strip;  // cells of a strip: whole intervals of the walk; kCells if the stride is not 1
  int64_t row_blocks, x_tiles, tiles;
  Acc position[kCells];  // of the cells of a strip, relative to the centre of the interval
  View* sorted;          // [V] by dx
  // The token rows that a block of rows reads: a list per group, stored at its first view.
  int64_t inputs;                             // token rows of a view, at most
  int32_t* total_inputs;                      // [row_blocks, V]
  Input<Acc>* input;                          // [row_blocks, V, inputs]
  int64_t max_columns, max_rounds, max_taps;  // per tile
  int32_t* total_columns;                     // [x_tiles]
  Column* column;                             // [x_tiles, max_columns]
  // The end of the taps of a cell in `tap`; ~end if value and slope restart from 0 at this cell.
  int32_t* step;  // [x_tiles, max_rounds, kTileCells]
  Tap<Acc>* tap;  // [x_tiles, max_taps]
  Acc* inverse;   // [row_blocks * kRows, x_tiles * kTileCells]; 1 / total weight, or 0

  // Cells are stored strip by strip, kCells entries per strip. Returns the cell of an entry, or -1
  // if it is unused.
  __device__ int64_t cell_at(int64_t place) const {
    const int64_t cell = place / kCells * strip + place % kCells;
    return place % kCells < strip && cell < cells ? cell : -1;
  }
};

// ---- the tables ---------------------------------------------------------------------------------

// The range of places that a view may read in `cells` cells, from its first and last pixel. A walk
// also has a tap for the token after the last one if that token has weight 0 there but a nonzero
// slope.
struct Span {
  int32_t first, count;
};
__device__ inline Span span_of(Axis axis, double offset, int64_t cell, int64_t cells) {
  if (!axis.wraps()) axis.border = Border::clamp;
  const PixelRead first = read_pixel(axis, offset, cell * axis.stride);
  const int64_t end = min((cell + cells) * axis.stride, axis.pixels());
  const PixelRead last = read_pixel(axis, offset, end - 1);
  return {first.token, last.token - first.token + 1 + (last.after > 0 || last.slope > 0)};
}

// Lists the token rows that a block of rows reads in view v, with their weights.
template <class Acc>
__device__ void fill_inputs(const MeanPlan<Acc>& plan, int64_t block, int64_t v) {
  const View* const views = plan.sorted;
  const View view = views[v];
  if (!(view.weight > 0)) return;
  const auto span = [&](int64_t u) { return span_of(plan.y, views[u].dy, block * kRows, kRows); };
  const Span own = span(v);
  int32_t before = 0;  // entries of earlier views of the group
  int64_t leader = v;
  for (; leader > 0 && views[leader - 1].dx == view.dx; --leader) before += span(leader - 1).count;
  const int64_t list = block * plan.views + leader;
  if (v + 1 == plan.views || views[v + 1].dx != view.dx)
    plan.total_inputs[list] = before + own.count;
  Input<Acc>* const input = plan.input + list * plan.inputs + before;
  const int64_t start = plan.y.start(view.dy);
  for (int64_t i = 0; i < own.count; ++i) {
    const int64_t token = plan.y.token_at(start, own.first + i) * plan.x.tokens;
    input[i] = {view.index * plan.token_strides[0] + token * plan.token_strides[2], {}};
  }
  for (int r = 0; r < kRows && block * kRows + r < plan.rows; ++r) {
    visit_axis_cell(plan.y, view.dy, block * kRows + r, [&](int32_t place, double value) {
      input[place - own.first].weight[r] = static_cast<Acc>(view.weight) * static_cast<Acc>(value);
    });
  }
}

// Lists the columns of a tile, group by group, and returns their number. Called by a whole block.
template <class Acc>
__device__ int32_t list_columns(const MeanPlan<Acc>& plan, int64_t tile, Column* columns) {
  const View* const views = plan.sorted;
  const int64_t cells = kStrips * plan.strip;
  int32_t total = 0;
  for (int64_t from = 0; from < plan.views; from += kThreads) {
    const int64_t v = from + threadIdx.x;
    const bool leads =
        v < plan.views && views[v].weight > 0 && (v == 0 || views[v - 1].dx != views[v].dx);
    const Span span = leads ? span_of(plan.x, views[v].dx, tile * cells, cells) : Span{};
    int32_t place = total;
    place += exclusive_sum(span.count, total);
    const int64_t start = leads ? plan.x.start(views[v].dx) : 0;
    for (int32_t i = 0; i < span.count; ++i) {
      const int64_t token = plan.x.token_at(start, span.first + i);
      columns[place + i] = {static_cast<int32_t>(v), span.first + i, static_cast<int32_t>(token),
                            span.count};
    }
  }
  return total;
}

// Computes the columns and the steps of a tile. Called by a whole block, with one thread per cell.
template <class Acc>
__device__ void fill_steps(const MeanPlan<Acc>& plan, int64_t tile) {
  Column* const columns = plan.column + tile * plan.max_columns;
  const int32_t total = list_columns(plan, tile, columns);
  const int thread = static_cast<int>(threadIdx.x);
  __syncthreads();
  if (thread == 0) plan.total_columns[tile] = total;
  const auto dx_of = [&](int32_t column) { return plan.sorted[columns[column].view].dx; };
  const int64_t x = thread < kTileCells ? plan.cell_at(tile * kTileCells + thread) : -1;
  const bool walks = plan.x.stride == 1;  // at other strides, each cell is summed separately
  bool restart = x < 0 || !walks || x % walk_interval(plan.x) == 0;
  for (int32_t i = 0; !restart && i < total; i += columns[i].group_columns)
    restart = stops_at(plan.x, dx_of(i), x);

  int32_t* step = plan.step + tile * plan.max_rounds * kTileCells + thread;
  int32_t taps = 0, first = 0;  // `first`: the first column of the first group in the round
  for (int32_t round = 0; round < total; round += kRoundColumns, step += kTileCells) {
    const int32_t end = x < 0 ? 0 : min(round + kRoundColumns, total);
    // Calls tap(column of the round, value, slope) for the changes at cell x.
    const auto visit = [&](auto&& tap) {
      for (int32_t i = first; i < end; i += columns[i].group_columns) {
        const auto add = [&](int32_t place, double value, double slope) {
          const int32_t column = i + place - columns[i].place;
          if (column >= round && column < end) tap(column - round, value, slope);
        };
        if (walks) {
          visit_step(plan.x, dx_of(i), x, restart, add);
        } else {
          visit_axis_cell(plan.x, dx_of(i), x, [&](int32_t place, double w) { add(place, w, 0); });
        }
      }
    };
    int32_t count = 0, begin = taps;
    visit([&](int32_t, double, double) { ++count; });
    begin += exclusive_sum(count, taps);
    if (thread < kTileCells) *step = restart ? ~(begin + count) : begin + count;
    Tap<Acc>* tap = plan.tap + tile * plan.max_taps + begin;
    visit([&](int32_t column, double value, double slope) {
      *tap++ = {column * kRows * kLanes, static_cast<Acc>(value), static_cast<Acc>(slope)};
    });
    while (first < total && first + columns[first].group_columns <= round + kRoundColumns)
      first += columns[first].group_columns;
  }
}

// Computes the inverse total weights of a block of rows. Called by a whole block, with one thread
// per column of cells.
template <class Acc>
__device__ void fill_inverse(const MeanPlan<Acc>& plan, int64_t block, int64_t place) {
  static_assert(kRows == kWeightRows);
  const auto counted = [](const Axis& axis, double offset, int64_t cell) -> double {
    return visit_axis_cell(axis, offset, cell, [](int32_t, double) {});
  };
  double total[kRows];
  sum_weights(
      plan.sorted, plan.views, /*counts_views=*/false, block * kRows, plan.cell_at(place),
      [&](int64_t v, int64_t y) { return counted(plan.y, plan.sorted[v].dy, y); },
      [&](int64_t v, int64_t x) { return counted(plan.x, plan.sorted[v].dx, x); }, total);
  const int64_t places = plan.x_tiles * kTileCells;
  if (place >= places) return;
  for (int r = 0; r < kRows; ++r)
    plan.inverse[(block * kRows + r) * places + place] =
        total[r] > 0 ? static_cast<Acc>(1 / total[r]) : 0;
}

// Builds all tables. The first blocks compute steps, the next ones inputs, the last ones inverses.
template <class Acc>
__global__ void __launch_bounds__(kThreads, 2)  // with fewer registers it spills
    fill_tables(const __grid_constant__ MeanPlan<Acc> plan, int64_t for_inputs, int64_t for_cells) {
  SRT_FOR_BLOCK(block, plan.x_tiles + for_inputs + plan.row_blocks * for_cells) {
    const int64_t inputs = block - plan.x_tiles, inverses = inputs - for_inputs;
    const int64_t i = inputs * kThreads + threadIdx.x;
    if (inputs < 0) {
      fill_steps(plan, block);
    } else if (inverses >= 0) {
      fill_inverse(plan, inverses / for_cells, inverses % for_cells * kThreads + threadIdx.x);
    } else if (i < plan.row_blocks * plan.views) {
      fill_inputs(plan, i / plan.views, i % plan.views);
    }
  }
}

// ---- the mean -----------------------------------------------------------------------------------

// The tile of a block. It is kept in shared memory and read when it is needed, because in registers
// it would displace the sums.
template <class T, class Acc>
struct Tile {
  const T* tokens;  // of the image of the tile, at its first channel
  T* out;
  int32_t channels, columns;
  int64_t y, place;  // the first row and the entry of the first cell
  const int32_t* total_inputs;
  const Input<Acc>* input;
  const Column* column;
  const int32_t* step;
  const Tap<Acc>* tap;

  __device__ void find(const MeanPlan<Acc>& plan, int64_t i) {
    // Channels vary fastest, then x, so that blocks that run at the same time share token rows in
    // L2.
    constexpr int64_t kSize = kLanes * kChannels<Acc>;
    const int64_t chunks = div_up(plan.channels, kSize), c = i % chunks * kSize;
    const int64_t x = i / chunks % plan.x_tiles, row = i / chunks / plan.x_tiles;
    const int64_t block = row % plan.row_blocks, b = row / plan.row_blocks;
    tokens = static_cast<const T*>(plan.tokens) + b * plan.token_strides[1] + c;
    out = static_cast<T*>(plan.out) + b * plan.out_strides[0] + c * plan.out_strides[1];
    channels = static_cast<int32_t>(min(plan.channels - c, kSize));
    columns = plan.total_columns[x];
    y = block * kRows;
    place = x * kTileCells;
    total_inputs = plan.total_inputs + block * plan.views;
    input = plan.input + block * plan.views * plan.inputs;
    column = plan.column + x * plan.max_columns;
    step = plan.step + x * plan.max_rounds * kTileCells;
    tap = plan.tap + x * plan.max_taps;
  }
};

// Loads the channels of a thread. With kVector they are aligned and dense, and all of them exist;
// otherwise only the first n exist.
template <bool kVector, class T, class Acc = typename AccumulatorOf<T>::type>
__device__ Pack<T, kChannels<Acc>> load_channels(const T* from, int n) {
  using Tokens = Pack<T, kChannels<Acc>>;
  if constexpr (kVector) {
    return load(reinterpret_cast<const Tokens*>(from));
  } else {
    Tokens tokens;
#pragma unroll
    for (int e = 0; e < kChannels<Acc>; ++e) tokens.at[e] = e < n ? from[e] : T{};
    return tokens;
  }
}

template <bool kVector, class T, class Acc>
__device__ void store_mean(const MeanPlan<Acc>& plan, T* to, const Sum<Acc>& sum, Acc inverse,
                           int n) {
  Pack<T, kChannels<Acc>> mean;
#pragma unroll
  for (int e = 0; e < kChannels<Acc>; ++e)
    mean.at[e] = from_acc<T>(sum.at[e] * inverse + Acc{0});  // adding 0 turns -0 into 0
  if constexpr (kVector) {
    store(reinterpret_cast<decltype(mean)*>(to), mean, plan.keep_in_l2);
  } else {
#pragma unroll
    for (int e = 0; e < kChannels<Acc>; ++e)
      if (e < n) store(to + e * plan.out_strides[1], mean.at[e], plan.keep_in_l2);
  }
}

template <class Acc, int N>
__device__ void add(Pack<Acc, N>& sum, Acc weight, const Pack<Acc, N>& value) {
#pragma unroll
  for (int e = 0; e < N; ++e) sum.at[e] += weight * value.at[e];
}

// Pass along y: sums the columns of the round that begins at column `first` into shared memory.
template <bool kVector, class T, class Acc>
__device__ void sum_columns(const MeanPlan<Acc>& plan, const Tile<T, Acc>& tile, int32_t first,
                            Sum<Acc> (&sums)[kRoundColumns][kRows][kLanes]) {
  constexpr int kOwn = kSumRows<T, kVector>, kParts = kRows / kOwn;
  constexpr int kTokens = kAhead<T, kVector>;
  const int lane = static_cast<int>(threadIdx.x % kLanes);
  const int part = static_cast<int>(threadIdx.x / kLanes % kParts);
  const int channels = tile.channels - lane * kChannels<Acc>;
  const int columns = channels > 0 ? min(kRoundColumns, tile.columns - first) : 0;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x / (kLanes * kParts)); i < columns;
       i += kThreads / (kLanes * kParts)) {
    const Column column = load(tile.column + first + i);
    const T* const tokens =
        tile.tokens + lane * kChannels<Acc> + column.token * plan.token_strides[2];
    const Input<Acc>* input = tile.input + column.view * static_cast<int32_t>(plan.inputs);
    Sum<Acc> sum[kOwn] = {};
#pragma unroll 1
    for (int rest = load(tile.total_inputs + column.view); rest > 0;
         rest -= kTokens, input += kTokens) {
      Pack<T, kChannels<Acc>> token[kTokens];
#pragma unroll
      for (int j = 0; j < kTokens; ++j)
        if (j < rest) token[j] = load_channels<kVector>(tokens + load(&input[j].offset), channels);
#pragma unroll
      for (int j = 0; j < kTokens; ++j) {
        if (j >= rest) break;
        const auto weight =
            load(reinterpret_cast<const Pack<Acc, kOwn>*>(input[j].weight + part * kOwn));
        const auto value = to_acc(token[j]);
#pragma unroll
        for (int r = 0; r < kOwn; ++r) add(sum[r], weight.at[r], value);
      }
    }
#pragma unroll
    for (int r = 0; r < kOwn; ++r) sums[i][part * kOwn + r][lane] = sum[r];
  }
}

// Pass along x: adds a round to the cells of one row of a strip. `sums` points to the sum of the
// first column of the round. `follows`: whether the strip has steps before it in the table.
template <class Acc>
__device__ void walk(const MeanPlan<Acc>& plan, const int32_t* steps, const Tap<Acc>* taps,
                     bool follows, const Sum<Acc>* sums, Sum<Acc> (&cells)[kCells]) {
  int32_t tap = follows ? load(steps - 1) : 0;
  if (tap < 0) tap = ~tap;
  Sum<Acc> value{}, slope{};
  Pack<int32_t, 4> ends;
#pragma unroll
  for (int i = 0; i < kCells; ++i) {
    if (i % 4 == 0) ends = load(reinterpret_cast<const Pack<int32_t, 4>*>(steps + i));
    int32_t end = ends.at[i % 4];
    if (end != tap) {
      if (end < 0) {
        end = ~end;
        value = slope = {};
      }
#pragma unroll 1
      for (; tap < end; ++tap) {
        const Tap<Acc> own = load(taps + tap);
        const Sum<Acc> sum = sums[own.at];
        add(value, own.value, sum);
        add(slope, own.slope, sum);
      }
    }
    add(cells[i], Acc{1}, value);
    add(cells[i], plan.position[i], slope);
  }
}

// Computes cells starting at x directly from the formula, for threads whose sums are not finite.
// This is needed because the sums along y multiply by weights of 0, and 0 * Inf is NaN; because the
// walk carries a value past the cells that read it; and because sums can overflow although their
// mean does not.
template <bool kVector, class T, class Acc>
__device__ __noinline__ void write_directly(const MeanPlan<Acc>& plan, const T* tokens, T* to,
                                            const Acc* inverse, int64_t y, int64_t x, int cells,
                                            int channels) {
  for (; cells > 0; --cells, ++x, ++inverse, to += plan.out_strides[3]) {
    Sum<Acc> sum{};
    for (int64_t v = 0; v < plan.views && plan.sorted[v].weight > 0; ++v) {
      const View view = plan.sorted[v];
      const int64_t start_y = plan.y.start(view.dy), start_x = plan.x.start(view.dx);
      visit_axis_cell(plan.y, view.dy, y, [&](int32_t row, double weight_y) {
        visit_axis_cell(plan.x, view.dx, x, [&](int32_t column, double weight_x) {
          const int64_t token =
              plan.y.token_at(start_y, row) * plan.x.tokens + plan.x.token_at(start_x, column);
          const int64_t at = view.index * plan.token_strides[0] + token * plan.token_strides[2];
          const Acc weight = static_cast<Acc>(view.weight) * static_cast<Acc>(weight_y);
          add(sum, weight * static_cast<Acc>(weight_x),
              to_acc(load_channels<kVector>(tokens + at, channels)));
        });
      });
    }
    store_mean<kVector>(plan, to, sum, *inverse, channels);
  }
}

template <class T, bool kVector, class Acc = typename AccumulatorOf<T>::type>
__global__ void __launch_bounds__(kThreads, kResident)
    mean_kernel(const __grid_constant__ MeanPlan<Acc> plan) {
  __shared__ Sum<Acc> sums[kRoundColumns][kRows][kLanes];
  __shared__ Tile<T, Acc> tile;
  // A warp computes rows of a single strip, so that all its threads have the same steps. The
  // indices are unsigned, so that each is recomputed in one instruction instead of occupying a
  // register.
  const unsigned thread = threadIdx.x, warp = thread / kWarpThreads;
  const int lane = static_cast<int>(thread % kLanes);
  const int strip = static_cast<int>(warp % kStrips);
  const unsigned row = warp / kStrips * (kWarpThreads / kLanes) + thread % kWarpThreads / kLanes;
  SRT_FOR_BLOCK(i, plan.tiles) {
    __syncthreads();
    if (thread == 0) tile.find(plan, i);
    __syncthreads();
    Sum<Acc> cells[kCells] = {};
#pragma unroll 1
    for (int32_t round = 0; round * kRoundColumns < tile.columns; ++round) {
      sum_columns<kVector>(plan, tile, round * kRoundColumns, sums);
      __syncthreads();
      walk(plan, tile.step + (round * kStrips + strip) * kCells, tile.tap, round + strip > 0,
           &sums[0][row][lane], cells);
      __syncthreads();
    }

    const int first_channel = lane * kChannels<Acc>;
    const int channels = tile.channels - first_channel;
    const int64_t y = tile.y + row, place = tile.place + strip * kCells;
    const int64_t x = place / kCells * plan.strip;
    const int end = static_cast<int>(min(plan.strip, plan.cells - x));
    if (channels <= 0 || y >= plan.rows) continue;
    const Acc* const inverse = plan.inverse + y * plan.x_tiles * kTileCells + place;
    T* to = tile.out + first_channel * plan.out_strides[1] + y * plan.out_strides[2] +
            x * plan.out_strides[3];
    Acc check = 0;
#pragma unroll
    for (const Sum<Acc>& cell : cells) {
#pragma unroll
      for (const Acc value : cell.at) check += value;
    }
    if (!isfinite(check)) {
      write_directly<kVector>(plan, tile.tokens + first_channel, to, inverse, y, x, end, channels);
      continue;
    }
    Pack<Acc, 4> inverses;
#pragma unroll
    for (int c = 0; c < kCells; ++c, to += plan.out_strides[3]) {
      if (c >= end) break;
      if (c % 4 == 0) inverses = load(reinterpret_cast<const Pack<Acc, 4>*>(inverse + c));
      store_mean<kVector>(plan, to, cells[c], inverses.at[c % 4], channels);
    }
  }
}

// ---- on the host --------------------------------------------------------------------------------

// Whether the channels of input and output are whole, aligned vectors of n elements.
bool vectors_fit(const EnsembleArgs& args, int64_t n, int64_t element_size) {
  const int64_t *in = args.token_strides, *out = args.out_strides;
  bool fit = args.channels % n == 0 && out[1] == 1;
  for (const int64_t stride : {in[0], in[1], in[2], out[0], out[2], out[3]})
    fit = fit && stride % n == 0;
  for (const void* p : {args.tokens, static_cast<const void*>(args.out)})
    fit = fit && reinterpret_cast<uintptr_t>(p) % (n * element_size) == 0;
  return fit;
}

// The number of places that `cells` cells read, at most. Their pixels span (pixels - 1) / patch
// tokens, the first pixel can be anywhere in a token, and interpolation adds one token.
int64_t most_tokens(const Axis& axis, int64_t cells) {
  const int64_t more = axis.upsample == Upsample::nearest ? 2 : 3;
  return std::min(axis.places(), (cells * axis.stride - 1) / axis.patch + more);
}

template <class T, class Acc = typename AccumulatorOf<T>::type>
MeanPlan<Acc> make_plan(const Call& call, Workspace& workspace) {
  MeanPlan<Acc> plan{};
  call.set_field(plan, sizeof(T), sizeof(T));
  plan.y = call.axis(0);
  plan.x = call.axis(1);
  plan.rows = plan.y.cells();
  plan.cells = plan.x.cells();
  for (int i = 0; i < kCells && plan.x.stride == 1; ++i)
    plan.position[i] = static_cast<Acc>(walk_position(plan.x, i));
  plan.strip = plan.x.stride == 1 ? kCells - kCells % walk_interval(plan.x) : kCells;
  plan.row_blocks = div_up(plan.rows, kRows);
  plan.x_tiles = div_up(plan.cells, kStrips * plan.strip);
  plan.tiles =
      plan.batch * plan.row_blocks * plan.x_tiles * div_up(plan.channels, kLanes * kChannels<Acc>);
  plan.inputs = most_tokens(plan.y, kRows);
  plan.max_columns = plan.views * most_tokens(plan.x, kStrips * plan.strip);
  plan.max_rounds = div_up(plan.max_columns, kRoundColumns);
  // A step of the walk changes the weights of at most three tokens of a view.
  plan.max_taps = plan.views * kTileCells * (plan.x.stride == 1 ? 3 : plan.x.max_taps());
  const int64_t most = std::max({plan.views * plan.inputs, plan.max_columns, plan.max_taps});
  if (most > INT32_MAX - kThreads)
    throw Error("srt::ensemble: on CUDA the number of views times the tokens of " +
                std::to_string(kTileCells) + " output cells must be below 2^31; got " +
                std::to_string(most));
  plan.sorted = workspace.take<View>(plan.views);
  plan.total_inputs = workspace.take<int32_t>(plan.row_blocks * plan.views);
  plan.input = workspace.take<Input<Acc>>(plan.row_blocks * plan.views * plan.inputs);
  plan.total_columns = workspace.take<int32_t>(plan.x_tiles);
  plan.column = workspace.take<Column>(plan.x_tiles * plan.max_columns);
  plan.step = workspace.take<int32_t>(plan.x_tiles * plan.max_rounds * kTileCells);
  plan.tap = workspace.take<Tap<Acc>>(plan.x_tiles * plan.max_taps);
  plan.inverse = workspace.take<Acc>(plan.row_blocks * kRows * plan.x_tiles * kTileCells);
  return plan;
}

template <class T, class Acc = typename AccumulatorOf<T>::type>
int64_t mean(const Call& call) {
  Workspace workspace(call.workspace);
  const auto plan = make_plan<T>(call, workspace);
  InlineArrays parameters;
  const RawViews raw = raw_views(call, workspace, parameters);
  if (!call.workspace) return workspace.bytes();

  sort_views(call, raw, parameters, plan.sorted, nullptr);
  const int64_t for_inputs = div_up(plan.row_blocks * plan.views, kThreads);
  const int64_t for_cells = div_up(plan.x_tiles * kTileCells, kThreads);
  launch(call.op, fill_tables<Acc>, plan.x_tiles + for_inputs + plan.row_blocks * for_cells,
         call.stream, plan, for_inputs, for_cells);
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
