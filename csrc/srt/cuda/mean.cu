// The mean on the device. Four small kernels make its tables from the offsets, wherever these lie:
// the views in the order of their dx, where the field breaks, the runs between the breaks, and the
// weights of both axes. Nothing ever comes back to the host.
#include <limits>
#include <type_traits>

#include "../axis.h"
#include "../ensemble.h"
#include "common.cuh"

namespace srt::cuda {
namespace {

// Blocks of the mean that a processor holds at a time.
constexpr int kResident = 2;

// Between two breaks every view reads the same tokens, with weights that are linear in the
// position. So is the field: only the ends of a run are summed, the cells between them are
// interpolated.
struct Run {
  int32_t first, last;
};

// What a thread sums for a column comes in pairs: tokens, and their weights in its rows.
constexpr int kPair = 2;
template <class Acc, int kCombined>
struct alignas(kVectorBytes) Inputs {
  int64_t offset[kPair];         // of a row's first token, in bytes
  Acc weight[kPair][kCombined];  // times that of the view
};

// A block of the mean makes a tile of rows x cells x channels, where rows and cells are ends of
// runs, in three steps. "Columns" are combined: a column is one token position of all the views
// that share a dx; it is summed over views and token rows for every row of the tile (a warp a
// column, 8 lanes along the channels, 4 along the rows). The columns are filtered horizontally into
// sums that stay in registers (8 lanes along the channels, 32 positions of rows and cells). The
// ends go through shared memory to those who write the runs: 8 lanes along the channels, 32 rows
// that follow each other, whatever runs they are in.
template <class T, bool kSmall>
struct Tile {
  using Acc = typename AccumulatorOf<T>::type;
  static constexpr int lanes = 8;
  static constexpr int vector = kVectorBytes / static_cast<int>(sizeof(T));  // channels of a thread
  static constexpr int channels = lanes * vector;
  static constexpr int quarters = 4;
  static constexpr int columns = kThreads / (lanes * quarters);  // combined at a time
  // Rows that a thread combines. Each token that it loads serves all of them.
  static constexpr int combined = kSmall ? 1 : (sizeof(T) == 2 ? 2 : 4);
  static constexpr int rows = quarters * combined;
  // Pairs of tokens that it loads before it uses the first of them.
  static constexpr int ahead = 2;
  // Sums of a thread: the ends of one run of rows by those of a few runs of cells.
  static constexpr int thread_cells = kSmall ? 2 : (sizeof(T) == 2 ? 4 : 8);
  static constexpr int row_groups = rows / 2;
  static constexpr int cell_groups = kSmall ? 4 : kThreads / lanes / row_groups;
  static constexpr int cells = cell_groups * thread_cells;
  // The ends of half of the cells take the place of the combined columns, then those of the others.
  static constexpr int passes = kSmall ? 1 : 2;
  static constexpr int pass_groups = cell_groups / passes;
  static constexpr int pass_cells = cells / passes;
  static_assert(cells <= kWarpThreads && pass_cells <= 2 * columns);
};

// One token column of the views from `begin` on that share a dx.
struct alignas(2 * sizeof(int32_t)) Column {
  int32_t begin;
  int32_t token;
};

// The token rows that `combined` rows of a tile read in one view.
struct alignas(kVectorBytes) RowSpan {
  int32_t first, count;
  int32_t place;  // of the first of them in the inputs of the views that share a dx
  int32_t pairs;  // of these views; only the first of them has it
};

struct AxisPlan {
  Axis axis;
  int64_t cells;
  bool interpolated;  // cells between the ends of runs; otherwise each is summed
  uint8_t* breaks;    // [cells], 1 where a cell does not go on as the ones before it
  Run* runs;          // every cell is in one; none is shorter than 2, but at the end of a segment
  int32_t* total;     // runs
  double* count;      // [V, cells], counted pixels
};

template <class Acc>
struct MeanPlan : FieldPlan {
  int64_t row_step;  // from a row of tokens to the next, in elements
  int64_t element_bytes;
  View* sorted;  // [V] by dx
  AxisPlan y, x;
  // The vertical table. The views that share a dx have one list of inputs for every block of rows,
  // which begins at the first view's place.
  int64_t row_blocks, max_pairs;
  RowSpan* row_span;  // [row_blocks, V]
  void* inputs;       // [row_blocks, V, max_pairs] Inputs
  // The horizontal table: weights of columns, dense over the cells of a tile.
  int64_t tile_cells, tile_columns, cell_groups, x_tiles, max_rounds, max_columns;
  int32_t* column_total;  // [x_tiles]
  Column* column;         // [x_tiles, max_columns]
  Acc* column_weight;     // [x_tiles, max_columns, tile_cells]
  // [x_tiles, max_rounds, cell_groups] which of the columns that are combined at a time have a
  // weight that is not 0 in a group of cells; the first one is the highest bit.
  uint32_t* column_mask;
  Acc* inverse;  // [ends of rows, ends of cells] 1 / total weight, 0 where no view counts
  int64_t row_bytes, cell_bytes;  // from a row of out, or a cell, to the next
};

// ---- runs ---------------------------------------------------------------------------------------

// One thread looks for runs in this many cells.
constexpr int64_t kSegment = 64;

struct CellReads {
  int32_t first, last;  // tokens; -1 for none
  int32_t count;
};

__device__ inline CellReads read_cell(const Axis& axis, double offset, int64_t cell) {
  CellReads reads{-1, -1, 0};
  reads.count = visit_axis_cell(axis, offset, cell, [&](int32_t token, double) {
    if (reads.first < 0) reads.first = token;
    reads.last = token;
  });
  return reads;
}

__global__ void __launch_bounds__(kThreads)
    find_breaks(const __grid_constant__ AxisPlan y, const __grid_constant__ AxisPlan x,
                const View* sorted, int64_t views) {
  const int64_t cells = y.cells + x.cells;
  SRT_FOR_THREAD(i, views * cells) {
    const int64_t v = i / cells;
    const bool vertical = i % cells < y.cells;
    const AxisPlan& plan = vertical ? y : x;
    const int64_t cell = vertical ? i % cells : i % cells - y.cells;
    const double offset = vertical ? sorted[v].dy : sorted[v].dx;
    const CellReads here = read_cell(plan.axis, offset, cell);
    plan.count[v * plan.cells + cell] = here.count;
    // A cell of several pixels may read tokens that its neighbour reads, and not be linear.
    bool breaks = cell == 0 || plan.axis.stride > 1 || !plan.interpolated;
    if (!breaks) {
      const CellReads before = read_cell(plan.axis, offset, cell - 1);
      breaks = before.first != here.first || before.last != here.last || before.count != here.count;
    }
    if (breaks) plan.breaks[cell] = 1;
  }
}

// The last cell of the run that begins at `cell`. Two cells are a run in any case: nothing lies
// between them.
__device__ inline int64_t end_of_run(const uint8_t* breaks, int64_t cell, int64_t end) {
  int64_t last = cell;
  while (last + 1 < end && !breaks[last + 1]) ++last;
  return last == cell && cell + 1 < end ? cell + 1 : last;
}

// A block an axis, a thread a segment.
__global__ void __launch_bounds__(kThreads)
    list_runs(const __grid_constant__ AxisPlan y, const __grid_constant__ AxisPlan x) {
  const int thread = static_cast<int>(threadIdx.x);
  SRT_FOR_BLOCK(axis, 2) {
    const AxisPlan& plan = axis == 0 ? y : x;
    int32_t total = 0;
    for (int64_t from = 0; from < plan.cells; from += kThreads * kSegment) {
      const int64_t begin = from + thread * kSegment, end = min(begin + kSegment, plan.cells);
      int32_t count = 0;
      for (int64_t cell = begin; cell < end; cell = end_of_run(plan.breaks, cell, end) + 1) ++count;
      int32_t place = total;
      place += exclusive_sum(count, total);
      for (int64_t cell = begin; cell < end; ++place) {
        const int64_t last = end_of_run(plan.breaks, cell, end);
        plan.runs[place] = {static_cast<int32_t>(cell), static_cast<int32_t>(last)};
        cell = last + 1;
      }
    }
    if (thread == 0) *plan.total = total;
  }
}

// The end number i of the runs of an axis: the first cell of a run, then its last; -1 beyond them.
__device__ inline int64_t end_cell(const AxisPlan& plan, int64_t i) {
  if (i / 2 >= *plan.total) return -1;
  const Run run = plan.runs[i / 2];
  return i % 2 == 0 ? run.first : run.last;
}

// ---- the tables ---------------------------------------------------------------------------------

// Whether v is the first of the views that share its dx.
__device__ inline bool leads(const View* sorted, int64_t v) {
  return v == 0 || sorted[v - 1].dx != sorted[v].dx;
}

// The inputs of one block of rows, by a whole block: a thread a view.
template <int kCombined, class Acc>
__device__ void fill_rows(const MeanPlan<Acc>& plan, int64_t block) {
  RowSpan* const span = plan.row_span + block * plan.views;
  auto* const inputs =
      static_cast<Inputs<Acc, kCombined>*>(plan.inputs) + block * plan.views * plan.max_pairs;
  // Calls tap(row, token, weight) for the rows of the block.
  const auto visit = [&](int64_t v, auto&& tap) {
    for (int r = 0; r < kCombined; ++r) {
      const int64_t y = end_cell(plan.y, block * kCombined + r);
      if (y < 0) break;
      visit_axis_cell(plan.y.axis, plan.sorted[v].dy, y,
                      [&](int32_t token, double value) { tap(r, token, value); });
    }
  };
  // Input number i of the views from `leader` on: a token row of view v, with weights of 0.
  const auto put = [&](int64_t leader, int32_t i, int64_t v, int32_t row) {
    Inputs<Acc, kCombined>& pair = inputs[leader * plan.max_pairs + i / kPair];
    pair.offset[i % kPair] =
        (plan.sorted[v].index * plan.token_strides[0] + row * plan.row_step) * plan.element_bytes;
    for (int r = 0; r < kCombined; ++r) pair.weight[i % kPair][r] = 0;
  };
  for (int64_t v = threadIdx.x; v < plan.views; v += kThreads) {
    int32_t first = 0, last = -1;
    visit(v, [&](int, int32_t token, double) {
      if (last < 0) first = token;
      last = token;
    });
    span[v] = {first, last - first + 1, 0, 0};
  }
  __syncthreads();
  for (int64_t v = threadIdx.x; v < plan.views; v += kThreads) {
    if (!leads(plan.sorted, v)) continue;
    int64_t read = v;
    int32_t total = 0;
    for (int64_t u = v; u < plan.views && (u == v || !leads(plan.sorted, u)); ++u) {
      span[u].place = total;
      total += span[u].count;
      if (span[u].count > 0) read = u;
    }
    // The other one of a pair: again a token that is read.
    if (total % kPair != 0) put(v, total++, read, span[read].first);
    span[v].pairs = total / kPair;
  }
  __syncthreads();
  for (int64_t v = threadIdx.x; v < plan.views; v += kThreads) {
    int64_t leader = v;
    while (!leads(plan.sorted, leader)) --leader;
    const RowSpan own = span[v];
    for (int32_t i = 0; i < own.count; ++i) put(leader, own.place + i, v, own.first + i);
    visit(v, [&](int r, int32_t token, double value) {
      const int32_t i = own.place + token - own.first;
      inputs[leader * plan.max_pairs + i / kPair].weight[i % kPair][r] =
          static_cast<Acc>(plan.sorted[v].weight) * static_cast<Acc>(value);
    });
  }
}

// All columns of one tile of cells, by a whole block: a thread a cell, several views at a time.
template <class Acc>
__device__ void fill_columns(const MeanPlan<Acc>& plan, int64_t tile) {
  __shared__ int32_t first[kThreads], last[kThreads];  // tokens of each view
  __shared__ int64_t place[kThreads];                  // of its first column
  __shared__ int64_t total;
  const int cells = static_cast<int>(plan.tile_cells), thread = static_cast<int>(threadIdx.x);
  const int at_a_time = kThreads / cells, local = thread / cells;
  const int64_t cell = end_cell(plan.x, tile * cells + thread % cells);
  const int64_t group = thread % cells / (cells / plan.cell_groups);
  const int64_t masks = plan.max_rounds * plan.cell_groups;
  uint32_t* const mask = plan.column_mask + tile * masks;
  for (int64_t i = thread; i < masks; i += kThreads) mask[i] = 0;
  if (thread == 0) total = 0;
  for (int64_t v0 = 0; v0 < plan.views; v0 += at_a_time) {
    if (thread < at_a_time) {
      first[thread] = INT32_MAX;
      last[thread] = -1;
    }
    __syncthreads();
    const int64_t v = v0 + local;
    // The first of the views that share a dx makes the columns.
    const bool makes = v < plan.views && leads(plan.sorted, v);
    if (makes && cell >= 0) {
      const CellReads reads = read_cell(plan.x.axis, plan.sorted[v].dx, cell);
      if (reads.first >= 0) {
        atomicMin(&first[local], reads.first);
        atomicMax(&last[local], reads.last);
      }
    }
    __syncthreads();
    if (thread == 0) {
      for (int i = 0; i < at_a_time; ++i) {
        place[i] = total;
        if (last[i] >= 0) total += last[i] - first[i] + 1;
      }
    }
    __syncthreads();
    const bool fills = makes && last[local] >= 0;
    Column* column = plan.column + tile * plan.max_columns + place[local];
    Acc* weight = plan.column_weight + (tile * plan.max_columns + place[local]) * cells;
    if (fills) {
      for (int32_t token = first[local]; token <= last[local]; ++token) {
        const int i = token - first[local];
        weight[i * cells + thread % cells] = 0;
        if (thread % cells == 0) column[i] = {static_cast<int32_t>(v), token};
      }
    }
    __syncthreads();
    if (fills && cell >= 0) {
      visit_axis_cell(plan.x.axis, plan.sorted[v].dx, cell, [&](int32_t token, double value) {
        const int64_t i = token - first[local];
        weight[i * cells + thread % cells] = static_cast<Acc>(value);
        const int64_t at = place[local] + i;
        atomicOr(&mask[at / plan.tile_columns * plan.cell_groups + group],
                 0x80000000u >> at % plan.tile_columns);
      });
    }
    __syncthreads();
  }
  if (thread == 0) plan.column_total[tile] = static_cast<int32_t>(total);
  __syncthreads();
}

// The inverses of a few ends of rows in one end of cells: each count of a column is read once for
// them.
constexpr int64_t kInverseRows = 4;

template <class Acc>
__device__ void fill_inverse(const MeanPlan<Acc>& plan, int64_t row, int64_t end) {
  const int64_t rows = plan.y.cells, cells = plan.x.cells, x = end_cell(plan.x, end);
  int64_t y[kInverseRows];
#pragma unroll
  for (int r = 0; r < kInverseRows; ++r) y[r] = end_cell(plan.y, row + r);
  double total[kInverseRows] = {};
  for (int64_t v = 0; x >= 0 && v < plan.views; ++v) {
    // As it stands in the sums, in their type.
    const double weight = static_cast<double>(static_cast<Acc>(plan.sorted[v].weight));
    const double count = weight * plan.x.count[v * cells + x];
#pragma unroll
    for (int r = 0; r < kInverseRows; ++r)
      total[r] += y[r] >= 0 ? count * plan.y.count[v * rows + y[r]] : 0;
  }
#pragma unroll
  for (int r = 0; r < kInverseRows; ++r)
    plan.inverse[(row + r) * plan.x_tiles * plan.tile_cells + end] =
        total[r] > 0 ? static_cast<Acc>(1 / total[r]) : 0;
}

template <int kCombined, class Acc>
__global__ void __launch_bounds__(kThreads, 1)
    fill_tables(const __grid_constant__ MeanPlan<Acc> plan) {
  const int64_t ends = plan.x_tiles * plan.tile_cells;
  const int64_t inverses = plan.row_blocks * kCombined / kInverseRows * ends;
  SRT_FOR_BLOCK(block, plan.x_tiles + plan.row_blocks + div_up(inverses, kThreads)) {
    if (block < plan.x_tiles) {
      fill_columns(plan, block);
    } else if (block < plan.x_tiles + plan.row_blocks) {
      fill_rows<kCombined>(plan, block - plan.x_tiles);
    } else {
      const int64_t i = (block - plan.x_tiles - plan.row_blocks) * kThreads + threadIdx.x;
      if (i < inverses) fill_inverse(plan, i / ends * kInverseRows, i % ends);
    }
  }
}

// ---- the mean -----------------------------------------------------------------------------------

// A run, for the threads that write it.
template <class Acc>
struct alignas(kVectorBytes) WrittenRun {
  int64_t at;      // its first row; or its first cell, in bytes of a row of the output
  int32_t length;  // from its first to its last one
  Acc inverse;     // 1 / length, 0 for a length of 0
};

// n / length, rounded once, from the inverse of the length.
template <class Acc>
__device__ Acc part_of(Acc n, Acc length, Acc inverse) {
  const Acc part = n * inverse;
  return fma(fma(-part, length, n), inverse, part);
}

// The differences of ends up to this size are finite.
template <class Acc>
constexpr Acc kLargest = std::numeric_limits<Acc>::max() / 4;

// Within a run, between the values at its ends; `t` is below 1. Equal ones, as nearest upsampling
// has them, stay as they are. kFinite: so are both, and their difference.
template <bool kFinite, class Acc>
__device__ Acc between(Acc first, Acc last, Acc t) {
  const Acc slope = last - first;
  if (!kFinite && !isfinite(slope)) {
    // What the first end ignores must not be multiplied by 0.
    return t == 0 ? first : (1 - t) * first + t * last;
  }
  return fma(t, slope, first);
}

// The shared memory of a block.
template <class T, bool kSmall>
struct Shared {
  using Tile = cuda::Tile<T, kSmall>;
  using Acc = typename Tile::Acc;
  // Channels lie so that the 16-byte accesses of neighbouring lanes do not collide.
  static constexpr int word = kVectorBytes / sizeof(Acc);
  static constexpr int words = Tile::vector > word ? Tile::vector / word : 1;
  using Word = Pack<Acc, Tile::vector / words>;
  // Combined columns, those of two rounds; then the ends of runs.
  Word sums[2 * Tile::columns][Tile::rows][words][Tile::lanes];
  alignas(kVectorBytes) Acc weights[2][Tile::columns][Tile::cells];

  // The runs of the tile; beyond the last one they begin at INT32_MAX and are shorter than 0.
  WrittenRun<Acc> rows[Tile::rows / 2], cells[Tile::cells / 2];
  // The tile. It is read from shared memory whenever it is needed: in registers it would displace
  // the sums.
  int64_t tile;     // the next one
  const T* tokens;  // channel c0 of image b
  T* out;
  int channels;  // from c0 on; 0 beyond the last tile
  int x, y;      // among tiles
  int columns;   // of the tile, and what the plan has for them
  const Column* column;
  const Acc* column_weight;
  const uint32_t* column_mask;
  const RowSpan* span;  // of its rows
  const Inputs<Acc, Tile::combined>* inputs;
};

// Whether the output is kept in L2: known when the kernel is compiled, or from its plan. The
// kernels of large tiles have no register left for the latter.
enum class Keep { no, yes, by_plan };

// kVector: 16 bytes an access, which needs aligned rows of channels on both sides. As many blocks
// as the device holds at a time go through the tiles: how many there are, only the device knows.
template <class T, bool kSmall, bool kVector, Keep kKeep>
__global__ void __launch_bounds__(kThreads, kResident)
    mean_kernel(const __grid_constant__ MeanPlan<typename AccumulatorOf<T>::type> plan) {
  using Tile = cuda::Tile<T, kSmall>;
  using Acc = typename Tile::Acc;
  constexpr int kVec = Tile::vector;
  constexpr int kWords = Shared<T, kSmall>::words;
  using Word = typename Shared<T, kSmall>::Word;
  __shared__ Shared<T, kSmall> shared;

  // Unsigned, so that they cost one instruction each and need not be kept.
  const unsigned thread = threadIdx.x;
  const int lane = static_cast<int>(thread % Tile::lanes);
  const int quarter = static_cast<int>(thread / Tile::lanes % Tile::quarters);
  const int warp = static_cast<int>(thread / kWarpThreads);
  const int warp_lane = static_cast<int>(thread % kWarpThreads);
  const int row_group = static_cast<int>(thread / Tile::lanes % Tile::row_groups);
  const int cell_group = static_cast<int>(thread / Tile::lanes / Tile::row_groups);
  // A small tile has fewer sums than threads.
  const bool filters = Tile::cell_groups * Tile::row_groups * Tile::lanes == kThreads ||
                       cell_group < Tile::cell_groups;
  // Channels of the tile from the first one of this thread on; may be negative.
  const auto channels = [&] { return shared.channels - lane * kVec; };

  // Loads and stores of the channels that this thread has.
  const auto load_channels = [&](const char* at) {
    const T* const from = reinterpret_cast<const T*>(at);
    Pack<T, kVec> pack;
    if constexpr (kVector) {
      pack = load(reinterpret_cast<const Pack<T, kVec>*>(from));
    } else {
#pragma unroll
      for (int e = 0; e < kVec; ++e) pack.at[e] = e < channels() ? from[e] : T{};
    }
    return pack;
  };
  const bool keep_in_l2 = kKeep == Keep::by_plan ? plan.keep_in_l2 : kKeep == Keep::yes;
  const auto store_channels = [&](char* at, const Acc(&value)[kVec]) {
    T* const to = reinterpret_cast<T*>(at);
    Pack<T, kVec> pack;
#pragma unroll
    for (int e = 0; e < kVec; ++e) pack.at[e] = from_acc<T>(value[e]);
    if (kVector) {
      store(reinterpret_cast<Pack<T, kVec>*>(to), pack, keep_in_l2);
    } else {
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        if (e < channels()) store(to + e * plan.out_strides[1], pack.at[e], keep_in_l2);
      }
    }
  };

  if (thread == 0) shared.tile = blockIdx.x;
  for (;;) {
    if (thread == 0) {
      // Blocks that run together share token rows: chunks of channels first, then along the row.
      const int64_t chunks = div_up(plan.channels, Tile::channels);
      const int64_t x_tiles = div_up(2 * *plan.x.total, Tile::cells);
      const int64_t y_tiles = div_up(2 * *plan.y.total, Tile::rows);
      const int64_t c0 = shared.tile % chunks * Tile::channels;
      const int64_t b = shared.tile / chunks / x_tiles / y_tiles;
      shared.x = static_cast<int>(shared.tile / chunks % x_tiles);
      shared.y = static_cast<int>(shared.tile / chunks / x_tiles % y_tiles);
      shared.tokens = static_cast<const T*>(plan.tokens) + b * plan.token_strides[1] + c0;
      shared.out = static_cast<T*>(plan.out) + b * plan.out_strides[0] + c0 * plan.out_strides[1];
      const int64_t channels = min(plan.channels - c0, int64_t{Tile::channels});
      shared.channels = b < plan.batch ? static_cast<int>(channels) : 0;
      shared.columns = plan.column_total[shared.x];
      const int64_t first = shared.x * plan.max_columns;
      shared.column = plan.column + first;
      shared.column_weight = plan.column_weight + first * Tile::cells;
      shared.column_mask = plan.column_mask + first / Tile::columns * Tile::cell_groups;
      const int64_t slot = shared.y * Tile::quarters * plan.views;
      shared.span = plan.row_span + slot;
      shared.inputs =
          static_cast<const Inputs<Acc, Tile::combined>*>(plan.inputs) + slot * plan.max_pairs;
      shared.tile += gridDim.x;
    }
    __syncthreads();
    if (shared.channels == 0) return;

    constexpr int kRows = Tile::rows / 2, kCells = Tile::cells / 2;
    if (thread < kRows + kCells) {
      const bool vertical = thread < kRows;
      const AxisPlan& axis = vertical ? plan.y : plan.x;
      const int i = static_cast<int>(vertical ? thread : thread - kRows);
      const int at = vertical ? shared.y * kRows + i : shared.x * kCells + i;
      const Run run = at < *axis.total ? axis.runs[at] : Run{INT32_MAX, INT32_MAX - 1};
      const int32_t length = run.last - run.first;
      (vertical ? shared.rows : shared.cells)[i] = {
          run.first * (vertical ? 1 : plan.cell_bytes), length,
          length > 0 ? Acc{1} / static_cast<Acc>(length) : 0};
    }

    Acc out[2][Tile::thread_cells][kVec] = {};
    // What a round needs of the tables is loaded during the one before it: a column for this warp,
    // its weight in one cell, and the mask of this group of cells.
    Column column{};
    Acc weight = 0;
    uint32_t mask = 0;
    const auto fetch = [&](int round) {
      const int own = round * Tile::columns + warp;
      if (own < shared.columns) {
        column = load(shared.column + own);
        if (warp_lane < Tile::cells)
          weight = load(shared.column_weight + own * int64_t{Tile::cells} + warp_lane);
      }
      if (filters && round * Tile::columns < shared.columns)
        mask = load(shared.column_mask + round * Tile::cell_groups + cell_group);
    };
    fetch(0);
    for (int round = 0; round * Tile::columns < shared.columns; ++round) {
      const int side = round % 2;
      if (warp_lane < Tile::cells) shared.weights[side][warp][warp_lane] = weight;

      // Combine one column a warp; returns whether all of it is finite. kExact: a weight of 0 is
      // not multiplied. Otherwise it is, which is wrong for a token that is not finite.
      const auto combine = [&](auto exact) {
        constexpr bool kExact = decltype(exact)::value;
        Acc sum[Tile::combined][kVec] = {};
        const int64_t slot = quarter * plan.views + column.begin;
        const auto* inputs = shared.inputs + slot * plan.max_pairs;
        const char* const tokens = reinterpret_cast<const char*>(
            shared.tokens + lane * kVec + column.token * plan.token_strides[2]);
        const auto add = [&](auto pairs) {
          constexpr int kInputs = decltype(pairs)::value * kPair;
          Pack<T, kVec> token[kInputs];
#pragma unroll
          for (int i = 0; i < kInputs; ++i) {
            const auto from =
                load(reinterpret_cast<const Pack<int64_t, kPair>*>(inputs[i / kPair].offset));
            token[i] = load_channels(tokens + from.at[i % kPair]);
          }
#pragma unroll
          for (int i = 0; i < kInputs; ++i) {
            const auto weight = load(reinterpret_cast<const Pack<Acc, Tile::combined>*>(
                inputs[i / kPair].weight[i % kPair]));
            const auto value = to_acc(token[i]);
#pragma unroll
            for (int r = 0; r < Tile::combined; ++r) {
              if (kExact && weight.at[r] == 0) continue;
#pragma unroll
              for (int e = 0; e < kVec; ++e) sum[r][e] += weight.at[r] * value.at[e];
            }
          }
          inputs += decltype(pairs)::value;
        };
        const bool reads = channels() > 0 && round * Tile::columns + warp < shared.columns;
        int32_t rest = reads ? load(&shared.span[slot].pairs) : 0;
        if (Tile::ahead > 1 && !kExact) {
#pragma unroll 1
          for (; rest >= Tile::ahead; rest -= Tile::ahead)
            add(std::integral_constant<int, Tile::ahead>{});
        }
#pragma unroll 1
        for (; rest > 0; --rest) add(std::integral_constant<int, 1>{});
        Acc check = 0;
#pragma unroll
        for (int r = 0; r < Tile::combined; ++r) {
          Acc part = -Acc{0};
#pragma unroll
          for (int i = 0; i < kWords; ++i) {
            Word word;
#pragma unroll
            for (int e = 0; e < kVec / kWords; ++e) {
              word.at[e] = sum[r][i * (kVec / kWords) + e];
              part += word.at[e];
            }
            shared.sums[side * Tile::columns + warp][quarter * Tile::combined + r][i][lane] = word;
          }
          check += part;
        }
        return isfinite(check);
      };
      // Filter all of them into this thread's sums. kExact: as above.
      const auto filter = [&](auto exact, uint32_t rest) {
        constexpr bool kExact = decltype(exact)::value;
#pragma unroll 1
        while (rest != 0) {
          const int s = __clz(static_cast<int>(rest));
          rest ^= 0x80000000u >> s;
          const auto weight = *reinterpret_cast<const Pack<Acc, Tile::thread_cells>*>(
              &shared.weights[side][s][cell_group * Tile::thread_cells]);
          Acc value[2][kVec];
#pragma unroll
          for (int r = 0; r < 2; ++r) {
#pragma unroll
            for (int i = 0; i < kWords; ++i) {
              const Word word = shared.sums[side * Tile::columns + s][row_group * 2 + r][i][lane];
#pragma unroll
              for (int e = 0; e < kVec / kWords; ++e)
                value[r][i * (kVec / kWords) + e] = word.at[e];
            }
          }
#pragma unroll
          for (int x = 0; x < Tile::thread_cells; ++x) {
            if (kExact && weight.at[x] == 0) continue;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
#pragma unroll
              for (int e = 0; e < kVec; ++e) out[r][x][e] += weight.at[x] * value[r][e];
            }
          }
        }
      };
      // One barrier is enough: the next round writes the other side, and the round after it comes
      // behind the next barrier.
      const bool finite = combine(std::false_type{});
      if (__syncthreads_or(!finite)) {
        combine(std::true_type{});
        __syncthreads();
        const uint32_t own = mask;
        fetch(round + 1);
        filter(std::true_type{}, own);
      } else {
        const uint32_t own = mask;
        fetch(round + 1);
        filter(std::false_type{}, own);
      }
    }

    // Scale the ends. Adding 0 turns -0 into 0: which of them a sum of nothing is depends on the
    // weights of 0 that were skipped.
    Acc size = 0;
    if (filters) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int64_t row = shared.y * Tile::rows + row_group * 2 + r;
        const auto inverse = load(reinterpret_cast<const Pack<Acc, Tile::thread_cells>*>(
            plan.inverse + (row * plan.x_tiles + shared.x) * Tile::cells +
            cell_group * Tile::thread_cells));
#pragma unroll
        for (int x = 0; x < Tile::thread_cells; ++x) {
#pragma unroll
          for (int e = 0; e < kVec; ++e) {
            out[r][x][e] = inverse.at[x] * out[r][x][e] + Acc{0};
            size += fabs(out[r][x][e]);
          }
        }
      }
    }

    // Write the runs, those of a part of the cells at a time.
    auto& ends =
        reinterpret_cast<Word(&)[Tile::rows][Tile::pass_cells][kWords][Tile::lanes]>(shared.sums);
#pragma unroll 1
    for (int pass = 0; pass < Tile::passes; ++pass) {
      __syncthreads();
      if (cell_group / Tile::pass_groups == pass) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
          for (int x = 0; x < Tile::thread_cells; ++x) {
#pragma unroll
            for (int i = 0; i < kWords; ++i) {
              Word word;
#pragma unroll
              for (int e = 0; e < kVec / kWords; ++e)
                word.at[e] = out[r][x][i * (kVec / kWords) + e];
              ends[row_group * 2 + r][cell_group % Tile::pass_groups * Tile::thread_cells + x][i]
                  [lane] = word;
            }
          }
        }
      }
      const auto write = [&](auto finite) {
        constexpr bool kFinite = decltype(finite)::value;
        if (channels() <= 0) return;
        // The rows of a tile follow each other: each is in the last run that begins before it.
        constexpr int kTurn = kThreads / Tile::lanes;
        const auto first_row = [&](int g) { return static_cast<int32_t>(shared.rows[g].at); };
        int32_t y = first_row(0) + static_cast<int32_t>(thread / Tile::lanes);
        char* row = reinterpret_cast<char*>(shared.out + lane * kVec * plan.out_strides[1]) +
                    y * plan.row_bytes;
#pragma unroll 1
        for (;; y += kTurn, row += kTurn * plan.row_bytes) {
          int g = 0;
#pragma unroll
          for (int i = kRows / 2; i > 0; i /= 2) g += first_row(g + i) <= y ? i : 0;
          const int32_t place = y - first_row(g), last = shared.rows[g].length;
          if (place > last) break;
          // From the nearer end, which so comes out as it is and leaves less to round.
          const bool below = 2 * place > last;
          const Word* near = &ends[below ? 2 * g + 1 : 2 * g][0][0][lane];
          const Word* far = &ends[below ? 2 * g : 2 * g + 1][0][0][lane];
          const Acc t = part_of(static_cast<Acc>(below ? last - place : place),
                                static_cast<Acc>(last), shared.rows[g].inverse);
          const auto next_end = [&](Acc(&value)[kVec]) {
#pragma unroll
            for (int i = 0; i < kWords; ++i) {
              const Word from = near[i * Tile::lanes], to = far[i * Tile::lanes];
#pragma unroll
              for (int e = 0; e < kVec / kWords; ++e)
                value[i * (kVec / kWords) + e] = between<kFinite>(from.at[e], to.at[e], t);
            }
            near += kWords * Tile::lanes;
            far += kWords * Tile::lanes;
          };
          const WrittenRun<Acc>* run = shared.cells + pass * (Tile::pass_cells / 2);
#pragma unroll 1
          for (int i = 0; i < Tile::pass_cells / 2; ++i, ++run) {
            const WrittenRun<Acc> cells = *run;
            if (cells.length < 0) break;
            Acc left[kVec], right[kVec];
            next_end(left);
            next_end(right);
            char* cell = row + cells.at;
            store_channels(cell, left);
            cell += plan.cell_bytes;
            Acc n = 1;
#pragma unroll(kFinite ? 4 : 1)
            for (int32_t rest = cells.length - 1; rest > 0; --rest) {
              const Acc part = part_of(n, static_cast<Acc>(cells.length), cells.inverse);
              Acc value[kVec];
#pragma unroll
              for (int e = 0; e < kVec; ++e) value[e] = between<kFinite>(left[e], right[e], part);
              store_channels(cell, value);
              cell += plan.cell_bytes;
              n += 1;
            }
            if (cells.length > 0) store_channels(cell, right);
          }
        }
      };
      if (__syncthreads_or(!(size < kLargest<Acc>))) {
        write(std::false_type{});
      } else {
        write(std::true_type{});
      }
    }
    __syncthreads();  // before the next tile is chosen
  }
}

// ---- on the host --------------------------------------------------------------------------------

// Whether every row of channels on both sides is a whole number of aligned vectors.
bool vectors_fit(const EnsembleArgs& args, int64_t element_size) {
  const int64_t vector = kVectorBytes / element_size;
  const auto fits = [&](int64_t size, int64_t stride) { return size == 1 || stride % vector == 0; };
  const auto aligned = [](const void* p) {
    return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0;
  };
  return aligned(args.tokens) && aligned(args.out) && args.channels % vector == 0 &&
         args.out_strides[1] == 1 && fits(args.views, args.token_strides[0]) &&
         fits(args.batch, args.token_strides[1]) &&
         fits(args.grid[0] * args.grid[1], args.token_strides[2]) &&
         fits(args.batch, args.out_strides[0]) && fits(0, args.out_strides[2]) &&
         fits(0, args.out_strides[3]);
}

template <class Tile, class Acc = typename Tile::Acc>
void place_tables(const EnsembleArgs& args, Workspace& workspace, MeanPlan<Acc>& plan) {
  const int64_t rows = plan.y.cells, cells = plan.x.cells;
  plan.sorted = workspace.take<View>(args.views);
  plan.y.breaks = workspace.take<uint8_t>(rows + cells);
  plan.x.breaks = plan.y.breaks + rows;
  plan.y.runs = workspace.take<Run>(div_up(rows, 2));
  plan.x.runs = workspace.take<Run>(div_up(cells, 2));
  plan.y.total = workspace.take<int32_t>(1);
  plan.x.total = workspace.take<int32_t>(1);
  plan.y.count = workspace.take<double>(args.views * rows);
  plan.x.count = workspace.take<double>(args.views * cells);
  plan.row_span = workspace.take<RowSpan>(args.views * plan.row_blocks);
  plan.inputs =
      workspace.take<Inputs<Acc, Tile::combined>>(args.views * plan.row_blocks * plan.max_pairs);
  plan.column_total = workspace.take<int32_t>(plan.x_tiles);
  plan.column = workspace.take<Column>(plan.x_tiles * plan.max_columns);
  plan.column_weight = workspace.take<Acc>(plan.x_tiles * plan.max_columns * Tile::cells);
  plan.column_mask = workspace.take<uint32_t>(plan.x_tiles * plan.max_rounds * Tile::cell_groups);
  plan.inverse = workspace.take<Acc>(plan.row_blocks * Tile::combined * plan.x_tiles * Tile::cells);
}

template <class T, bool kSmall>
MeanPlan<typename AccumulatorOf<T>::type> make_plan(const Call& call, Workspace& workspace) {
  using Tile = cuda::Tile<T, kSmall>;
  using Acc = typename Tile::Acc;
  const EnsembleArgs& args = call.args;
  MeanPlan<Acc> plan{};
  call.set_field(plan, sizeof(T), sizeof(T));
  plan.row_step = args.grid[1] * args.token_strides[2];
  plan.element_bytes = sizeof(T);
  plan.y.axis = call.axis(0);
  plan.x.axis = call.axis(1);
  // In float64 the rounding of the weights at the ends of a run, which grows with the position,
  // would show in the cells between them.
  plan.y.interpolated = plan.x.interpolated = sizeof(Acc) < sizeof(double);
  plan.y.cells = plan.y.axis.cells();
  plan.x.cells = plan.x.axis.cells();
  // The n ends of n / 2 runs span n cells. Runs as long as a token span up to n / 2 tokens more,
  // and interpolation and rounding add one token at each end.
  const auto max_tokens = [](const Axis& axis, int64_t n) {
    const int64_t inside = axis.stride == 1 ? div_up(n, 2) : 0;
    return std::min(axis.tokens, (n * axis.stride - 1) / axis.patch + 3 + inside);
  };
  plan.row_blocks = div_up(2 * div_up(plan.y.cells, 2), Tile::rows) * Tile::quarters;
  plan.max_pairs = div_up(max_tokens(plan.y.axis, Tile::combined), kPair);
  plan.tile_cells = Tile::cells;
  plan.tile_columns = Tile::columns;
  plan.cell_groups = Tile::cell_groups;
  plan.x_tiles = div_up(2 * div_up(plan.x.cells, 2), Tile::cells);
  plan.max_rounds = div_up(args.views * max_tokens(plan.x.axis, Tile::cells), Tile::columns);
  plan.max_columns = plan.max_rounds * Tile::columns;
  if (plan.max_columns > INT32_MAX)
    throw Error("srt::ensemble: on CUDA views * (tokens of " + std::to_string(Tile::cells) +
                " output cells of a row) must be below 2^31; got " +
                std::to_string(plan.max_columns));
  place_tables<Tile>(args, workspace, plan);
  plan.row_bytes = args.out_strides[2] * plan.element_bytes;
  plan.cell_bytes = args.out_strides[3] * plan.element_bytes;
  return plan;
}

template <class T, bool kSmall, bool kVector>
int64_t mean(const Call& call) {
  using Tile = cuda::Tile<T, kSmall>;
  using Acc = typename Tile::Acc;
  Workspace workspace(call.workspace);
  const auto plan = make_plan<T, kSmall>(call, workspace);
  InlineArrays parameters;
  const RawViews raw = raw_views(call, workspace, parameters);
  if (!call.workspace) return workspace.bytes();

  const int64_t rows = plan.y.cells, cells = plan.x.cells;
  sort_views(call, raw, parameters, plan.sorted, nullptr, plan.y.breaks, rows + cells);
  launch(call.op, find_breaks, div_up(plan.views * (rows + cells), kThreads), call.stream, plan.y,
         plan.x, plan.sorted, plan.views);
  launch(call.op, list_runs, 2, call.stream, plan.y, plan.x);
  launch(call.op, fill_tables<Tile::combined, Acc>,
         plan.x_tiles + plan.row_blocks +
             div_up(plan.row_blocks * Tile::combined / kInverseRows * plan.x_tiles * Tile::cells,
                    kThreads),
         call.stream, plan);
  const int64_t tiles = plan.batch * div_up(2 * div_up(rows, 2), Tile::rows) * plan.x_tiles *
                        div_up(plan.channels, Tile::channels);
  constexpr Keep kKeep = kSmall ? Keep::by_plan : Keep::no;
  auto* kernel = mean_kernel<T, kSmall, kVector, kKeep>;
  if constexpr (!kSmall) {
    if (plan.keep_in_l2) kernel = mean_kernel<T, kSmall, kVector, Keep::yes>;
  }
  launch(call.op, kernel, std::min(tiles, kResident * std::max<int64_t>(1, processors(call.op))),
         call.stream, plan);
  return workspace.bytes();
}

// Large tiles read each token less often; they pay where there are enough of them. For offsets on
// the device the number of runs is unknown: as many as on a grid, a break a token for each row of
// the grid.
template <class T>
bool fills_device(const Call& call) {
  using Tile = cuda::Tile<T, false>;
  const EnsembleArgs& args = call.args;
  const auto ends = [&](int i) {
    const Axis axis = call.axis(i);
    const double breaks = std::ceil(std::sqrt(static_cast<double>(args.views)));
    const int64_t a_token = div_up(axis.patch, axis.stride);
    return std::min(axis.cells(),
                    axis.tokens * std::min(a_token, 2 * static_cast<int64_t>(breaks)));
  };
  return args.batch * div_up(ends(0), Tile::rows) * div_up(ends(1), Tile::cells) *
             div_up(args.channels, Tile::channels) >=
         kResident * processors(call.op);
}

template <class T>
int64_t choose_mean(const Call& call) {
  if (!vectors_fit(call.args, sizeof(T))) return mean<T, true, false>(call);
  if constexpr (sizeof(T) < sizeof(double)) {
    if (fills_device<T>(call)) return mean<T, false, true>(call);
  }
  return mean<T, true, true>(call);
}

}  // namespace

int64_t run_mean(const Call& call) {
  return dispatch_floating(call.args.dtype,
                           [&](auto element) { return choose_mean<decltype(element)>(call); });
}

}  // namespace srt::cuda
