// The plans: one plain struct per kernel with everything that it needs for one call (arguments,
// tables, tile sizes, layout of the scratch). NAME.cpp fills a plan; NAME-inl.h, which is compiled
// for each instruction set, reads it.
#pragma once
#include <cstdint>

#include "../axis.h"
#include "../ensemble.h"
#include "../running_median.h"
#include "../shift.h"
#include "../types.h"
#include "../windows.h"

namespace srt::cpu {

// An array in the scratch memory of a worker.
template <class T>
struct ScratchArray {
  int64_t offset;  // bytes
};

// Cells or tokens [begin, end) of an axis.
struct Span {
  int64_t begin, end;
};

// The part that all kernels of ensemble share. A task is one image, one band of output rows and one
// chunk of channels. Views of weight 0 are dropped, and the others (the counted views) are sorted
// by dx. Views with the same dx form a group, which shares a row of the x table.
template <class Acc>
struct ViewsPlan : EnsembleArgs {
  struct View {
    int64_t index;  // of the view in `tokens`
    int64_t dy;     // row of the y table
    int64_t group;  // row of the x table
    Acc weight;     // > 0, at most 1
  };
  int64_t height, width;       // output cells, H' and W'
  int64_t tokens_y, tokens_x;  // h and w
  int64_t places_y, places_x;  // places of tokens in the tables (axis.h)
  const int64_t* token_y;      // [distinct dy, places_y]; the token at each place
  const int64_t* token_x;      // [groups, places_x]; the same
  AxisTable<Acc> y;            // [distinct dy, height]
  AxisTable<Acc> x;            // [groups, width]
  int64_t offsets_y, groups;   // distinct dy, distinct dx
  const int64_t* group_begin;  // [groups + 1], into counted_views
  const View* counted_views;   // [counted]; the views of weight > 0
  int64_t counted;
  int64_t band;   // output rows of a task
  int64_t chunk;  // channels of a task, whole blocks
  double scale;   // View::weight * scale is in units of `total_weight`; 1 without a stream
};

// The total weight of cells [x, x + cells) of row y, by which their sums are divided: sum[i] is the
// sum of w c_y c_x over the views, in units of plan.scale, or with `counts_views` the number of
// views that count.
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

// The filter of an axis as products of small dense matrices. `tile` consecutive outputs read the
// same few inputs, so each input is loaded once for all of them. Every input has a weight for every
// output of the tile, 0 if the output does not read it. Because 0 * Inf is NaN, a tile with
// non-finite inputs is computed one output at a time, and weights of 0 are skipped.
template <class Acc>
struct TileTable {
  int64_t tile;          // outputs of a tile
  int64_t tiles;         // tiles of a set; the last one may have fewer outputs
  const int64_t* begin;  // [sets * tiles + 1], into the inputs
  const int64_t* input;  // [inputs]; positions
  const Acc* weight;     // [inputs, tile]
};

// The steps of several walks along an axis (walk.h), one walk after the other.
template <class Acc>
struct WalkTable {
  struct Tap {
    int64_t input;
    Acc value, slope;
  };
  const int64_t* begin;  // [walks * cells + 1], into taps
  const Tap* taps;
  const uint8_t* restart;  // [walks, cells]; whether the sums restart from 0
  const Acc* position;     // [cells]; distance from the centre of the interval
};

// The weighted mean
//     sum_v w_v A_v T_v B_v^T / sum_v w_v c_v d_v^T
// where A_v [H', h] and B_v [W', w] are the weights with which view v reads the rows and columns of
// its tokens T_v [h, w], and c_v [H'] and d_v [W'] are the numbers of pixels that count in each row
// and column of cells. This is the mean over the views of A T B^T / (c d^T) with weights w c d^T.
// The views of a group share B_v, so their rows are summed first, for a band of output rows; then
// each row is filtered once, over all groups. At stride 1 both passes are walks, otherwise products
// with a TileTable. A task is one image, one band, one part of its cells and one chunk of channels.
template <class Acc>
struct MeanPlan : ViewsPlan<Acc> {
  bool walks_y, walks_x;
  TileTable<Acc> tile_y;   // outputs: rows, inputs: token rows; a set for each distinct dy. With a
                           // walk along y, only the exact path uses it
  WalkTable<Acc> walk_y;   // a walk for each group; inputs: token rows, as offsets in elements
  WalkTable<Acc> walk_x;   // one walk; inputs: [groups, columns]
  TileTable<Acc> tile_x;   // outputs: cells, inputs: [groups, columns]; one set
  int64_t part, parts;     // cells of a part of a row, and the number of parts
  const Span* columns_of;  // [parts]; the places of tokens that each part reads
  int64_t columns;         // the longest of these spans
  int64_t pass;            // channels whose sums fit the cache, whole blocks
  bool past_cache;         // the output is written with non-temporal stores
  struct Scratch {
    ScratchArray<Acc> sums;           // [band, groups, columns, pass]
    ScratchArray<int64_t> at;         // positions of the inputs of a tile or cell
    ScratchArray<Acc> weights;        // weights of these inputs
    ScratchArray<double> weight;      // [part]; total weights of the cells of a row
    ScratchArray<Acc> inverse, keep;  // [band, part]
  };
  Scratch scratch;
};

// One view in one cell: its value is the sum over k of weight[k] * sums[k].
template <class Acc>
struct ViewValue {
  const Acc* sums;    // [taps, chunk]
  const Acc* weight;  // [taps]
  int64_t taps;
};

// Reductions that need the value of every view in a cell: the median and the moments. The weights
// of the tables are already divided by the counted pixels of the cell.
template <class Acc>
struct PerViewPlan : ViewsPlan<Acc> {
  // For each row and column of cells, the first later one that differs in some view: [height] and
  // [width].
  const int32_t *end_y, *end_x;
  const int64_t* order;  // [counted]; the order in which views are added, null for their own
  struct Scratch {
    ScratchArray<Acc> sums;               // [V, places_x, chunk]; summed token rows of each view
    ScratchArray<int64_t> at;             // token rows that one view reads, in elements
    ScratchArray<int64_t> row_of;         // [V]; index of a view in `sums`, or -1
    ScratchArray<ViewValue<Acc>> values;  // [V]
    ScratchArray<double> weights;         // [V]; of the values
    ScratchArray<Acc> shares;             // [V]; weights as fractions of their total
    ScratchArray<WindowStep<Acc>> steps;  // [V]
    ScratchArray<Acc> buffer;             // [max(V, kLargestNetwork), block]; values of a cell
  };
  Scratch scratch;
};

// Views that share a dy and whose groups are in the same tile of x.
struct TileViews {
  int64_t tile, begin, end;  // [begin, end) of by_dy
};

// The gradient of the mean with respect to the tokens: the filters of MeanPlan, transposed. For
// each distinct dy, the gradient rows that read a token row are summed; then the cells of this sum
// that read a token are summed for each view. A task is one image, one row of tokens and one chunk
// of channels. `out` is the gradient of the mean [B, C, H', W'].
template <class Acc>
struct MeanBackwardPlan : ViewsPlan<Acc> {
  // Outputs: offsets, inputs: the cells that read a token; a set for each token.
  TileTable<Acc> tile_y, tile_x;
  const typename ViewsPlan<Acc>::View* by_dy;  // sorted by dy, then by group
  const TileViews* tile_views;
  const int64_t* tile_views_begin;  // [distinct dy + 1], into tile_views
  const Acc* inverse;               // [H', W']: 1 / the weight of a cell, or 0
  int64_t segment, segments;        // tokens of a segment of a row, and the number of segments
  const Span* spans;                // [segments]; the cells that read each, modulo the width
  int64_t longest_span;             // in cells
  int64_t pass;                     // channels whose sums fit the cache, whole blocks
  void* grad_tokens;                // [V, B, h*w, C], dense
  struct Scratch {
    ScratchArray<Acc> sums;     // [tile of y, longest_span, pass]
    ScratchArray<int64_t> at;   // positions of the inputs of a tile
    ScratchArray<Acc> weights;  // weights of these inputs
  };
  Scratch scratch;
};

// Shift. A task is one output row of one plane of one view; scratch: Acc [width + 3 + 64].
struct ShiftPlan : ShiftArgs {
  struct View {
    ShiftTaps y, x;
    // Positions [inner_begin, inner_end) need no padding: there source_x[m] is x.first + m.
    int64_t inner_begin, inner_end;
  };
  const View* taps;         // [V]
  const int64_t* source_y;  // [V, height + 3]; source row at position y.first + m, -1 for zeros
  const int64_t* source_x;  // [V, width + 3]; the same for columns
};

// The gradient of shift with respect to the image. `out` is the gradient of the views
// [V, planes, height, width]. A task is one image row of one plane; scratch: Acc
// [3 * (width + 128)].
struct ShiftBackwardPlan : ShiftPlan {
  struct Read {
    int64_t row;    // of the gradient of a view
    double weight;  // not 0
  };
  const int64_t* read_begin;  // [V * height + 1], into reads; by view and image row
  const Read* reads;
  void* grad_image;  // [planes, height, width]
};

// The padding of scratch lines of windows, in elements, so that whole vectors can be accessed.
constexpr int64_t kBehind = 64;

// Windows. A task is one window of one image. Scratch of the accumulator type, and the tile of the
// image type, is allocated as if the type were float64.
struct WindowsPlan : WindowsArgs {
  struct Axis {
    ScratchArray<int64_t> pixels;  // [2, length]
    ScratchArray<double> weights;  // [2, length]
  };
  struct Scratch {
    Axis axis[2];
    ScratchArray<double> lines;  // [6, length[1]]; rows interpolated along x
    ScratchArray<double> tile;   // [kTile, kTile]; samples and channels
  };
  static constexpr int64_t kTile = 64;
  Scratch scratch;
  int64_t length[2];  // samples of an axis, padded to whole vectors
};

// The gradient of windows with respect to the image. `out` is the gradient of the windows. A task
// is one image, one chunk of its channels and one band of its rows.
struct WindowsBackwardPlan : WindowsPlan {
  ScratchArray<double> sums;  // [chunk, band, pitch]
  int64_t chunk, chunks;      // channels of a task
  int64_t band, bands;        // rows of a task
  int64_t pitch;              // the width, padded to whole vectors
  void* grad_image;           // [B, C, H, W]
};

// The gradients of windows with respect to centers and scale. `out` is the gradient of the windows.
// A task is one window of one image.
struct WindowsPointsPlan : WindowsPlan {
  double *grad_centers, *grad_scale;  // [B, N, 2]
};

}  // namespace srt::cpu
