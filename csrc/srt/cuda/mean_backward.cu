// The gradient of the mean on the device: from the gradient of the field [B, C, H', W'] to the
// gradient of the tokens [V, B, h*w, C]. Every token gathers the gradients of the cells that read
// it, so no two threads add to one element. Like the mean, the gradient is separable: the cells of
// a row are summed once for all views that share a dx, and the rows of these sums are then summed
// for each view. A block goes down the rows of a token column once. It holds the token rows that
// the current cells belong to in registers, so each gradient row is loaded once per column and part
// of the views. Small kernels compute the tables from the offsets on the device, so nothing is
// copied back to the host.
#include <type_traits>

#include "../ensemble.h"
#include "view_tables.cuh"

namespace srt::cuda {
namespace {

// ---- the tables ---------------------------------------------------------------------------------

// Views that share a dx form entries of at most GradPlan::slots views, and kEntries entries form a
// part, which a block processes together. The views of a grid of 7 x 7 offsets are one part.
constexpr int kEntries = 7;

// The range of cells that read a token in a part; empty if `end` is 0. Under a circular border,
// cells at both ends of the axis may read the same token. To make the cells of a token consecutive,
// they are numbered as if the axis were repeated three times: of 10 cells, 8, 9 and 0 become 18, 19
// and 20.
struct CellSpan {
  int32_t begin, end;
};

template <class Acc>
struct GradPlan {
  ViewTables<Acc> tables;
  int64_t slots;              // views of an entry, at most
  int64_t parts;              // parts, at most
  int32_t* begin;             // [V + 1]; the first view of each entry, then V
  int32_t* entry_of;          // [V]; the entry of a view
  int32_t* entries;           // [1]; the number of entries
  CellSpan *span_y, *span_x;  // [parts, h] and [parts, w]
  Acc* inverse;               // [H', W']; 1 / total weight, 0 if no view counts
  const void* grad;           // [B, C, H', W'], the gradient of the mean
  int64_t grad_strides[4];    // in elements
  int64_t batch, channels;
  int64_t segment, segments;  // token rows of a task, and the number of segments
  void* out;                  // [V, B, h*w, C], dense
  bool keep_in_l2;            // of `out`, see store()

  SRT_HD int64_t spans() const { return parts * (tables.y.axis.tokens + tables.x.axis.tokens); }
};

// Clears the spans and lists the entries. The thread of a view goes through all views up to its
// own.
template <class Acc>
__global__ void __launch_bounds__(kThreads)
    list_entries(const __grid_constant__ GradPlan<Acc> plan) {
  SRT_FOR_THREAD(i, plan.spans()) plan.span_y[i] = {INT32_MAX, 0};  // span_x follows
  SRT_FOR_THREAD(v, plan.tables.views) {
    int32_t entry = -1;
    int64_t begin = 0;
    double dx = 0;
    for (int64_t u = 0; u <= v; ++u) {
      const double next = plan.tables.sorted[u].dx;
      const bool same = next == dx || (isnan(next) && isnan(dx));  // NaN covers nothing
      if (entry < 0 || !same || u == begin + plan.slots) {
        ++entry;
        begin = u;
      }
      dx = next;
    }
    plan.entry_of[v] = entry;
    if (begin == v) plan.begin[entry] = static_cast<int32_t>(v);
    if (v + 1 < plan.tables.views) continue;
    plan.begin[entry + 1] = static_cast<int32_t>(v + 1);
    *plan.entries = entry + 1;
  }
}

// The transposed table of an axis: the cells that read a token, numbered as in CellSpan.
template <class Acc>
struct CellsOfTokens {
  const ViewAxis<Acc>& axis;
  int cells, tokens, before;  // of one repetition, and repetitions before the axis itself

  __device__ explicit CellsOfTokens(const ViewAxis<Acc>& of)
      : axis(of),
        cells(static_cast<int>(of.table.cells)),
        tokens(static_cast<int>(of.axis.tokens)),
        before(of.axis.wraps() ? 1 : 0) {}

  __device__ int numbers() const { return (2 * before + 1) * cells; }
  __device__ int cell(int number) const {
    while (number >= cells) number -= cells;
    return number;
  }
  // The weight with which a cell of view v reads a token.
  __device__ Acc weight_of(int64_t v, int number, int token) const {
    const int place = token - (number / cells - before) * tokens - axis.start[v];
    return axis.table.weight_of(v, cell(number), place);
  }
  // Extends the spans of the tokens that a cell of view v reads by this cell.
  __device__ void widen_spans(int64_t v, int64_t cell, CellSpan* span) const {
    const AxisTable<Acc>& table = axis.table;
    const int64_t slot = v * cells + cell;
    for (int32_t k = 0; k < table.taps[slot]; ++k) {
      if (table.weight[slot * table.max_taps + k] == 0) continue;
      int token = axis.start[v] + table.first[slot] + k, period = before;
      if (token < 0) {
        token += tokens;
        ++period;
      } else if (token >= tokens) {
        token -= tokens;
        --period;
      }
      const int number = static_cast<int>(cell) + period * cells;
      atomicMin(&span[token].begin, number);
      atomicMax(&span[token].end, number + 1);
    }
  }
};

template <class Acc>
__global__ void __launch_bounds__(kThreads, 2)  // with fewer registers it spills
    fill_spans_and_inverse(const __grid_constant__ GradPlan<Acc> plan) {
  const ViewTables<Acc>& tables = plan.tables;
  const int64_t rows = tables.y.table.cells;
  SRT_FOR_THREAD(i, tables.views * tables.cells()) {
    const int64_t v = i / tables.cells(), cell = i % tables.cells();
    const int64_t part = plan.entry_of[v] / kEntries;
    const bool down = cell < rows;
    const ViewAxis<Acc>& axis = down ? tables.y : tables.x;
    CellSpan* const span = (down ? plan.span_y : plan.span_x) + part * axis.axis.tokens;
    CellsOfTokens<Acc>(axis).widen_spans(v, down ? cell : cell - rows, span);
  }
  tables.visit_weights(/*counts_views=*/false, [&](int64_t cell, double total) {
    plan.inverse[cell] = total > 0 ? static_cast<Acc>(1 / total) : 0;
  });
}

// ---- the gradient -------------------------------------------------------------------------------

// Resident blocks of the gradient kernel per multiprocessor.
constexpr int kBackwardResident = 2;

// A block goes down the rows of one token column, for a part of the views and a few channels, in
// two alternating steps. Step 1 sums the cells of 16 rows along x, for each entry of the part, into
// shared memory: a warp processes 4 rows and half of the cells, with 8 lanes along the channels.
// Step 2 sums the rows of these sums, for each view, into the open token rows. A token row is open
// while the current cell rows belong to it; its sums are held in registers, and it is written when
// its last cell row has been summed. Two warps process an open row, 4 entries each, with 8 lanes
// along the channels.
//
// With kVector, a thread accesses several channels at a time, which must be aligned in input and
// output. Otherwise a thread processes one channel.
template <class T, bool kVector>
struct GradTile {
  using Acc = typename AccumulatorOf<T>::type;
  static constexpr int lanes = 8;
  static constexpr int quarters = kWarpThreads / lanes;
  static constexpr int vector = !kVector ? 1 : sizeof(Acc) == 8 ? 2 : 4;  // channels of a thread
  static constexpr int channels = lanes * vector;
  static constexpr int halves = 2;
  static constexpr int rows = kThreads / lanes / halves;
  static constexpr int open = 4;
  static constexpr int slots = sizeof(Acc) == 8 ? 4 : 7;  // views of an entry
  // Cells of a row whose weights are in shared memory, and cells that are loaded before the first
  // one is used.
  static constexpr int batch = sizeof(Acc) == 8 ? 56 : 112;
  static constexpr int ahead = sizeof(Acc) == 8 ? 2 : 4;
};

// The shared memory of a block.
template <class T, class Tile>
struct GradShared {
  using Acc = typename Tile::Acc;
  static constexpr int padded = Tile::slots + Tile::slots % 2;
  Pack<Acc, Tile::vector> sums[Tile::halves][kEntries][Tile::rows][Tile::lanes];
  Pack<Acc, padded> row_weight[Tile::open][Tile::rows][kEntries];  // of the views of an entry
  Pack<Acc, kEntries + 1> column_weight[Tile::batch];              // of the entries

  // The task of the block. It is kept in shared memory and read when it is needed, because in
  // registers it would displace the sums.
  const T* grad;   // at channel c0 of image b
  T* out;          // the same, at the token column in view 0
  int channels;    // starting at c0
  int token;       // the token column
  int begin, end;  // token rows
  CellSpan column;
  const CellSpan* rows;         // [h] of the part
  int32_t entry[kEntries + 1];  // the first view of each entry of the part
  int most;                     // views of an entry, at most
  int staged;                   // the first cell of column_weight, or -1
};

// The state of one thread of a block.
template <class T, class Tile>
struct GradThread {
  using Acc = typename Tile::Acc;
  static constexpr int kVec = Tile::vector, kRows = Tile::rows, kOpen = Tile::open;
  static constexpr int kSlots = Tile::slots;
  const GradPlan<Acc>& plan;
  GradShared<T, Tile>& shared;
  // Step 1: this thread sums every second cell (`half`) of row `own_row`. Step 2: it sums the rows
  // of the open token row at `place`, for `entry`.
  int lane, half, own_row, place, entry;
  Acc total[kSlots][kVec];  // of the open token row, by view

  __device__ GradThread(const GradPlan<Acc>& plan, GradShared<T, Tile>& shared)
      : plan(plan), shared(shared), total{} {
    const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpThreads;
    const int quarter = thread / Tile::lanes % Tile::quarters;
    lane = thread % Tile::lanes;
    half = warp % Tile::halves;
    own_row = warp / Tile::halves * Tile::quarters + quarter;
    place = warp / 2;
    entry = warp % 2 * Tile::quarters + quarter;
  }

  // Channels of the task, starting at the first channel of this thread; may be negative.
  __device__ int channels() const { return shared.channels - lane * kVec; }

  // Two neighbouring columns vary fastest, then channels, parts and the remaining columns, so that
  // blocks that run at the same time read the same cells.
  __device__ void set_task(int64_t task, int64_t parts) const {
    const ViewTables<Acc>& tables = plan.tables;
    const int64_t h = tables.y.axis.tokens, w = tables.x.axis.tokens;
    int64_t rest = task;
    const auto next_of = [&](int64_t n) {
      const int64_t own = rest % n;
      rest /= n;
      return own;
    };
    const int64_t second = next_of(2);
    const int64_t c0 = next_of(div_up(plan.channels, Tile::channels)) * Tile::channels;
    const int64_t part = next_of(parts);
    const int64_t j = 2 * next_of(div_up(w, 2)) + second;
    const int64_t segment = next_of(plan.segments), b = rest;
    shared.grad =
        static_cast<const T*>(plan.grad) + b * plan.grad_strides[0] + c0 * plan.grad_strides[1];
    shared.out = static_cast<T*>(plan.out) + (b * h * w + j) * plan.channels + c0;
    shared.channels = static_cast<int>(min(plan.channels - c0, int64_t{Tile::channels}));
    shared.token = static_cast<int>(j);
    shared.begin = static_cast<int>(segment * plan.segment);
    // Where the number of columns is odd, the last one has no neighbour.
    shared.end = j < w ? static_cast<int>(min((segment + 1) * plan.segment, h)) : shared.begin;
    shared.column = j < w ? plan.span_x[part * w + j] : CellSpan{0, 0};
    shared.rows = plan.span_y + part * h;
    shared.most = 0;
    for (int e = 0; e <= kEntries; ++e) {
      shared.entry[e] = plan.begin[min(part * kEntries + e, int64_t{*plan.entries})];
      if (e > 0) shared.most = max(shared.most, shared.entry[e] - shared.entry[e - 1]);
    }
    shared.staged = -1;
  }

  // Stages the weights of the views in the cell rows starting at y, for the open token rows [i,
  // next).
  __device__ void stage_rows(int y, int i, int next) const {
    const CellsOfTokens<Acc> rows(plan.tables.y);
#pragma unroll 1
    for (int n = static_cast<int>(threadIdx.x); n < kEntries * kSlots * kRows; n += kThreads) {
      const int row = n % kRows, s = n / kRows % kSlots, e = n / kRows / kSlots;
      const int64_t v = shared.entry[e] + s;
      const bool exists = v < shared.entry[e + 1] && y + row < rows.numbers();
#pragma unroll
      for (int k = 0; k < kOpen; ++k) {
        const int token = i + ((k - i) & (kOpen - 1));
        shared.row_weight[k][row][e].at[s] =
            exists && token < next ? rows.weight_of(v, y + row, token) : 0;
      }
    }
  }

  // Stages the weights of the entries in the cells starting at x0. They are the same for all rows
  // of the task, so they are staged only once if all cells fit.
  __device__ void stage_columns(int x0) const {
    if (shared.staged == x0) return;
    const CellsOfTokens<Acc> columns(plan.tables.x);
    __syncthreads();
    shared.staged = x0;
#pragma unroll 1
    for (int n = static_cast<int>(threadIdx.x); n < Tile::batch * kEntries; n += kThreads) {
      const int e = n % kEntries, x = n / kEntries;
      const int64_t v = shared.entry[e];
      const bool exists = v < shared.entry[e + 1] && x0 + x < columns.numbers();
      shared.column_weight[x].at[e] = exists ? columns.weight_of(v, x0 + x, shared.token) : 0;
    }
    __syncthreads();
  }

  // Step 1: sums the cells of row y + own_row for each entry. Weights of 0 are skipped, because the
  // gradient may be non-finite. If no view counts in a cell, the weight need not be 0, but no token
  // row uses the sum.
  __device__ void sum_cells(int y) const {
    const CellsOfTokens<Acc> rows(plan.tables.y), columns(plan.tables.x);
    const int64_t row = rows.cell(y + own_row);
    const bool reads = y + own_row < rows.numbers() && channels() > 0;
    const T* const grad =
        shared.grad + row * plan.grad_strides[2] + lane * kVec * plan.grad_strides[1];
    const Acc* const inverses = plan.inverse + row * columns.cells;
    Acc sum[kEntries][kVec] = {};
    for (int x0 = shared.column.begin; x0 < shared.column.end; x0 += Tile::batch) {
      stage_columns(x0);
      const int end = reads ? min(shared.column.end, x0 + Tile::batch) : x0;
      // The two halves process alternate cells.
#pragma unroll Tile::ahead
      for (int x = x0 + half; x < end; x += Tile::halves) {
        const int column = columns.cell(x);
        const Acc inverse = load(inverses + column);
        const T* const cell = grad + column * plan.grad_strides[3];
        const auto value = to_acc(load(reinterpret_cast<const Pack<T, kVec>*>(cell)));
        const auto weight = shared.column_weight[x - x0];
        Acc share[kVec];
#pragma unroll
        for (int c = 0; c < kVec; ++c) share[c] = inverse * value.at[c];
#pragma unroll
        for (int e = 0; e < kEntries; ++e) {
          if (weight.at[e] == 0) continue;
#pragma unroll
          for (int c = 0; c < kVec; ++c) sum[e][c] += weight.at[e] * share[c];
        }
      }
    }
#pragma unroll
    for (int e = 0; e < kEntries; ++e)
#pragma unroll
      for (int c = 0; c < kVec; ++c) shared.sums[half][e][own_row][lane].at[c] = sum[e][c];
  }

  // Step 2: sums the rows starting at y into the open token row of this thread, for up to kViews
  // views of its entry.
  template <int kViews>
  __device__ void sum_rows(int y, int i, int next) {
    const int token = i + ((place - i) & (kOpen - 1));
    if (entry >= kEntries || token >= next) return;
    const CellSpan own = load(shared.rows + token);
    const int begin = max(own.begin - y, 0), end = min(own.end - y, kRows);
#pragma unroll 2
    for (int row = begin; row < end; ++row) {
      const auto weight = shared.row_weight[place][row][entry];
      const auto first = shared.sums[0][entry][row][lane];
      const auto second = shared.sums[1][entry][row][lane];
      Acc value[kVec];
#pragma unroll
      for (int c = 0; c < kVec; ++c) value[c] = first.at[c] + second.at[c];
#pragma unroll
      for (int s = 0; s < kViews; ++s) {
        if (weight.at[s] == 0) continue;
#pragma unroll
        for (int c = 0; c < kVec; ++c) total[s][c] += weight.at[s] * value[c];
      }
    }
  }

  // Writes a token row that is complete, and closes it.
  __device__ void write_row(int row) {
    if (place != row % kOpen || entry >= kEntries) return;
    const int64_t w = plan.tables.x.axis.tokens, h = plan.tables.y.axis.tokens;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const int v = shared.entry[entry] + s;
      if (v < shared.entry[entry + 1] && channels() > 0) {
        const View view = plan.tables.sorted[v];
        const Acc weight = static_cast<Acc>(view.weight);
        T* const to =
            shared.out + lane * kVec + (view.index * plan.batch * h + row) * w * plan.channels;
        Pack<T, kVec> pack;
#pragma unroll
        for (int c = 0; c < kVec; ++c) pack.at[c] = from_acc<T>(weight * total[s][c]);
        store(reinterpret_cast<Pack<T, kVec>*>(to), pack, plan.keep_in_l2);
      }
#pragma unroll
      for (int c = 0; c < kVec; ++c) total[s][c] = 0;
    }
  }

  // Goes down the cell rows in steps of kRows. Token rows [i, next) are open at cell row y.
  __device__ void go_down() {
    const auto span_of = [&](int row) { return load(shared.rows + row); };
    int i = shared.begin, next = i, y = 0;
    for (;;) {
      for (; i < next && span_of(i).end <= y; ++i) write_row(i);
      if (i == next) {
        if (next == shared.end) return;
        if (span_of(next).end > 0) y = span_of(next).begin;
      }
      // A token row whose first cell row has already been passed is opened after all others are
      // closed.
      for (; next < shared.end && next - i < kOpen; ++next) {
        const CellSpan own = span_of(next);
        if (own.end > 0 && (own.begin < y || own.begin >= y + kRows)) break;
      }
      if (span_of(i).end <= y) continue;  // no cell reads it
      stage_rows(y, i, next);
      sum_cells(y);
      __syncthreads();
      if (shared.most == 1) {
        sum_rows<1>(y, i, next);
      } else if (shared.most == 2) {
        sum_rows<2>(y, i, next);
      } else {
        sum_rows<kSlots>(y, i, next);
      }
      y += kRows;
      __syncthreads();  // before the next rows overwrite these
    }
  }
};

// The grid has as many blocks as the device can hold, and they loop over the tasks, because only
// the device knows the number of tasks.
template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads, kBackwardResident)
    mean_backward_kernel(const __grid_constant__ GradPlan<typename AccumulatorOf<T>::type> plan) {
  using Tile = GradTile<T, kVector>;
  static_assert(sizeof(GradShared<T, Tile>) <= 48 * 1024);
  __shared__ GradShared<T, Tile> shared;
  GradThread<T, Tile> own(plan, shared);
  const int64_t parts = div_up(*plan.entries, kEntries);
  const int64_t chunks = div_up(plan.channels, Tile::channels);
  const int64_t pairs = div_up(plan.tables.x.axis.tokens, 2);
  SRT_FOR_BLOCK(task, 2 * chunks * parts * pairs * plan.segments * plan.batch) {
    __syncthreads();  // all threads have finished the previous task
    if (threadIdx.x == 0) own.set_task(task, parts);
    __syncthreads();
    own.go_down();
  }
}

// ---- on the host --------------------------------------------------------------------------------

// Returns the number of token rows of a segment. Shorter segments give more blocks, which balances
// the load, but each segment reads cells of about 1.5 token rows in addition to those that it
// writes.
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

template <class T, bool kVector>
int64_t mean_backward(const Call& call, void* grad_tokens) {
  const EnsembleArgs& args = call.args;
  using Tile = GradTile<T, kVector>;
  using Acc = typename Tile::Acc;
  Workspace workspace(call.workspace);
  GradPlan<Acc> plan{};
  plan.tables = ViewTables<Acc>(call, workspace);
  plan.slots = Tile::slots;
  plan.parts = div_up(args.views, kEntries);
  plan.begin = workspace.take<int32_t>(args.views + 1);
  plan.entry_of = workspace.take<int32_t>(args.views);
  plan.entries = workspace.take<int32_t>(1);
  plan.span_y = workspace.take<CellSpan>(plan.spans());
  plan.span_x = plan.span_y + plan.parts * args.grid[0];
  const int64_t cells = plan.tables.y.table.cells * plan.tables.x.table.cells;
  plan.inverse = workspace.take<Acc>(cells);
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
  // The number of entries is unknown if the offsets are on the device: assume that of a grid.
  const int64_t parts = div_up(div_up(args.views, Tile::slots), kEntries);
  const int64_t columns =
      args.batch * parts * 2 * div_up(args.grid[1], 2) * div_up(args.channels, Tile::channels);
  plan.segment = choose_segment(args.grid[0], columns, resident);
  plan.segments = div_up(args.grid[0], plan.segment);

  const int64_t reads = args.views * plan.tables.cells();
  sort_views(call, raw, parameters, plan.tables.sorted, nullptr);
  launch(call.op, list_entries<Acc>, div_up(std::max(plan.spans(), args.views), kThreads),
         call.stream, plan);
  launch(call.op, fill_view_tables<Acc>, div_up(reads, kThreads), call.stream, plan.tables);
  launch(call.op, fill_spans_and_inverse<Acc>,
         std::max(div_up(reads, kThreads), plan.tables.weight_blocks()), call.stream, plan);
  const int64_t tasks = columns / parts * plan.parts * plan.segments;
  launch(call.op, mean_backward_kernel<T, kVector>, std::min(tasks, resident), call.stream, plan);
  return workspace.bytes();
}

// Whether the channels of input and output can be accessed as aligned vectors.
template <class T>
bool are_vectors(const EnsembleArgs& args, const void* grad_tokens) {
  constexpr int64_t kChannels = GradTile<T, true>::vector;
  const int64_t image_step = args.batch == 1 ? 0 : args.out_strides[0];
  const int64_t steps = args.channels | image_step | args.out_strides[2] | args.out_strides[3];
  const auto addresses =
      reinterpret_cast<uintptr_t>(args.out) | reinterpret_cast<uintptr_t>(grad_tokens);
  return args.out_strides[1] == 1 && steps % kChannels == 0 &&
         addresses % (kChannels * sizeof(T)) == 0;
}

int64_t dispatch(const Call& call, void* grad_tokens) {
  const EnsembleArgs& args = call.args;
  if (args.batch == 0 || args.channels == 0) return 0;
  check_views(call.op, args.views);
  return dispatch_floating(args.dtype, [&](auto element) {
    using T = decltype(element);
    return are_vectors<T>(args, grad_tokens) ? mean_backward<T, true>(call, grad_tokens)
                                             : mean_backward<T, false>(call, grad_tokens);
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
