// The inner loops of the gradient of the mean: from the gradient of the field [B, C, H', W'] to the
// gradient of the tokens [V, B, h*w, C]. These are the two filters of the mean transposed and in
// the opposite order. For each distinct dy, the gradient rows that read a token row are summed
// once, into scratch; then each token of each view sums the cells of that row that read it. Tokens
// gather, so no two threads add to one element. vector_blocks-inl.h has the rules for code in this
// file.
#pragma once
#include "vector_blocks-inl.h"

namespace srt::cpu {
namespace {

// Sums the gradient rows that read token row i, for X offsets of tile number `tile` starting at its
// offset `first`, at the cells of `span` and n channels starting at `grad`. Writes sums [X,
// longest_span, pass], padded with zeros to a whole block. X is the whole tile, or 1 with `kExact`.
// Returns whether all sums are finite and small enough for the second pass (see kMaxSumOfSquares).
template <int X, bool kExact, class T, class Acc>
bool sum_rows(const MeanBackwardPlan<Acc>& plan, int64_t i, int64_t tile, int64_t first,
              const Span& span, const T* grad, int64_t n, char* base) {
  const TileTable<Acc>& table = plan.tile_y;
  const int64_t pitch = kExact ? table.tile : X;
  int64_t* const at = in(base, plan.scratch.at);
  Acc* const weights = in(base, plan.scratch.weights);
  const int64_t row = plan.longest_span * plan.pass;
  Acc* const sums = in(base, plan.scratch.sums) + first * row;
  const int64_t slot = i * table.tiles + tile;
  Vec<Acc> squares = {};
  for (int64_t cell = span.begin; cell < span.end; ++cell) {
    const int64_t x = cell % plan.width;
    int64_t count = 0;
    for (int64_t k = table.begin[slot]; k < table.begin[slot + 1]; ++k) {
      const Acc inverse = plan.inverse[table.input[k] * plan.width + x];
      if (inverse == 0) continue;
      at[count] = table.input[k] * plan.out_strides[2];
      for (int64_t d = 0; d < pitch; ++d)
        weights[count * pitch + d] = table.weight[k * pitch + d] * inverse;
      ++count;
    }
    store_sums<X, kExact>(grad + x * plan.out_strides[3], at, weights + first, pitch, count, n,
                          sums + (cell - span.begin) * plan.pass, row, squares);
  }
  return all_below(squares, kMaxSumOfSquares<Acc>);
}

// Computes the gradient of token j for the views `own`, which share a dy, from `sums` [span, pass].
// X is a whole tile of groups; with `kExact` each view is computed separately. `to` points to the
// token in view 0, first channel.
template <int X, bool kExact, class T, class Acc>
void sum_cells(const MeanBackwardPlan<Acc>& plan, const TileViews& own, int64_t j, const Span& span,
               const Acc* sums, int64_t n, T* to, char* base) {
  const TileTable<Acc>& table = plan.tile_x;
  const int64_t pitch = kExact ? table.tile : X;
  constexpr int V = kTileVectors<X>, lanes = kLanes<Acc>;
  constexpr int64_t block = V * lanes;
  int64_t* const at = in(base, plan.scratch.at);
  const int64_t view_stride = plan.batch * plan.tokens_y * plan.tokens_x * plan.channels;
  const int64_t slot = j * table.tiles + own.tile, first = table.begin[slot];
  const int64_t count = table.begin[slot + 1] - first;
  const Acc* const weight = table.weight + first * pitch;
  for (int64_t k = 0; k < count; ++k) at[k] = table.input[first + k] - span.begin;
  for (int64_t c = 0; c < n; c += block) {
    Vec<Acc> sum[X][V];
    Acc by_group[X * block];  // in memory, because views index it at run time
    if constexpr (!kExact) {
      sum_inputs<X, false, false>(sums + c, at, plan.pass, weight, X, count, block, sum);
#pragma GCC unroll 8
      for (int i = 0; i < X; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) store(by_group + i * block + v * lanes, sum[i][v]);
      }
    }
    for (int64_t i = own.begin; i < own.end; ++i) {
      const auto& view = plan.by_dy[i];
      const int64_t group = view.group - own.tile * pitch;
      Vec<Acc> grad[V];
      if constexpr (kExact) {
        sum_inputs<1, true, false>(sums + c, at, plan.pass, weight + group, pitch, count, block,
                                   sum);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) grad[v] = view.weight * sum[0][v] + Acc{0};  // turns -0 into 0
      } else {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
          grad[v] = view.weight * load(by_group + group * block + v * lanes) + Acc{0};
      }
      store_block(to + view.index * view_stride + c, 1, n - c, grad);
    }
  }
}

// Computes tokens [j, j_end) of token row i, n channels. `to` points to token 0 of the row in view
// 0.
template <class T, class Acc>
void segment_backward(const MeanBackwardPlan<Acc>& plan, int64_t i, int64_t j, int64_t j_end,
                      const Span& span, const T* grad, int64_t n, T* to, char* base) {
  const int64_t tile_y = plan.tile_y.tile, row = plan.longest_span * plan.pass;
  for (int64_t t = 0; t < plan.tile_y.tiles; ++t) {
    const int64_t offsets = least(plan.offsets_y - t * tile_y, tile_y);
    const bool finite = with_tile(tile_y, [&](auto tile) {
      return sum_rows<tile.value, false>(plan, i, t, 0, span, grad, n, base);
    });
    for (int64_t d = 0; !finite && d < offsets; ++d)
      sum_rows<1, true>(plan, i, t, d, span, grad, n, base);
    const Acc* sums = in(base, plan.scratch.sums);
    for (int64_t d = t * tile_y; d < t * tile_y + offsets; ++d, sums += row) {
      for (int64_t r = plan.tile_views_begin[d]; r < plan.tile_views_begin[d + 1]; ++r) {
        for (int64_t token = j; token < j_end; ++token) {
          T* const own = to + token * plan.channels;
          if (finite) {
            with_tile(plan.tile_x.tile, [&](auto tile) {
              sum_cells<tile.value, false>(plan, plan.tile_views[r], token, span, sums, n, own,
                                           base);
            });
          } else {
            sum_cells<1, true>(plan, plan.tile_views[r], token, span, sums, n, own, base);
          }
        }
      }
    }
  }
}

template <class T, class Acc>
void mean_backward(const MeanBackwardPlan<Acc>& plan, int64_t begin, int64_t end, void* scratch) {
  char* const base = static_cast<char*>(scratch);
  const int64_t chunks = (plan.channels + plan.chunk - 1) / plan.chunk;
  for (int64_t task = begin; task < end; ++task) {
    // The token row varies fastest, because consecutive rows read mostly the same gradients.
    const int64_t i = task % plan.tokens_y;
    const int64_t chunk = task / plan.tokens_y % chunks * plan.chunk;
    const int64_t b = task / plan.tokens_y / chunks;
    const int64_t chunk_end = least(chunk + plan.chunk, plan.channels);
    for (int64_t c = chunk; c < chunk_end; c += plan.pass) {
      const int64_t n = least(chunk_end - c, plan.pass);
      const T* const grad = static_cast<const T*>(plan.out) + b * plan.out_strides[0] + c;
      T* const to = static_cast<T*>(plan.grad_tokens) +
                    (b * plan.tokens_y + i) * plan.tokens_x * plan.channels + c;
      for (int64_t s = 0; s < plan.segments; ++s)
        segment_backward(plan, i, s * plan.segment, least((s + 1) * plan.segment, plan.tokens_x),
                         plan.spans[s], grad, n, to, base);
    }
  }
}

}  // namespace
}  // namespace srt::cpu
