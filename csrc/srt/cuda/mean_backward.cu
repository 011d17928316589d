// The gradient of the mean on the device: with transposed tables, each token gathers the
// gradients of the cells that read it. Like the mean it is separable: cells of a row are summed
// once for all views that share a dx, then rows of these sums for each view. Nothing ever comes
// back to the host.
#include <type_traits>

#include "../axis.h"
#include "../ensemble.h"
#include "common.cuh"

namespace srt::cuda {
namespace {

// ---- the tables ---------------------------------------------------------------------------------

// What each view reads along both axes, the cells that read a token, and what the weights of a cell
// are divided by. Made on the device, wherever the offsets and the weights lie.

// Views are handled in entries, which share a dx, and entries in parts: so many at a time. The
// views of a grid of 7 x 7 offsets are one part.
constexpr int kEntries = 7;

// The cells that read a token in a part, and cells between them; none if `end` is 0.
struct CellSpan {
  int32_t begin, end;
};

template <class Acc>
struct BackwardAxis {
  Axis axis;
  AxisTable<Acc> table;  // of the views, in their order
  CellSpan* span;        // [parts, tokens]
};

template <class Acc>
struct BackwardTables {
  int64_t views;
  int64_t slots;      // views of an entry, at most
  int64_t parts;      // at most
  View* sorted;       // [V] by dx
  int32_t* begin;     // [V + 1], of each entry among the views; V behind the last one
  int32_t* entry_of;  // [V]
  int32_t* entries;
  BackwardAxis<Acc> y, x;
  Acc* inverse;  // [H', W'] 1 / total weight, 0 where no view counts
};

// Empty spans, by all blocks; entries, by the first one.
template <class Acc>
__global__ void __launch_bounds__(kThreads)
    list_entries(const __grid_constant__ BackwardTables<Acc> plan) {
  const int64_t spans = plan.parts * (plan.y.axis.tokens + plan.x.axis.tokens);
  SRT_FOR_THREAD(i, spans) plan.y.span[i] = {INT32_MAX, 0};  // those of x lie behind
  if (blockIdx.x != 0) return;
  const int thread = static_cast<int>(threadIdx.x);
  const auto same = [&](int64_t u, int64_t v) {
    const double a = plan.sorted[u].dx, b = plan.sorted[v].dx;
    return a == b || (isnan(a) && isnan(b));  // NaN: views that cover nothing
  };
  int32_t total = 0;
  for (int64_t from = 0; from < plan.views; from += kThreads) {
    const int64_t v = from + thread;
    bool begin = false;
    if (v < plan.views) {
      int64_t leader = v;
      while (leader > 0 && same(leader - 1, v)) --leader;
      begin = (v - leader) % plan.slots == 0;
    }
    int32_t place = total;
    place += exclusive_sum(begin, total);
    if (begin) plan.begin[place] = static_cast<int32_t>(v);
    if (v < plan.views) plan.entry_of[v] = begin ? place : place - 1;
  }
  if (thread == 0) {
    plan.begin[total] = static_cast<int32_t>(plan.views);
    *plan.entries = total;
  }
}

template <class Acc>
__global__ void __launch_bounds__(kThreads)
    fill_axes(const __grid_constant__ BackwardTables<Acc> plan) {
  const int64_t rows = plan.y.table.cells, cells = plan.x.table.cells;
  SRT_FOR_THREAD(i, plan.views * (rows + cells)) {
    const int64_t v = i / (rows + cells), own = i % (rows + cells);
    const bool vertical = own < rows;
    const BackwardAxis<Acc>& axis = vertical ? plan.y : plan.x;
    const int32_t cell = static_cast<int32_t>(vertical ? own : own - rows);
    fill_axis_cell(axis.axis, vertical ? plan.sorted[v].dy : plan.sorted[v].dx, v, cell,
                   axis.table);
    const int64_t slot = v * axis.table.cells + cell;
    CellSpan* const spans = axis.span + plan.entry_of[v] / kEntries * axis.axis.tokens;
    for (int32_t k = 0; k < axis.table.taps[slot]; ++k) {
      if (axis.table.weight[slot * axis.table.max_taps + k] == 0) continue;
      CellSpan& own_span = spans[axis.table.first[slot] + k];
      atomicMin(&own_span.begin, cell);
      atomicMax(&own_span.end, cell + 1);
    }
  }
}

// Rows of a thread: each count of a column is read once for them.
constexpr int kRowsOfInverse = 8;

template <class Acc>
__global__ void __launch_bounds__(kThreads)
    fill_inverse_of_cells(const __grid_constant__ BackwardTables<Acc> plan) {
  const int64_t rows = plan.y.table.cells, cells = plan.x.table.cells;
  SRT_FOR_THREAD(i, div_up(rows, kRowsOfInverse) * cells) {
    const int64_t x = i % cells, y = i / cells * kRowsOfInverse;
    double total[kRowsOfInverse] = {};
    for (int64_t v = 0; v < plan.views; ++v) {
      // As it stands in the sums, in their type.
      const double weight = static_cast<double>(static_cast<Acc>(plan.sorted[v].weight));
      const double count = weight * plan.x.table.count[v * cells + x];
#pragma unroll
      for (int r = 0; r < kRowsOfInverse; ++r)
        if (y + r < rows) total[r] += count * plan.y.table.count[v * rows + y + r];
    }
#pragma unroll
    for (int r = 0; r < kRowsOfInverse; ++r)
      if (y + r < rows)
        plan.inverse[(y + r) * cells + x] = total[r] > 0 ? static_cast<Acc>(1 / total[r]) : 0;
  }
}

// ---- the gradient -------------------------------------------------------------------------------

// Blocks of the gradient that a processor holds at a time.
constexpr int kBackwardResident = 2;

// A block goes down the rows of one token column, for a part of the views and a few channels, in
// two steps. Cells are summed along 16 rows at a time, for each entry of the part (a warp 4 rows
// and half of the cells, 8 lanes along the channels), into shared memory. Rows of these sums are
// summed for each view into the tokens that are open: a token row is open while its cells go by
// (two warps an open row, 4 entries each, 8 lanes along the channels). It stays in registers, and
// is written when they have gone.
template <class T>
struct GradTile {
  using Acc = typename AccumulatorOf<T>::type;
  static constexpr int lanes = 8;
  static constexpr int quarters = kWarpThreads / lanes;
  static constexpr int vector = sizeof(Acc) == 8 ? 2 : 4;  // channels of a thread
  static constexpr int channels = lanes * vector;
  static constexpr int halves = 2;
  static constexpr int rows = kThreads / lanes / halves;
  static constexpr int open = 4;
  static constexpr int slots = sizeof(Acc) == 8 ? 4 : 7;  // views of an entry
  static constexpr int batch =
      sizeof(Acc) == 8 ? 56 : 112;  // cells of a row, whose weights are kept
  // Cells that are loaded before the first of them is used.
  static constexpr int ahead = sizeof(Acc) == 8 ? 2 : 4;
};

template <class Acc>
struct GradPlan {
  BackwardTables<Acc> tables;
  const void* grad;         // [B, C, H', W'], of the mean
  int64_t grad_strides[4];  // in elements
  int64_t batch, channels;
  int64_t segment, segments;  // token rows of a block; all of them in so many blocks
  void* out;                  // [V, B, h*w, C], dense
  bool keep_in_l2;            // out
};

// The shared memory of a block.
template <class T>
struct GradShared {
  using Tile = GradTile<T>;
  using Acc = typename Tile::Acc;
  using Word = Pack<Acc, Tile::vector>;
  static constexpr int padded = Tile::slots + Tile::slots % 2;
  Word sums[Tile::halves][kEntries][Tile::rows][Tile::lanes];
  Pack<Acc, padded> row_weight[Tile::open][Tile::rows][kEntries];  // of the views of an entry
  Pack<Acc, kEntries + 1> column_weight[Tile::batch];              // of the entries

  // The task of the block. It is read from shared memory whenever it is needed: in registers it
  // would displace the sums.
  int64_t task;    // the next one
  const T* grad;   // channel c0 of image b
  T* out;          // the same, of the token column in view 0
  int channels;    // from c0 on; 0 beyond the last task
  int token;       // the column
  int begin, end;  // token rows
  CellSpan column;
  const CellSpan* rows;         // [h] of the part
  int32_t entry[kEntries + 1];  // of the part: where each begins among the views
  bool single;                  // one view an entry
  int staged;                   // the first of the cells whose column weights are there
};

// kVector: the channels of a thread in one access, which needs aligned rows of them on both sides.
// As many blocks as the device holds at a time go through the tasks: how many there are, only the
// device knows.
template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads, kBackwardResident)
    mean_backward_kernel(const __grid_constant__ GradPlan<typename AccumulatorOf<T>::type> plan) {
  using Tile = GradTile<T>;
  using Acc = typename Tile::Acc;
  using Word = typename GradShared<T>::Word;
  constexpr int kVec = Tile::vector, kRows = Tile::rows, kOpen = Tile::open, kSlots = Tile::slots;
  static_assert(sizeof(GradShared<T>) <= 48 * 1024);
  __shared__ GradShared<T> shared;

  const BackwardTables<Acc>& tables = plan.tables;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % Tile::lanes;
  const int quarter = thread / Tile::lanes % Tile::quarters;
  const int warp = thread / kWarpThreads;
  // Whose cells this thread sums, and whose rows.
  const int half = warp % Tile::halves;
  const int own_row = warp / Tile::halves * Tile::quarters + quarter;
  const int place = warp / 2, entry = warp % 2 * Tile::quarters + quarter;
  // Channels of the task from the first one of this thread on; may be negative.
  const auto channels = [&] { return shared.channels - lane * kVec; };

  if (thread == 0) {
    // Where a processor gets its blocks in turns, those that it holds read neighbouring columns.
    const int64_t turns = gridDim.x / kBackwardResident;
    const bool even = gridDim.x % kBackwardResident == 0;
    shared.task = even ? blockIdx.x % turns * kBackwardResident + blockIdx.x / turns : blockIdx.x;
  }
  for (;;) {
    if (thread == 0) {
      // Blocks that run together read the same cells: two columns, all channels of them, all parts,
      // then the columns beside them.
      const int64_t chunks = div_up(plan.channels, Tile::channels);
      const int64_t entries = *tables.entries, parts = div_up(entries, kEntries);
      const int64_t h = tables.y.axis.tokens, w = tables.x.axis.tokens;
      int64_t rest = shared.task;
      const auto next_of = [&](int64_t n) {
        const int64_t own = rest % n;
        rest /= n;
        return own;
      };
      const int64_t second = next_of(2);
      const int64_t c0 = next_of(chunks) * Tile::channels;
      const int64_t part = next_of(parts);
      const int64_t j = 2 * next_of(div_up(w, 2)) + second;
      const int64_t segment = next_of(plan.segments), b = rest;
      shared.grad =
          static_cast<const T*>(plan.grad) + b * plan.grad_strides[0] + c0 * plan.grad_strides[1];
      shared.out = static_cast<T*>(plan.out) + (b * h * w + j) * plan.channels + c0;
      const int64_t channels = min(plan.channels - c0, int64_t{Tile::channels});
      shared.channels = b < plan.batch ? static_cast<int>(channels) : 0;
      shared.token = static_cast<int>(j);
      shared.begin = static_cast<int>(segment * plan.segment);
      // Where the number of columns is odd, the last one has no neighbour.
      shared.end = j < w ? static_cast<int>(min((segment + 1) * plan.segment, h)) : shared.begin;
      shared.column = j < w ? tables.x.span[part * w + j] : CellSpan{0, 0};
      shared.rows = tables.y.span + part * h;
      for (int e = 0; e <= kEntries; ++e)
        shared.entry[e] = tables.begin[min(part * kEntries + e, entries)];
      const int64_t own = min(entries - part * kEntries, int64_t{kEntries});
      shared.single = shared.entry[kEntries] - shared.entry[0] == own;
      shared.staged = -1;
      shared.task += gridDim.x;
    }
    __syncthreads();
    if (shared.channels == 0) return;

    const auto span_of = [&](int row) { return load(shared.rows + row); };
    Acc total[kSlots][kVec] = {};
    const auto write_row = [&](int row) {
      if (place != row % kOpen || entry >= kEntries) return;
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        const int v = shared.entry[entry] + s;
        if (v < shared.entry[entry + 1] && channels() > 0) {
          const View view = tables.sorted[v];
          const Acc weight = static_cast<Acc>(view.weight);
          const int64_t w = tables.x.axis.tokens, h = tables.y.axis.tokens;
          T* const to =
              shared.out + lane * kVec + (view.index * plan.batch * h + row) * w * plan.channels;
          Pack<T, kVec> pack;
#pragma unroll
          for (int c = 0; c < kVec; ++c) pack.at[c] = from_acc<T>(weight * total[s][c]);
          if (kVector) {
            store(reinterpret_cast<Pack<T, kVec>*>(to), pack, plan.keep_in_l2);
          } else {
#pragma unroll
            for (int c = 0; c < kVec; ++c) {
              if (c < channels()) store(to + c, pack.at[c], plan.keep_in_l2);
            }
          }
        }
#pragma unroll
        for (int c = 0; c < kVec; ++c) total[s][c] = 0;
      }
    };

    // Cells from row y on go by; token rows i to `next` are open.
    int i = shared.begin, next = i, y = 0;
    for (;;) {
      for (; i < next && span_of(i).end <= y; ++i) write_row(i);
      if (i == next) {
        if (next == shared.end) break;
        if (span_of(next).end > 0) y = span_of(next).begin;
      }
      // A row whose first cells have gone by waits until all others are done.
      for (; next < shared.end && next - i < kOpen; ++next) {
        const CellSpan own = span_of(next);
        if (own.end > 0 && (own.begin < y || own.begin >= y + kRows)) break;
      }
      if (span_of(i).end <= y) continue;  // nothing reads it

#pragma unroll 1
      for (int n = thread; n < kEntries * kSlots * kRows; n += kThreads) {
        const AxisTable<Acc>& table = tables.y.table;
        const int row = n % kRows, s = n / kRows % kSlots, e = n / kRows / kSlots;
        const int64_t v = shared.entry[e] + s, slot = v * table.cells + y + row;
        const bool exists = v < shared.entry[e + 1] && y + row < table.cells;
        const int first = exists ? table.first[slot] : 0, taps = exists ? table.taps[slot] : 0;
#pragma unroll
        for (int k = 0; k < kOpen; ++k) {
          const int token = i + ((k - i) & (kOpen - 1)), tap = token - first;
          const bool reads = token < next && tap >= 0 && tap < taps;
          shared.row_weight[k][row][e].at[s] =
              reads ? table.weight[slot * table.max_taps + tap] : 0;
        }
      }

      // Sums cells along a row; returns whether all sums are finite. kExact: a weight of 0 is not
      // multiplied. Otherwise it is, which is wrong for a gradient that is not finite.
      const auto sum_cells = [&](auto exact) {
        constexpr bool kExact = decltype(exact)::value;
        constexpr int kAhead = Tile::ahead;
        Acc sum[kEntries][kVec] = {};
        const int64_t cells = tables.x.table.cells;
        const int64_t step = plan.grad_strides[3] * static_cast<int64_t>(sizeof(T));
        const int64_t own_y = y + own_row;
        const bool reads = own_y < tables.y.table.cells && channels() > 0;
        const T* const row =
            shared.grad + own_y * plan.grad_strides[2] + lane * kVec * plan.grad_strides[1];
        const Acc* const inverses = tables.inverse + own_y * cells;
        const CellSpan own = shared.column;
        for (int x0 = own.begin; x0 < own.end; x0 += Tile::batch) {
          if (shared.staged != x0) {
            __syncthreads();
            shared.staged = x0;
#pragma unroll 1
            for (int n = thread; n < Tile::batch * kEntries; n += kThreads) {
              const int e = n % kEntries, x = n / kEntries;
              const int64_t v = shared.entry[e];
              const bool exists = v < shared.entry[e + 1] && x0 + x < cells;
              shared.column_weight[x].at[e] =
                  exists ? tables.x.table.weight_of(v, x0 + x, shared.token) : 0;
            }
            __syncthreads();
          }
          if (!reads) continue;
          // The halves take turns.
          const int end = min(own.end, x0 + Tile::batch);
          int x = x0 + half * kAhead;
          const char* cell = reinterpret_cast<const char*>(row) + x * step;
          const auto load_cell = [&] {
            const T* const at = reinterpret_cast<const T*>(cell);
            Pack<T, kVec> grad;
            if constexpr (kVector) {
              grad = load(reinterpret_cast<const Pack<T, kVec>*>(at));
            } else {
#pragma unroll
              for (int c = 0; c < kVec; ++c)
                grad.at[c] = c < channels() ? load(at + c * plan.grad_strides[1]) : T{};
            }
            return grad;
          };
          const auto add_cell = [&](int at, const Pack<T, kVec>& grad, Acc inverse) {
            if (kExact && inverse == 0) return;
            const auto weight = shared.column_weight[at - x0];
            const auto value = to_acc(grad);
            Acc share[kVec];
#pragma unroll
            for (int c = 0; c < kVec; ++c) share[c] = inverse * value.at[c];
#pragma unroll
            for (int e = 0; e < kEntries; ++e) {
              if (kExact && weight.at[e] == 0) continue;
#pragma unroll
              for (int c = 0; c < kVec; ++c) sum[e][c] += weight.at[e] * share[c];
            }
          };
          const auto add = [&](auto partial) {
            constexpr bool kPartial = decltype(partial)::value;
            if constexpr (kVector && !kExact) {  // all loads before the first use
              Pack<T, kVec> grad[kAhead];
              Acc inverse[kAhead];
#pragma unroll
              for (int a = 0; a < kAhead; ++a) {
                grad[a] = load_cell();
                inverse[a] = !kPartial || x + a < end ? load(inverses + x + a) : Acc{0};
                if (!kPartial || x + a + 1 < end) cell += step;
              }
#pragma unroll
              for (int a = 0; a < kAhead; ++a)
                add_cell(kPartial ? min(x + a, end - 1) : x + a, grad[a], inverse[a]);
            } else {
#pragma unroll 1
              for (int a = 0; a < (kPartial ? end - x : kAhead); ++a, cell += step)
                add_cell(x + a, load_cell(), load(inverses + x + a));
            }
          };
#pragma unroll 1
          for (; end - x >= kAhead; x += Tile::halves * kAhead) {
            add(std::false_type{});
            cell += (Tile::halves - 1) * kAhead * step;
          }
          if (x < end) add(std::true_type{});
        }
        Acc check = 0;
#pragma unroll
        for (int e = 0; e < kEntries; ++e) {
          Word word;
#pragma unroll
          for (int c = 0; c < kVec; ++c) {
            word.at[c] = sum[e][c];
            check += sum[e][c];
          }
          shared.sums[half][e][own_row][lane] = word;
        }
        return isfinite(check);
      };
      // Sums rows of these sums into the open tokens. kExact: as above.
      const auto sum_rows = [&](auto exact, auto slots) {
        constexpr bool kExact = decltype(exact)::value;
        const int token = i + ((place - i) & (kOpen - 1));
        if (entry >= kEntries || token >= next) return;
        const CellSpan own = span_of(token);
        const int begin = max(own.begin - y, 0), end = min(own.end - y, kRows);
#pragma unroll 2
        for (int row = begin; row < end; ++row) {
          const auto weight = shared.row_weight[place][row][entry];
          const Word first = shared.sums[0][entry][row][lane];
          const Word second = shared.sums[1][entry][row][lane];
          Acc value[kVec];
#pragma unroll
          for (int c = 0; c < kVec; ++c) value[c] = first.at[c] + second.at[c];
#pragma unroll
          for (int s = 0; s < decltype(slots)::value; ++s) {
            if (kExact && weight.at[s] == 0) continue;
#pragma unroll
            for (int c = 0; c < kVec; ++c) total[s][c] += weight.at[s] * value[c];
          }
        }
      };
      const bool finite = sum_cells(std::false_type{});
      if (__syncthreads_or(!finite)) {
        sum_cells(std::true_type{});
        __syncthreads();
        sum_rows(std::true_type{}, std::integral_constant<int, kSlots>{});
      } else if (shared.single) {
        sum_rows(std::false_type{}, std::integral_constant<int, 1>{});
      } else {
        sum_rows(std::false_type{}, std::integral_constant<int, kSlots>{});
      }
      y += kRows;
      __syncthreads();  // before the next rows take the place of these
    }
    __syncthreads();  // before the next task is chosen
  }
}

// ---- on the host --------------------------------------------------------------------------------

template <class Acc>
BackwardTables<Acc> make_tables(const Call& call, int64_t slots, Workspace& workspace) {
  const EnsembleArgs& args = call.args;
  BackwardTables<Acc> plan{};
  plan.views = args.views;
  plan.slots = slots;
  plan.parts = div_up(args.views, kEntries);
  plan.sorted = workspace.take<View>(args.views);
  plan.begin = workspace.take<int32_t>(args.views + 1);
  plan.entry_of = workspace.take<int32_t>(args.views);
  plan.entries = workspace.take<int32_t>(1);
  BackwardAxis<Acc>* const axes[2] = {&plan.y, &plan.x};
  for (int i = 0; i < 2; ++i) {
    axes[i]->axis = call.axis(i);
    AxisTable<Acc>& table = axes[i]->table;
    table.cells = axes[i]->axis.cells();
    table.max_taps = axes[i]->axis.max_taps();
    table.first = workspace.take<int32_t>(args.views * table.cells);
    table.taps = workspace.take<int32_t>(args.views * table.cells);
    table.weight = workspace.take<Acc>(args.views * table.cells * table.max_taps);
    table.count = workspace.take<double>(args.views * table.cells);
  }
  plan.y.span = workspace.take<CellSpan>(plan.parts * (args.grid[0] + args.grid[1]));
  plan.x.span = plan.y.span + plan.parts * args.grid[0];
  plan.inverse = workspace.take<Acc>(plan.y.table.cells * plan.x.table.cells);
  return plan;
}

template <class Acc>
void fill_tables(const Call& call, const BackwardTables<Acc>& plan, const RawViews& raw,
                 const InlineArrays& parameters) {
  const int64_t rows = plan.y.table.cells, cells = plan.x.table.cells;
  const int64_t spans = plan.parts * (plan.y.axis.tokens + plan.x.axis.tokens);
  sort_views(call, raw, parameters, plan.sorted, nullptr);
  launch(call.op, list_entries<Acc>, div_up(spans, kThreads), call.stream, plan);
  launch(call.op, fill_axes<Acc>, div_up(plan.views * (rows + cells), kThreads), call.stream, plan);
  launch(call.op, fill_inverse_of_cells<Acc>,
         div_up(div_up(rows, kRowsOfInverse) * cells, kThreads), call.stream, plan);
}

// Token rows of a block. Shorter segments give more blocks to share out; each reads a token and a
// half more than it writes.
int64_t choose_segment(int64_t rows, int64_t columns_of_blocks, int64_t resident) {
  int64_t best = rows;
  double least = 0;
  for (int64_t count = 1; count <= rows; ++count) {
    const int64_t length = div_up(rows, count);
    const double rounds = static_cast<double>(div_up(columns_of_blocks * count, resident));
    const double time = rounds * (static_cast<double>(length) + 1.5);
    if (count == 1 || time < least) {
      least = time;
      best = length;
    }
  }
  return best;
}

template <class T>
int64_t mean_backward(const Call& call, void* grad_tokens) {
  const EnsembleArgs& args = call.args;
  using Tile = GradTile<T>;
  using Acc = typename Tile::Acc;
  Workspace workspace(call.workspace);
  GradPlan<Acc> plan{};
  plan.tables = make_tables<Acc>(call, Tile::slots, workspace);
  InlineArrays parameters;
  const RawViews raw = raw_views(call, workspace, parameters);
  if (!call.workspace) return workspace.bytes();

  plan.grad = args.out;
  std::copy_n(args.out_strides, 4, plan.grad_strides);
  plan.batch = args.batch;
  plan.channels = args.channels;
  plan.out = grad_tokens;
  constexpr int64_t kSize = sizeof(T);
  plan.keep_in_l2 = fits_l2(call.op, kSize * call.field_elements(), kSize * call.token_elements());
  const int64_t resident = kBackwardResident * std::max<int64_t>(1, processors(call.op));
  // For offsets on the device the number of entries is unknown: as many as on a grid.
  const int64_t parts = div_up(div_up(args.views, Tile::slots), kEntries);
  const int64_t columns =
      args.batch * parts * 2 * div_up(args.grid[1], 2) * div_up(args.channels, Tile::channels);
  plan.segment = choose_segment(args.grid[0], columns, resident);
  plan.segments = div_up(args.grid[0], plan.segment);

  const auto aligned = [](const void* p) {
    return reinterpret_cast<uintptr_t>(p) % (Tile::vector * sizeof(T)) == 0;
  };
  const auto fits = [&](int64_t stride) { return stride % Tile::vector == 0; };
  const bool vector = aligned(args.out) && aligned(grad_tokens) && fits(args.channels) &&
                      args.out_strides[1] == 1 && (args.batch == 1 || fits(args.out_strides[0])) &&
                      fits(args.out_strides[2]) && fits(args.out_strides[3]);
  fill_tables(call, plan.tables, raw, parameters);
  const int64_t tasks = columns / parts * plan.tables.parts * plan.segments;
  launch(call.op, vector ? mean_backward_kernel<T, true> : mean_backward_kernel<T, false>,
         std::min(tasks, resident), call.stream, plan);
  return workspace.bytes();
}

int64_t dispatch(const Call& call, void* grad_tokens) {
  const EnsembleArgs& args = call.args;
  if (args.batch == 0 || args.channels == 0) return 0;
  check_views(call.op, args.views);
  return dispatch_floating(args.dtype, [&](auto element) {
    return mean_backward<decltype(element)>(call, grad_tokens);
  });
}

}  // namespace
}  // namespace srt::cuda

namespace srt {

int64_t mean_backward_cuda_workspace(const EnsembleArgs& args, const ViewArray& offsets,
                                     const ViewArray& weights) {
  return cuda::dispatch({"_mean_backward", args, offsets, weights, nullptr, nullptr}, nullptr);
}

void mean_backward_cuda(const char* op, const EnsembleArgs& args, const ViewArray& offsets,
                        const ViewArray& weights, void* grad_tokens, void* workspace,
                        CUstream_st* stream) {
  cuda::dispatch({op, args, offsets, weights, workspace, stream}, grad_tokens);
}

}  // namespace srt
