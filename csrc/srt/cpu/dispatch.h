// The inner loops, one set for each instruction set, and the choice between them.
#pragma once
#include <cstdint>

#include "../axis.h"
#include "../running_median.h"
#include "../shift.h"
#include "../types.h"

namespace srt::cpu {

// What the kernels of ensemble share. A task is one image, one band of output rows and one chunk of
// channels. Views are sorted by dx; those that share a dx form a group, which shares a row of the x
// table.
template <class Acc>
struct ViewsPlan {
  struct View {
    int64_t index;  // in tokens
    int64_t dy;     // its row of the y table
    int64_t group;  // its row of the x table
    Acc weight;     // > 0, at most 1
  };
  const void* tokens;        // [V, B, h*w, C]
  int64_t token_strides[3];  // of V, B and h*w, in elements
  int64_t batch, channels;
  int64_t rows, columns;  // output cells, H' and W'
  int64_t tokens_x;       // w
  AxisTable<Acc> y;       // [distinct dy, rows]
  AxisTable<Acc> x;       // [groups, columns]
  int64_t groups;
  const int64_t* group_begin;  // [groups + 1], into views
  const View* views;           // [view_count] the views of weight > 0
  int64_t view_count;
  int64_t band;            // output rows of a task
  int64_t chunk;           // channels of a task, whole blocks
  void* out;               // [B, C, H', W']
  int64_t out_strides[4];  // in elements
  // Of a stream; null for one call over all views (ensemble.h).
  const double* seen;  // [H', W']
  double scale;        // of the weights of the views, in units of `seen`
};

// An axis as products of small matrices: `tile` cells that follow each other read the same few
// tokens, each with a weight for every one of them, so a token is loaded once for all. Where a cell
// does not read a token the weight is 0, which only finite tokens forgive: others are summed cell
// by cell, from the AxisTable.
template <class Acc>
struct TileTable {
  int64_t tile;          // cells
  int64_t tiles;         // of the axis; the last one may have fewer cells
  const int64_t* begin;  // [D * tiles + 1], into the inputs
  const int64_t* token;  // [inputs]
  const Acc* weight;     // [inputs, tile]
};

// The weighted mean: for each group of views, their rows are summed once for a tile of output rows;
// then one filter along each row. Both are products with a TileTable.
template <class Acc>
struct MeanPlan : ViewsPlan<Acc> {
  TileTable<Acc> tile_y;  // [distinct dy]
  TileTable<Acc> tile_x;  // of all groups together: its tokens are [groups, tokens_x]
  int64_t pass;           // channels whose sums fit the cache, whole blocks
  struct Scratch {        // byte offsets into a worker's scratch
    int64_t sums;         // Acc [tile_y, groups, tokens_x, pass]
    int64_t at;           // int64: of the inputs of a tile
    int64_t weights;      // Acc: theirs
    int64_t count;        // double [columns]
    int64_t inverse;      // Acc [tile_y, columns]
    int64_t keep;         // Acc [tile_y, columns]
    int64_t bytes;        // in all
  };
  Scratch scratch;
};

// Reductions that need the value of every view in a cell: the median, the moments. The weights of
// the tables are divided by the counted pixels of the cell.
template <class Acc>
struct ValuePlan : ViewsPlan<Acc> {
  struct Scratch {
    int64_t sums;         // Acc [V, tokens_x, chunk]: the combined rows of each view
    int64_t row_at;       // int64: the token rows that one view combines, in elements
    int64_t row_weights;  // Acc: their weights
    int64_t row_of;       // int64_t [V]: the combined row of a view, or -1
    int64_t values;       // ViewValue [V]
    int64_t weights;      // double [V]: of the values
    int64_t shares;       // Acc [V]: of their total
    int64_t steps;        // WindowStep [V]
    int64_t buffer;       // Acc [max(V, kLargestNetwork), block]: what a cell selects from
    int64_t bytes;
  };
  // The first cell after those that equal this one in every view: [rows] and [columns].
  const int32_t *end_y, *end_x;
  const int64_t* order;  // [view_count] in which the values stand; null for that of the views
  Scratch scratch;
  void* variance;  // as out
  int64_t plane_stride;
};

// What the scratch of a ValuePlan holds.
template <class Acc>
struct ViewValue {
  const Acc* sums;    // [taps, chunk]
  const Acc* weight;  // [taps]
  int64_t taps;
};

// The gradient of the tokens of a mean: the filters of MeanPlan turned around, in the other order.
// For each distinct dy the gradient rows that read a token row are summed, then, for each view, the
// columns of that. A task is one image, one row of tokens and one chunk of channels. `out` is the
// gradient.
template <class Acc>
struct MeanBackwardPlan : ViewsPlan<Acc> {
  // One axis with the views on it: a TileTable of the cells that read a token, for `tile` offsets
  // that follow each other; its sets are the tokens.
  TileTable<Acc> tile_y, tile_x;
  TileTable<Acc> exact_y, exact_x;  // by single offsets, of cells that do read the token
  // Views of one dy whose groups are in one tile of x. Those of dy number d are [runs_of[d],
  // runs_of[d + 1]).
  struct Run {
    int64_t tile, begin, end;  // into by_dy
  };
  const typename ViewsPlan<Acc>::View* by_dy;  // sorted by dy, then by group
  const Run *runs, *exact_runs;
  const int64_t *runs_of, *exact_runs_of;  // [distinct dy + 1]
  int64_t offsets_y;                       // distinct dy
  int64_t tokens_y;                        // h
  const Acc* inverse;                      // [H', W']: 1 / the weight of a cell, or 0
  // The row is made in segments of token columns; cells [begin, end) read them.
  int64_t segment, segments;
  struct Window {
    int64_t begin, end;
  };
  const Window* windows;  // [segments]
  int64_t pass;           // channels whose sums fit the cache, whole blocks
  void* grad_tokens;      // [V, B, h*w, C], dense
  struct Scratch {
    int64_t sums;     // Acc [tile of y, the largest window, pass]
    int64_t window;   // its size
    int64_t at;       // int64: of the inputs of a tile
    int64_t weights;  // Acc: theirs
  };
  Scratch scratch;
};

struct ShiftPlan {
  struct View {
    ShiftTaps y, x;
    // Line positions that need no padding: there source_x[m] is x.first + m.
    int64_t inner_begin, inner_end;
  };
  const void* image;  // [planes, height, width]
  int64_t planes, height, width;
  const View* views;        // [V]
  const int64_t* source_y;  // [V, height + 3] source row at y.first + m, -1 for zeros
  const int64_t* source_x;  // [V, width + 3]
  void* out;                // [V, planes, height, width]
};

// The gradient of the image; `out` is that of the views. A task is an image row, counted over
// planes; scratch: Acc [3 * (width + 128)].
struct ShiftBackwardPlan : ShiftPlan {
  struct Read {
    int64_t row;    // of the gradient of the view
    double weight;  // not 0
  };
  int64_t view_count;
  const int64_t* read_begin;  // [V * height + 1], into reads: those of each image row
  const Read* reads;
  void* grad_image;  // [planes, height, width]
};

// Runs tasks [begin, end). Scratch is the worker's own, 64-byte aligned.
template <class Plan>
using Kernel = void (*)(const Plan& plan, int64_t begin, int64_t end, void* scratch);

// The kernels of ensemble for tokens of one type. In a stream `out` has the accumulator's type.
template <class Acc>
struct EnsembleKernels {
  Kernel<MeanPlan<Acc>> mean, stream_mean;
  Kernel<ValuePlan<Acc>> median, moments, stream_median, stream_moments;
  Kernel<MeanBackwardPlan<Acc>> mean_backward;
};

struct Kernels {
  const char* name;
  int64_t block_bytes;  // of the channels that are treated together, at most
  int64_t max_tile;     // cells
  EnsembleKernels<float> ensemble_f32, ensemble_f16, ensemble_bf16;
  EnsembleKernels<double> ensemble_f64;
  // A task is an output row, counted over views and planes; scratch: Acc [width + 3 + 64].
  Kernel<ShiftPlan> shift_f32, shift_f16, shift_bf16, shift_f64, shift_u8;
  Kernel<ShiftBackwardPlan> shift_backward_f32, shift_backward_f16, shift_backward_bf16,
      shift_backward_f64;
};

extern const Kernels baseline;
#if defined(__x86_64__)
extern const Kernels avx2;
extern const Kernels avx512;
#endif

// The set in use: the widest one that this processor runs, unless another was forced.
const Kernels& kernels();
// Forces a set by name; "auto" returns to the widest. False if this machine has no such set.
bool force_kernels(const char* name);
// The names that force_kernels takes here, narrowest first, separated by commas.
const char* available_kernels();

}  // namespace srt::cpu
