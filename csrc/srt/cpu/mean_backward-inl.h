// The gradients. Like mean-inl.h, which it extends, it is compiled once for each instruction set;
// the same rule holds: all of it has internal linkage.
#pragma once
#include "mean-inl.h"

namespace srt::cpu {
namespace {

// ---- the mean -----------------------------------------------------------------------------------

// sums [X, window, pass]: for each of X offsets, the gradient rows that read a token row, summed,
// at cells [window.begin, window.end) and n channels from `grad` on; zeros up to a whole block.
// Returns whether all of them are finite.
template <int X, class T, class Acc>
bool fold_rows(const MeanBackwardPlan<Acc>& plan, const TileTable<Acc>& table, int64_t slot,
               int64_t x_begin, int64_t x_end, const T* grad, int64_t n, char* base) {
  constexpr int V = kTileVectors<X>;
  constexpr int64_t block = V * kLanes<Acc>, whole = kBlockBytes / sizeof(Acc);
  int64_t* const at = reinterpret_cast<int64_t*>(base + plan.scratch.at);
  Acc* const weights = reinterpret_cast<Acc*>(base + plan.scratch.weights);
  Acc* const sums = reinterpret_cast<Acc*>(base + plan.scratch.sums);
  const int64_t row = plan.scratch.window * plan.pass;
  const int64_t padded = (n + whole - 1) / whole * whole;
  Vec<Acc> check = {};
  for (int64_t x = x_begin; x < x_end; ++x) {
    int64_t count = 0;
    for (int64_t k = table.begin[slot]; k < table.begin[slot + 1]; ++k) {
      const Acc inverse = plan.inverse[table.token[k] * plan.columns + x];
      if (inverse == 0) continue;
      at[count] = table.token[k] * plan.out_strides[2];
      for (int i = 0; i < X; ++i) weights[count * X + i] = table.weight[k * X + i] * inverse;
      ++count;
    }
    Acc* const to = sums + (x - x_begin) * plan.pass;
    for (int64_t c = 0; c < padded; c += block) {
      Vec<Acc> sum[X][V];
      sum_inputs<X, V>(grad + x * plan.out_strides[3] + c, at, 1, weights, count, n - c, sum);
#pragma GCC unroll 8
      for (int i = 0; i < X; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          store(to + i * row + c + v * kLanes<Acc>, sum[i][v]);
          check += sum[i][v] * Acc{0};  // Inf * 0 is NaN
        }
      }
    }
  }
  return no_nan(check);
}

// The gradient of tokens [j_begin, j_end) of a row, for the views of one run: sums over columns of
// `sums` [window, pass], which begins at cell x_begin. `to`: of view 0, token 0 of the row.
template <int X, class T, class Acc>
void fold_columns(const MeanBackwardPlan<Acc>& plan, const TileTable<Acc>& table,
                  const typename MeanBackwardPlan<Acc>::Run& run, int64_t j_begin, int64_t j_end,
                  int64_t x_begin, const Acc* sums, int64_t n, T* to, char* base) {
  constexpr int V = kTileVectors<X>, lanes = kLanes<Acc>;
  constexpr int64_t block = V * lanes;
  int64_t* const at = reinterpret_cast<int64_t*>(base + plan.scratch.at);
  const int64_t view_stride = plan.batch * plan.tokens_y * plan.tokens_x * plan.channels;
  for (int64_t j = j_begin; j < j_end; ++j) {
    const int64_t slot = j * table.tiles + run.tile, first = table.begin[slot];
    const int64_t count = table.begin[slot + 1] - first;
    for (int64_t k = 0; k < count; ++k) at[k] = table.token[first + k] - x_begin;
    for (int64_t c = 0; c < n; c += block) {
      Vec<Acc> sum[X][V];
      sum_inputs<X, V>(sums + c, at, plan.pass, table.weight + first * X, count, block, sum);
      Acc by_group[X * block];  // in memory: which of them a view takes is not known here
#pragma GCC unroll 8
      for (int i = 0; i < X; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) store(by_group + i * block + v * lanes, sum[i][v]);
      }
      for (int64_t i = run.begin; i < run.end; ++i) {
        const auto& view = plan.by_dy[i];
        const Acc* const own = by_group + (view.group - run.tile * X) * block;
        Vec<Acc> grad[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) grad[v] = view.weight * load(own + v * lanes);
        store_block(to + view.index * view_stride + j * plan.channels + c, 1, n - c, grad);
      }
    }
  }
}

template <class T, class Acc>
void mean_backward(const MeanBackwardPlan<Acc>& plan, int64_t begin, int64_t end, void* scratch) {
  char* const base = static_cast<char*>(scratch);
  const Acc* const sums = reinterpret_cast<Acc*>(base + plan.scratch.sums);
  const int64_t row = plan.scratch.window * plan.pass;
  const int64_t chunks = (plan.channels + plan.chunk - 1) / plan.chunk;
  for (int64_t task = begin; task < end; ++task) {
    // Token rows that follow each other read the same gradients.
    const int64_t i = task % plan.tokens_y;
    const int64_t chunk = task / plan.tokens_y % chunks * plan.chunk;
    const int64_t b = task / plan.tokens_y / chunks;
    const int64_t chunk_end =
        chunk + plan.chunk < plan.channels ? chunk + plan.chunk : plan.channels;
    for (int64_t c = chunk; c < chunk_end; c += plan.pass) {
      const int64_t n = chunk_end - c < plan.pass ? chunk_end - c : plan.pass;
      const T* const grad = static_cast<const T*>(plan.out) + b * plan.out_strides[0] + c;
      T* const to = static_cast<T*>(plan.grad_tokens) +
                    (b * plan.tokens_y + i) * plan.tokens_x * plan.channels + c;
      for (int64_t s = 0; s < plan.segments; ++s) {
        const int64_t x_begin = plan.windows[s].begin, x_end = plan.windows[s].end;
        const int64_t j = s * plan.segment;
        const int64_t j_end = j + plan.segment < plan.tokens_x ? j + plan.segment : plan.tokens_x;
        for (int64_t t = 0; t < plan.tile_y.tiles; ++t) {
          const int64_t d = t * plan.tile_y.tile;
          const int64_t d_end =
              d + plan.tile_y.tile < plan.offsets_y ? d + plan.tile_y.tile : plan.offsets_y;
          const bool finite = with_tile(plan.tile_y.tile, [&](auto tile) {
            return fold_rows<tile.value>(plan, plan.tile_y, i * plan.tile_y.tiles + t, x_begin,
                                         x_end, grad, n, base);
          });
          for (int64_t k = d; k < d_end; ++k) {
            if (finite) {
              for (int64_t r = plan.runs_of[k]; r < plan.runs_of[k + 1]; ++r)
                with_tile(plan.tile_x.tile, [&](auto tile) {
                  fold_columns<tile.value>(plan, plan.tile_x, plan.runs[r], j, j_end, x_begin,
                                           sums + (k - d) * row, n, to, base);
                });
              continue;
            }
            fold_rows<1>(plan, plan.exact_y, i * plan.exact_y.tiles + k, x_begin, x_end, grad, n,
                         base);
            for (int64_t r = plan.exact_runs_of[k]; r < plan.exact_runs_of[k + 1]; ++r)
              fold_columns<1>(plan, plan.exact_x, plan.exact_runs[r], j, j_end, x_begin, sums, n,
                              to, base);
          }
        }
      }
    }
  }
}

// ---- shift --------------------------------------------------------------------------------------

template <class T>
void shift_backward(const ShiftBackwardPlan& plan, int64_t begin, int64_t end, void* scratch) {
  using Acc = typename AccumulatorOf<T>::type;
  constexpr int lanes = kLanes<Acc>;
  constexpr int64_t pad = lanes < 4 ? 4 : lanes;  // four taps reach three pixels beyond
  const int64_t width = plan.width, line = width + 128;
  // A gradient row between zeros, what its positions get, and the sum over views.
  Acc* const row = static_cast<Acc*>(scratch) + 64;
  Acc* const at_position = row - 64 + line;
  Acc* const sum = at_position + line;

  for (int64_t task = begin; task < end; ++task) {
    const int64_t y = task % plan.height, plane = task / plan.height;
    for (int64_t x = 0; x < width; x += lanes) store(sum + x, Vec<Acc>{});
    for (int64_t v = 0; v < plan.view_count; ++v) {
      const ShiftPlan::View& view = plan.views[v];
      const int64_t first = plan.read_begin[v * plan.height + y];
      const int64_t last = plan.read_begin[v * plan.height + y + 1];
      if (first == last) continue;
      const T* const grad =
          static_cast<const T*>(plan.out) + (v * plan.planes + plane) * plan.height * width;
      for (int64_t x = -pad; x < width + pad; x += lanes) store(row + x, Vec<Acc>{});
      for (int64_t k = first; k < last; ++k) {
        const T* const from = grad + plan.reads[k].row * width;
        const Acc weight = static_cast<Acc>(plan.reads[k].weight);
        int64_t x = 0;
        for (; x + lanes <= width; x += lanes)
          store(row + x, load(row + x) + weight * load(from + x));
        if (x < width) store(row + x, load(row + x) + weight * load_part(from + x, 1, width - x));
      }
      // Output pixel x reads positions x + k: position m goes to pixels m - k.
      const int64_t positions = width + view.x.taps - 1;
      for (int64_t m = 0; m < positions; m += lanes) {
        Vec<Acc> value = {};
        for (int k = 0; k < view.x.taps; ++k)
          value += static_cast<Acc>(view.x.weight[k]) * load(row + m - k);
        store(at_position + m, value);
      }
      const int64_t* const source_x = plan.source_x + v * (width + 3);
      int64_t m = 0;
      for (; m < view.inner_begin; ++m)
        if (source_x[m] >= 0) sum[source_x[m]] += at_position[m];
      for (; m + lanes <= view.inner_end; m += lanes) {
        Acc* const inner = sum + (view.x.first + m);
        store(inner, load(inner) + load(at_position + m));
      }
      for (; m < positions; ++m)
        if (source_x[m] >= 0) sum[source_x[m]] += at_position[m];
    }
    T* const out = static_cast<T*>(plan.grad_image) + task * width;
    for (int64_t x = 0; x < width; x += lanes)
      store_part(out + x, 1, width - x < lanes ? width - x : lanes, load(sum + x));
  }
}

}  // namespace
}  // namespace srt::cpu
