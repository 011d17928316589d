// The inner loops of the mean (vector_blocks-inl.h has the rules for this file).
#pragma once
#include "vector_blocks-inl.h"

namespace srt::cpu {
namespace {

// The rows of every group, summed for X output rows of tile number `tile`, from its row `first` on,
// and n channels: sums [X, groups, tokens_x, pass], with zeros up to a whole block. X is a whole
// tile, or 1 with `kExact`. Returns whether all of them are finite.
template <int X, bool kExact, class T, class Acc>
bool combine_rows(const MeanPlan<Acc>& plan, int64_t tile, int64_t first, const T* tokens,
                  int64_t n, char* base) {
  const TileTable<Acc>& table = plan.tile_y;
  const int64_t pitch = kExact ? table.tile : X;
  int64_t* const at = in(base, plan.scratch.at);
  Acc* const weights = in(base, plan.scratch.weights);
  const int64_t row = plan.groups * plan.tokens_x * plan.pass;
  Acc* const sums = in(base, plan.scratch.sums) + first * row;
  const int64_t stride_n = plan.token_strides[2];
  Vec<Acc> check = {};
  for (int64_t g = 0; g < plan.groups; ++g) {
    int64_t count = 0;
    for (int64_t i = plan.group_begin[g]; i < plan.group_begin[g + 1]; ++i) {
      const auto& view = plan.counted_views[i];
      const int64_t slot = view.dy * table.tiles + tile;
      for (int64_t k = table.begin[slot]; k < table.begin[slot + 1]; ++k, ++count) {
        at[count] = view.index * plan.token_strides[0] + table.input[k] * plan.tokens_x * stride_n;
        for (int64_t x = 0; x < pitch; ++x)
          weights[count * pitch + x] = view.weight * table.weight[k * pitch + x];
      }
    }
    for (int64_t j = 0; j < plan.tokens_x; ++j) {
      store_sums<X, kExact>(tokens + j * stride_n, at, weights + first, pitch, count, n,
                            sums + (g * plan.tokens_x + j) * plan.pass, row, check);
    }
  }
  return no_nan(check);
}

// A cell from its sums: out = inverse * sum, and where there is a `keep`, keep * out is added.
// Whole vectors of channels.
template <int V, class Out, class Acc>
SRT_INLINE void write_cell(Vec<Acc> (&sum)[V], Acc inverse, Acc keep, Out* out) {
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    sum[v] = inverse != 0 ? sum[v] * inverse : Vec<Acc>{};
    if (keep != 0) sum[v] += keep * load(out + v * kLanes<Acc>);
    store(out + v * kLanes<Acc>, sum[v]);
  }
}

// The same of n channels of any stride. Not inlined: it would be compiled for each cell of a tile.
template <int V, class Out, class Acc>
__attribute__((noinline)) void write_part(const Acc* sums, Acc inverse, Acc keep, Out* out,
                                          int64_t stride_c, int64_t n) {
  Vec<Acc> sum[V], before[V];
  for (int v = 0; v < V; ++v) {
    sum[v] = inverse != 0 ? load(sums + v * kLanes<Acc>) * inverse : Vec<Acc>{};
    before[v] = Vec<Acc>{};
  }
  if (keep != 0) {
    load_block(out, stride_c, n, before);
    for (int v = 0; v < V; ++v) sum[v] += keep * before[v];
  }
  store_block(out, stride_c, n, sum);
}

// The rows of a band from their sums, X cells at a time: a whole tile, or 1 with `kExact`.
template <int X, bool kExact, class Out, class Acc>
void filter_rows(const MeanPlan<Acc>& plan, int64_t rows, int64_t n, Out* out, char* base) {
  const TileTable<Acc>& table = plan.tile_x;
  const int64_t pitch = kExact ? table.tile : X;
  constexpr int V = kTileVectors<X>;
  constexpr int64_t block = V * kLanes<Acc>;
  const Acc* const inverses = in(base, plan.scratch.inverse);
  const Acc* const keeps = in(base, plan.scratch.keep);
  const int64_t stride_c = plan.out_strides[1], stride_x = plan.out_strides[3];
  const Acc* from = in(base, plan.scratch.sums);
  for (int64_t r = 0; r < rows; ++r, from += plan.groups * plan.tokens_x * plan.pass) {
    for (int64_t x = 0; x < plan.width; x += X) {
      const int64_t first = table.begin[x / pitch], count = table.begin[x / pitch + 1] - first;
      const Acc* const weight = table.weight + first * pitch + x % pitch;
      const Acc* const inverse = inverses + r * plan.width + x;
      const Acc* const keep = keeps + r * plan.width + x;
      const int64_t cells = least(plan.width - x, X);
      for (int64_t c = 0; c < n; c += block) {
        Vec<Acc> sum[X][V];
        sum_inputs<X, kExact>(from + c, table.input + first, plan.pass, weight, pitch, count, block,
                              sum);
        Out* const to = out + r * plan.out_strides[2] + x * stride_x + c * stride_c;
        const auto keep_of = [&](int64_t i) { return plan.total_weight ? keep[i] : Acc{0}; };
        if (stride_c == 1 && n - c >= block) {
#pragma GCC unroll 8
          for (int i = 0; i < X; ++i)
            if (i < cells) write_cell(sum[i], inverse[i], keep_of(i), to + i * stride_x);
        } else {
          Acc sums[X * block];
#pragma GCC unroll 8
          for (int i = 0; i < X; ++i) {
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) store(sums + i * block + v * kLanes<Acc>, sum[i][v]);
          }
          for (int64_t i = 0; i < cells; ++i)
            write_part<V>(sums + i * block, inverse[i], keep_of(i), to + i * stride_x, stride_c,
                          n - c);
        }
      }
    }
  }
}

// For output row y, row r of its band: what the sums of a cell are multiplied by, and what is there
// already in a stream.
template <class Acc>
void fill_inverse(const MeanPlan<Acc>& plan, int64_t y, int64_t r, char* base) {
  double* const count = in(base, plan.scratch.count);
  Acc* const inverse = in(base, plan.scratch.inverse) + r * plan.width;
  Acc* const keep = in(base, plan.scratch.keep) + r * plan.width;
  for (int64_t x = 0; x < plan.width; ++x) count[x] = 0;
  for (int64_t g = 0; g < plan.groups; ++g) {
    double count_y = 0;
    for (int64_t i = plan.group_begin[g]; i < plan.group_begin[g + 1]; ++i)
      count_y += static_cast<double>(plan.counted_views[i].weight) *
                 plan.y.count[plan.counted_views[i].dy * plan.height + y];
    if (!(count_y > 0)) continue;
    const double* const count_x = plan.x.count + g * plan.width;
    for (int64_t x = 0; x < plan.width; ++x) count[x] += count_y * count_x[x];
  }
  for (int64_t x = 0; x < plan.width; ++x) {
    const double before = plan.total_weight ? plan.total_weight[y * plan.width + x] : 0;
    const double total = before + plan.scale * count[x];
    inverse[x] = total > 0 ? static_cast<Acc>(plan.scale / total) : 0;
    if (plan.total_weight) keep[x] = total > 0 ? static_cast<Acc>(before / total) : 0;
  }
}

template <class T, class Out, class Acc>
void mean(const MeanPlan<Acc>& plan, int64_t begin, int64_t end, void* scratch) {
  char* const base = static_cast<char*>(scratch);
  const int64_t chunks = (plan.channels + plan.chunk - 1) / plan.chunk;
  const int64_t bands = plan.tile_y.tiles;

  for (int64_t task = begin; task < end; ++task) {
    const int64_t band = task / chunks % bands;
    const int64_t b = task / chunks / bands;
    const int64_t y = band * plan.band;
    const int64_t rows = least(plan.height - y, plan.band);
    for (int64_t r = 0; r < rows; ++r) fill_inverse(plan, y + r, r, base);

    const int64_t chunk = task % chunks * plan.chunk;
    const int64_t chunk_end = least(chunk + plan.chunk, plan.channels);
    for (int64_t c = chunk; c < chunk_end; c += plan.pass) {
      const int64_t n = least(chunk_end - c, plan.pass);
      const T* const tokens = static_cast<const T*>(plan.tokens) + b * plan.token_strides[1] + c;
      Out* const out = static_cast<Out*>(plan.out) + b * plan.out_strides[0] +
                       c * plan.out_strides[1] + y * plan.out_strides[2];
      const bool finite = with_tile(plan.tile_y.tile, [&](auto tile) {
        return combine_rows<tile.value, false>(plan, band, 0, tokens, n, base);
      });
      if (finite) {
        with_tile(plan.tile_x.tile,
                  [&](auto tile) { filter_rows<tile.value, false>(plan, rows, n, out, base); });
        continue;
      }
      for (int64_t r = 0; r < rows; ++r) combine_rows<1, true>(plan, band, r, tokens, n, base);
      filter_rows<1, true>(plan, rows, n, out, base);
    }
  }
}

}  // namespace
}  // namespace srt::cpu
