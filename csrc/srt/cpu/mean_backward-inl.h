// The gradients. Like mean-inl.h, which it extends, it is compiled once for each instruction set;
// the same rule holds: all of it has internal linkage.
#pragma once
#include "mean-inl.h"
#include "per_view-inl.h"

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

// ---- the median and the moments -----------------------------------------------------------------

// Turns the values of the views in a cell into their gradients. `grad` and `grad_variance` are
// those of the cell; `copy` is room for as many values as there are.

// The first view that is the median gets all of it.
template <class Acc>
struct MedianBackward {
  static constexpr bool kReadsVariance = false;
  static void turn(const CellValues<Acc>& values, const Vec<Acc> (&grad)[kValueVectors],
                   const Vec<Acc> (&)[kValueVectors], Acc* copy) {
    constexpr int lanes = kLanes<Acc>;
    constexpr int64_t block = kValueVectors * lanes;
    using Key = typename KeyOf<Acc>::type;
    for (int v = 0; v < kValueVectors; ++v) {
      Acc* const value = values.value + v * lanes;
      for (int64_t i = 0; i < values.count; ++i)
        store(copy + i * block + v * lanes, load(value + i * block));
      const Vec<Acc> median = median_of(copy + v * lanes, values.count, values.finite);
      Key open = Key{} == Key{};
      for (int64_t i = 0; i < values.count; ++i) {
        const Vec<Acc> x = load(value + i * block);
        const Key hit = ((x == median) | ((x != x) & (median != median))) & open;
        store(value + i * block, hit ? grad[v] : Vec<Acc>{});
        open &= ~hit;
      }
    }
  }
};

template <class Acc>
struct MomentsBackward {
  static constexpr bool kReadsVariance = true;
  static void turn(const CellValues<Acc>& values, const Vec<Acc> (&grad)[kValueVectors],
                   const Vec<Acc> (&grad_variance)[kValueVectors], Acc*) {
    constexpr int lanes = kLanes<Acc>;
    constexpr int64_t block = kValueVectors * lanes;
    Vec<Acc> mean[kValueVectors], variance[kValueVectors];
    moments_of(values, mean, variance);
    for (int64_t i = 0; i < values.count; ++i) {
      for (int v = 0; v < kValueVectors; ++v) {
        Acc* const value = values.value + i * block + v * lanes;
        const Vec<Acc> from_mean = load(value) - mean[v];
        store(value, values.share[i] * (grad[v] + Acc{2} * grad_variance[v] * from_mean));
      }
    }
  }
};

// Adds `weight` times n channels, in whole vectors.
template <class Acc>
SRT_INLINE void add_scaled(Acc* to, Acc weight, const Acc* from, int64_t n) {
  for (int64_t c = 0; c < n; c += kLanes<Acc>)
    store(to + c, load(to + c) + weight * load(from + c));
}

template <class T, class Backward, class Acc>
void values_backward(const ValueBackwardPlan<Acc>& plan, int64_t begin, int64_t end, void* base) {
  constexpr int64_t block = kValueVectors * kLanes<Acc>;
  const ValueScratch<Acc> scratch(plan, static_cast<char*>(base));
  Acc* const folds = reinterpret_cast<Acc*>(static_cast<char*>(base) + plan.folds);
  Acc* const grads = reinterpret_cast<Acc*>(static_cast<char*>(base) + plan.grads);
  Acc* const copy = reinterpret_cast<Acc*>(static_cast<char*>(base) + plan.copy);
  const int64_t chunks = (plan.channels + plan.chunk - 1) / plan.chunk;
  const int64_t bands = (plan.tokens_y + plan.token_band - 1) / plan.token_band;
  const int64_t row_size = plan.tokens_x * plan.chunk;

  for (int64_t task = begin; task < end; ++task) {
    const int64_t c = task % chunks * plan.chunk;
    const int64_t band = task / chunks % bands;
    const int64_t b = task / chunks / bands;
    const int64_t n = plan.channels - c < plan.chunk ? plan.channels - c : plan.chunk;
    const T* const tokens = static_cast<const T*>(plan.tokens) + b * plan.token_strides[1] + c;
    const int64_t i_begin = band * plan.token_band;
    const int64_t i_end =
        i_begin + plan.token_band < plan.tokens_y ? i_begin + plan.token_band : plan.tokens_y;
    const int64_t grads_size = plan.view_count * plan.token_band * row_size;
    for (int64_t k = 0; k < grads_size; k += kLanes<Acc>) store(grads + k, Vec<Acc>{});

    CellRun run{};
    for (run.y = plan.windows[band].begin; run.y < plan.windows[band].end; run.y = run.y_end) {
      run.y_end = plan.end_y[run.y];
      const int64_t rows = combine_views(plan, run.y, tokens, n, scratch);
      for (int64_t k = 0; k < rows * row_size; k += kLanes<Acc>) store(folds + k, Vec<Acc>{});
      for (run.x = 0; run.x < plan.columns; run.x = run.x_end) {
        run.x_end = plan.end_x[run.x];
        CellValues<Acc> cell = views_of_cell(plan, run.y, run.x, scratch);
        if (cell.count == 0) continue;
        for (int64_t from = 0; from < n; from += block) {
          run.n = n - from < block ? n - from : block;
          run.at = b * plan.out_strides[0] + c + from;
          cell.finite = gather(scratch.values, cell.count, plan.chunk, from, scratch.buffer);
          Vec<Acc> grad[kValueVectors] = {}, grad_variance[kValueVectors] = {};
          for_cells(plan, run, [&](int64_t at, int64_t) {
            Vec<Acc> own[kValueVectors] = {};
            load_block(static_cast<const T*>(plan.out) + at, 1, run.n, own);
            for (int v = 0; v < kValueVectors; ++v) grad[v] += own[v];
            if constexpr (Backward::kReadsVariance) {
              load_block(static_cast<const T*>(plan.variance) + at, 1, run.n, own);
              for (int v = 0; v < kValueVectors; ++v) grad_variance[v] += own[v];
            }
          });
          Backward::turn(cell, grad, grad_variance, copy);
          for (int64_t i = 0; i < cell.count; ++i) {
            const ViewValue<Acc>& value = scratch.values[i];
            Acc* const fold = folds + (value.sums - scratch.sums) + from;
            for (int64_t k = 0; k < value.taps; ++k) {
              if (value.weight[k] == 0) continue;
              add_scaled(fold + k * plan.chunk, value.weight[k], scratch.buffer + i * block, block);
            }
          }
        }
      }
      for (int64_t v = 0; v < plan.view_count; ++v) {
        if (scratch.row_of[v] < 0) continue;
        const int64_t slot = plan.views[v].dy * plan.rows + run.y;
        for (int64_t k = 0; k < plan.y.taps[slot]; ++k) {
          const Acc weight = plan.y.weight[slot * plan.y.max_taps + k];
          const int64_t i = plan.y.first[slot] + k;
          if (weight == 0 || i < i_begin || i >= i_end) continue;
          add_scaled(grads + (v * plan.token_band + i - i_begin) * row_size, weight,
                     folds + scratch.row_of[v] * row_size, row_size);
        }
      }
    }

    for (int64_t v = 0; v < plan.view_count; ++v) {
      const Acc* from = grads + v * plan.token_band * row_size;
      T* to = static_cast<T*>(plan.grad_tokens) +
              ((plan.views[v].index * plan.batch + b) * plan.tokens_y + i_begin) * plan.tokens_x *
                  plan.channels +
              c;
      for (int64_t j = 0; j < (i_end - i_begin) * plan.tokens_x; ++j) {
        for (int64_t k = 0; k < n; k += block) {
          Vec<Acc> grad[kValueVectors] = {};
          load_block(from + k, 1, block, grad);
          store_block(to + k, 1, n - k, grad);
        }
        from += plan.chunk;
        to += plan.channels;
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
