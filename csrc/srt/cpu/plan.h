// What the kernels of one call need: plain structs (and sum_weights), filled by the callers
// (mean.cpp, per_view.cpp, shift.cpp, ...) and read by the code that is compiled for each
// instruction set (*-inl.h).
#pragma once
#include <cstdint>

#include "../axis.h"
#include "../ensemble.h"
#include "../running_median.h"
#include "../shift.h"
#include "../types.h"
#include "../windows.h"

namespace srt::cpu {

// An array in the scratch of a worker.
template <class T>
struct ScratchArray {
  int64_t offset;  // bytes
};

// Cells or tokens [begin, end) of an axis.
struct Span {
  int64_t begin, end;
};

// What the kernels of ensemble share. A task is one image, one band of output rows and one chunk of
// channels. Views of weight 0 are left out, the others are sorted by dx; those that share a dx form
// a group, which shares a row of the x table.
template <class Acc>
struct ViewsPlan : EnsembleArgs {
  struct View {
    int64_t index;  // in tokens
    int64_t dy;     // its row of the y table
    int64_t group;  // its row of the x table
    Acc weight;     // > 0, at most 1
  };
  int64_t height, width;       // output cells, H' and W'
  int64_t tokens_y, tokens_x;  // h and w
  int64_t places_y, places_x;  // of tokens, in the tables
  const int64_t* token_y;      // [distinct dy, places_y]
  const int64_t* token_x;      // [groups, places_x]
  AxisTable<Acc> y;            // [distinct dy, height]
  AxisTable<Acc> x;            // [groups, width]
  int64_t offsets_y, groups;   // distinct dy, distinct dx
  const int64_t* group_begin;  // [groups + 1], into counted_views
  const View* counted_views;   // [counted] the views of weight > 0
  int64_t counted;
  int64_t band;   // output rows of a task
  int64_t chunk;  // channels of a task, whole blocks
  double scale;   // of the weights of the views, in units of `total_weight`; 1 without a stream
};

// What cells [x, x + cells) of row y are divided by: the sum of w c_y c_x over the views, in units
// of plan.scale, or with `counts_views` the number of views that count.
template <class Acc>
SRT_INLINE void sum_weights(const ViewsPlan<Acc>& plan, int64_t y, int64_t x, int64_t cells,
                            bool counts_views, double* sum) {
  for (int64_t i = 0; i < cells; ++i) sum[i] = 0;
  for (int64_t g = 0; g < plan.groups; ++g) {
    double of_row = 0;
    for (int64_t v = plan.group_begin[g]; v < plan.group_begin[g + 1]; ++v) {
      const auto& view = plan.counted_views[v];
      const double pixels = plan.y.count[view.dy * plan.height + y];
      of_row += counts_views ? (pixels > 0 ? 1 : 0) : static_cast<double>(view.weight) * pixels;
    }
    const double* const pixels = plan.x.count + g * plan.width + x;
    for (int64_t i = 0; i < cells; ++i)
      sum[i] += of_row * (counts_views ? (pixels[i] > 0 ? 1 : 0) : pixels[i]);
  }
}

// An axis as products of small matrices: `tile` outputs that follow each other read the same few
// inputs, so that an input is loaded once for all of them. It has a weight for every output, 0
// where the output does not read it. As 0 * inf is NaN, a tile with inputs that are not finite is
// computed one output at a time, and weights of 0 are skipped.
template <class Acc>
struct TileTable {
  int64_t tile;          // outputs
  int64_t tiles;         // of a set; the last one may have fewer outputs
  const int64_t* begin;  // [sets * tiles + 1], into the inputs
  const int64_t* input;  // [inputs] their positions
  const Acc* weight;     // [inputs, tile]
};

// The steps of walks along an axis (walk.h), one walk after the other.
template <class Acc>
struct WalkTable {
  struct Tap {
    int64_t input;
    Acc value, slope;
  };
  const int64_t* begin;  // [walks * cells + 1], into taps
  const Tap* taps;
  const uint8_t* anew;  // [walks, cells] whether the sums start from 0
  const Acc* position;  // [cells] from the centre of the interval
};

// The weighted mean
//     sum_v w_v A_v T_v B_v^T / sum_v w_v c_v d_v^T
// with A_v [H', h] and B_v [W', w] the weights with which view v reads the rows and the columns of
// its tokens T_v, and c_v, d_v the pixels that count in a row and a column of cells: the mean over
// the views of A T B^T / (c d^T), each with weight w c d^T. For each group of views, which share
// B_v, the rows of all are summed for a band of output rows; then one filter along each row. Both
// are walks where cells are pixels, otherwise products with a TileTable. A task is one image, one
// band, one part of its cells and one chunk of channels.
template <class Acc>
struct MeanPlan : ViewsPlan<Acc> {
  bool walks_y, walks_x;
  TileTable<Acc> tile_y;   // output rows that read token rows; a set for each distinct dy. With a
                           // walk along y it serves the exact path alone
  WalkTable<Acc> walk_y;   // a walk for each group, over token rows; inputs in elements
  WalkTable<Acc> walk_x;   // over [groups, columns]
  TileTable<Acc> tile_x;   // cells that read [groups, columns]; one set
  int64_t part, parts;     // cells of a row, and how many parts there are
  const Span* columns_of;  // [parts] the places of tokens that each reads
  int64_t columns;         // the most of them
  int64_t pass;            // channels whose sums fit the cache, whole blocks
  bool past_cache;         // the output is written around the cache
  struct Scratch {
    ScratchArray<Acc> sums;           // [band, groups, columns, pass]
    ScratchArray<int64_t> at;         // the inputs of a tile or cell
    ScratchArray<Acc> weights;        // theirs
    ScratchArray<double> weight;      // [part]
    ScratchArray<Acc> inverse, keep;  // [band, part]
  };
  Scratch scratch;
};

// What the scratch of a PerViewPlan holds.
template <class Acc>
struct ViewValue {
  const Acc* sums;    // [taps, chunk]
  const Acc* weight;  // [taps]
  int64_t taps;
};

// Reductions that need the value of every view in a cell: the median, the moments. The weights of
// the tables are divided by the counted pixels of the cell.
template <class Acc>
struct PerViewPlan : ViewsPlan<Acc> {
  // The first cell after those that equal this one in every view: [height] and [width].
  const int32_t *end_y, *end_x;
  const int64_t* order;  // [counted] in which the values stand; null for that of the views
  struct Scratch {
    ScratchArray<Acc> sums;               // [V, places_x, chunk] the combined rows of each view
    ScratchArray<int64_t> at;             // the token rows that one view combines, in elements
    ScratchArray<int64_t> row_of;         // [V] the combined row of a view, or -1
    ScratchArray<ViewValue<Acc>> values;  // [V]
    ScratchArray<double> weights;         // [V] of the values
    ScratchArray<Acc> shares;             // [V] of their total
    ScratchArray<WindowStep<Acc>> steps;  // [V]
    ScratchArray<Acc> buffer;  // [max(V, kLargestNetwork), block] what a cell selects from
  };
  Scratch scratch;
};

// Views of one dy whose groups lie in one tile of x.
struct TileViews {
  int64_t tile, begin, end;  // into by_dy
};

// The gradient of the tokens of a mean: the filters of MeanPlan transposed, in the other order. For
// each distinct dy the gradient rows that read a token row are summed, then, for each view, the
// cells of that. A task is one image, one row of tokens and one chunk of channels. `out` is the
// gradient of the mean.
template <class Acc>
struct MeanBackwardPlan : ViewsPlan<Acc> {
  // Outputs are offsets, inputs the cells that read a token; a set for each token.
  TileTable<Acc> tile_y, tile_x;
  const typename ViewsPlan<Acc>::View* by_dy;  // sorted by dy, then by group
  const TileViews* tile_views;
  const int64_t* tile_views_begin;  // [distinct dy + 1], into tile_views: those of each dy
  const Acc* inverse;               // [H', W']: 1 / the weight of a cell, or 0
  int64_t segment, segments;        // tokens, and how many there are
  const Span* spans;                // [segments] the cells that read each, modulo the width
  int64_t longest_span;             // cells
  int64_t pass;                     // channels whose sums fit the cache, whole blocks
  void* grad_tokens;                // [V, B, h*w, C], dense
  struct Scratch {
    ScratchArray<Acc> sums;     // [tile of y, longest_span, pass]
    ScratchArray<int64_t> at;   // the inputs of a tile
    ScratchArray<Acc> weights;  // theirs
  };
  Scratch scratch;
};

// A task is an output row, counted over views and planes; scratch: Acc [width + 3 + 64].
struct ShiftPlan : ShiftArgs {
  struct View {
    ShiftTaps y, x;
    // Positions that need no padding: there source_x[m] is x.first + m.
    int64_t inner_begin, inner_end;
  };
  const View* taps;         // [V]
  const int64_t* source_y;  // [V, height + 3] source row at y.first + m, -1 for zeros
  const int64_t* source_x;  // [V, width + 3]
};

// The gradient of the image; `out` is that of the views. A task is an image row, counted over
// planes; scratch: Acc [3 * (width + 128)].
struct ShiftBackwardPlan : ShiftPlan {
  struct Read {
    int64_t row;    // of the gradient of the view
    double weight;  // not 0
  };
  const int64_t* read_begin;  // [V * height + 1], into reads: those of each image row
  const Read* reads;
  void* grad_image;  // [planes, height, width]
};

// Vectors may reach so many elements behind the last one of a line of windows.
constexpr int64_t kBehind = 64;

// A task is one window, counted over images. Arrays of the accumulator's type, and the tile of the
// image's, have the bytes of float64.
struct WindowsPlan : WindowsArgs {
  struct Axis {
    ScratchArray<int64_t> pixels;  // [2, length]
    ScratchArray<double> weights;  // [2, length]
  };
  struct Scratch {
    Axis axis[2];
    ScratchArray<double> lines;  // [6, length of x] rows that are interpolated
    ScratchArray<double> tile;   // [kTile, kTile] samples and channels
  };
  static constexpr int64_t kTile = 64;
  Scratch scratch;
  int64_t length[2];  // samples of an axis and whole vectors behind them
};

// The gradient of the image; `out` is that of the windows. A task is one image, one chunk of its
// channels and one band of its rows.
struct WindowsBackwardPlan : WindowsPlan {
  ScratchArray<double> sums;  // [chunk, band, pitch]
  int64_t chunk, chunks;      // channels of a task
  int64_t band, bands;        // rows of a task
  int64_t pitch;              // the width and whole vectors behind it
  void* grad_image;           // [B, C, H, W]
};

// The gradients of the centers and of the scale; `out` is that of the windows.
struct WindowsPointsPlan : WindowsPlan {
  double *grad_centers, *grad_scale;  // [B, N, 2]
};

}  // namespace srt::cpu
