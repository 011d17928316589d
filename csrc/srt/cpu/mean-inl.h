// The inner loops. instruction_set.cpp compiles this header once for each instruction set, with
// other flags. Everything here, and everything it calls, has internal linkage: a template or inline
// function with one name in all the objects would be merged by the linker, and the copy it kept
// could hold instructions that the processor lacks. So no std:: templates and no functions of other
// headers.
#pragma once
#include "dispatch.h"
#include "simd.h"

namespace srt::cpu {
namespace {

// Four vectors of channels at a time: independent sums enough to hide the latency of an add, with
// registers left on every instruction set.
constexpr int kVectors = 4;
constexpr int64_t kBlockBytes = kVectors * kVectorBytes;

// Loops over vectors that stay in registers are unrolled, and what they are passed to is inlined:
// an index that is not constant would put the array into memory.
template <int N, class T, class V>
SRT_INLINE void store_block(T* to, int64_t stride, int64_t n, const V (&value)[N]) {
  constexpr int lanes = kLanes<typename AccumulatorOf<T>::type>;
  if (n >= N * lanes && stride == 1) {
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) store(to + v * lanes, value[v]);
    return;
  }
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v) {
    if (v * lanes >= n) break;
    const int64_t rest = n - v * lanes;
    store_part(to + v * lanes * stride, stride, rest < lanes ? rest : lanes, value[v]);
  }
}

template <int N, class T, class V>
SRT_INLINE void load_block(const T* from, int64_t stride, int64_t n, V (&value)[N]) {
  constexpr int lanes = kLanes<typename AccumulatorOf<T>::type>;
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v) {
    if (v * lanes >= n) break;
    const int64_t rest = n - v * lanes;
    value[v] = load_part(from + v * lanes * stride, stride, rest < lanes ? rest : lanes);
  }
}

// The sums of a tile of X cells that stay in registers, by V vectors of channels.
#if defined(__AVX512F__)
constexpr int kMaxTile = 8, kTileSums = 16;
#else
constexpr int kMaxTile = 4, kTileSums = 8;
#endif
template <int X>
constexpr int kTileVectors = kTileSums / X < kVectors ? kTileSums / X : kVectors;

// sum[i] = the sum over k < count of weight[k][i] * the n channels from at[k] * scale on; 0 in
// lanes past n.
template <int X, int V, class T, class Acc>
SRT_INLINE void sum_inputs(const T* from, const int64_t* at, int64_t scale, const Acc* weight,
                           int64_t count, int64_t n, Vec<Acc> (&sum)[X][V]) {
  constexpr int lanes = kLanes<Acc>;
#pragma GCC unroll 8
  for (int i = 0; i < X; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[i][v] = Vec<Acc>{};
  }
  for (int64_t k = 0; k < count; ++k) {
    const T* const p = from + at[k] * scale;
    Vec<Acc> in[V];
    if (n >= V * lanes) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) in[v] = load(p + v * lanes);
    } else {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) in[v] = Vec<Acc>{};
      load_block(p, 1, n, in);
    }
#pragma GCC unroll 8
    for (int i = 0; i < X; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[i][v] += weight[k * X + i] * in[v];
    }
  }
  // A weight of 0 turns -0, which a product can round to, into 0: so does this where there is none.
#pragma GCC unroll 8
  for (int i = 0; i < X; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[i][v] += Acc{0};
  }
}

// What cell number `cell` of offset number `d` reads, and nothing else: in elements, `step` apart
// from `origin` on. Returns how many tokens there are.
template <class Acc>
int64_t exact_inputs(const AxisTable<Acc>& table, int64_t d, int64_t cell, int64_t origin,
                     int64_t step, Acc scale, int64_t* at, Acc* weight) {
  const int64_t slot = d * table.cells + cell;
  int64_t count = 0;
  for (int32_t k = 0; k < table.taps[slot]; ++k) {
    const Acc own = table.weight[slot * table.max_taps + k];
    if (own == 0) continue;
    at[count] = origin + (table.first[slot] + k) * step;
    weight[count++] = scale * own;
  }
  return count;
}

// The rows of every group, summed for tile number `tile` of output rows and n channels: sums
// [X, groups, tokens_x, pass], with zeros up to a whole block. Returns whether all of them are
// finite. `kExact`: a tile is one row, and has no weights of 0.
template <int X, bool kExact, class T, class Acc>
bool combine_tile(const MeanPlan<Acc>& plan, int64_t tile, const T* tokens, int64_t n, char* base) {
  const TileTable<Acc>& table = plan.tile_y;
  constexpr int V = kTileVectors<X>;
  constexpr int64_t block = V * kLanes<Acc>;
  int64_t* const at = reinterpret_cast<int64_t*>(base + plan.scratch.at);
  Acc* const weights = reinterpret_cast<Acc*>(base + plan.scratch.weights);
  Acc* const sums = reinterpret_cast<Acc*>(base + plan.scratch.sums);
  const int64_t stride_n = plan.token_strides[2];
  const int64_t row = plan.groups * plan.tokens_x * plan.pass;
  constexpr int64_t whole = kBlockBytes / sizeof(Acc);
  const int64_t padded = (n + whole - 1) / whole * whole;
  Vec<Acc> check = {};
  for (int64_t g = 0; g < plan.groups; ++g) {
    int64_t count = 0;
    for (int64_t i = plan.group_begin[g]; i < plan.group_begin[g + 1]; ++i) {
      const auto& view = plan.views[i];
      const int64_t origin = view.index * plan.token_strides[0];
      const int64_t step = plan.tokens_x * stride_n;
      if constexpr (kExact) {
        count += exact_inputs(plan.y, view.dy, tile, origin, step, view.weight, at + count,
                              weights + count);
        continue;
      }
      const int64_t slot = view.dy * table.tiles + tile;
      for (int64_t k = table.begin[slot]; k < table.begin[slot + 1]; ++k, ++count) {
        at[count] = origin + table.token[k] * step;
        for (int x = 0; x < X; ++x) weights[count * X + x] = view.weight * table.weight[k * X + x];
      }
    }
    for (int64_t j = 0; j < plan.tokens_x; ++j) {
      Acc* const to = sums + (g * plan.tokens_x + j) * plan.pass;
      for (int64_t c = 0; c < padded; c += block) {
        Vec<Acc> sum[X][V];
        sum_inputs<X, V>(tokens + j * stride_n + c, at, 1, weights, count, n - c, sum);
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
  }
  return no_nan(check);
}

// Output rows [row, row_end) of the band from their sums: out[x] = inverse[x] * sum over groups and
// tokens, and where there is a `keep`, keep[x] * out[x] is added.
template <int X, bool kExact, class Out, class Acc>
void filter_rows(const MeanPlan<Acc>& plan, int64_t row, int64_t row_end, int64_t n, Out* out,
                 char* base) {
  constexpr int V = kTileVectors<X>;
  constexpr int64_t block = V * kLanes<Acc>;
  const Acc* const sums = reinterpret_cast<Acc*>(base + plan.scratch.sums);
  const Acc* const inverses = reinterpret_cast<Acc*>(base + plan.scratch.inverse);
  const Acc* const keeps = reinterpret_cast<Acc*>(base + plan.scratch.keep);
  const int64_t stride_c = plan.out_strides[1], stride_x = plan.out_strides[3];
  for (int64_t r = row; r < row_end; ++r) {
    const Acc* const from = sums + (r - row) * plan.groups * plan.tokens_x * plan.pass;
    for (int64_t tile = 0; tile * X < plan.columns; ++tile) {
      const int64_t x = tile * X, cells = plan.columns - x < X ? plan.columns - x : X;
      const Acc* const inverse = inverses + r * plan.columns + x;
      const Acc* const keep = plan.seen ? keeps + r * plan.columns + x : nullptr;
      const int64_t* at;
      const Acc* weight;
      int64_t count = 0, scale = plan.pass;
      if constexpr (kExact) {
        int64_t* const exact_at = reinterpret_cast<int64_t*>(base + plan.scratch.at);
        Acc* const exact_weight = reinterpret_cast<Acc*>(base + plan.scratch.weights);
        for (int64_t g = 0; g < plan.groups; ++g)
          count += exact_inputs(plan.x, g, x, g * plan.tokens_x, 1, Acc{1}, exact_at + count,
                                exact_weight + count);
        at = exact_at;
        weight = exact_weight;
      } else {
        const int64_t first = plan.tile_x.begin[tile];
        count = plan.tile_x.begin[tile + 1] - first;
        at = plan.tile_x.token + first;
        weight = plan.tile_x.weight + first * X;
      }
      for (int64_t c = 0; c < n; c += block) {
        Vec<Acc> sum[X][V];
        sum_inputs<X, V>(from + c, at, scale, weight, count, block, sum);
        Out* const to = out + r * plan.out_strides[2] + x * stride_x + c * stride_c;
#pragma GCC unroll 8
        for (int i = 0; i < X; ++i) {
          if (i >= cells) break;
          Out* const cell = to + i * stride_x;
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v)
            sum[i][v] = inverse[i] != 0 ? sum[i][v] * inverse[i] : Vec<Acc>{};
          if (keep && keep[i] != 0) {
            Vec<Acc> before[V];
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) before[v] = Vec<Acc>{};
            load_block(cell, stride_c, n - c, before);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sum[i][v] += keep[i] * before[v];
          }
          store_block(cell, stride_c, n - c, sum[i]);
        }
      }
    }
  }
}

// Calls body(the number of cells of a tile, as a type).
template <int X>
struct TileSize {
  static constexpr int value = X;
};
template <class Body>
SRT_INLINE auto with_tile(int64_t tile, Body&& body) {
  if constexpr (kMaxTile >= 8) {
    if (tile == 8) return body(TileSize<8>{});
  }
  if (tile == 4) return body(TileSize<4>{});
  if (tile == 2) return body(TileSize<2>{});
  return body(TileSize<1>{});
}

template <class T, class Out, class Acc>
void mean(const MeanPlan<Acc>& plan, int64_t begin, int64_t end, void* scratch) {
  char* const base = static_cast<char*>(scratch);
  double* const count = reinterpret_cast<double*>(base + plan.scratch.count);
  Acc* const inverses = reinterpret_cast<Acc*>(base + plan.scratch.inverse);
  Acc* const keeps = reinterpret_cast<Acc*>(base + plan.scratch.keep);
  const int64_t chunks = (plan.channels + plan.chunk - 1) / plan.chunk;
  const int64_t bands = plan.tile_y.tiles;

  for (int64_t task = begin; task < end; ++task) {
    const int64_t band = task / chunks % bands;
    const int64_t b = task / chunks / bands;
    const int64_t y = band * plan.band;
    const int64_t rows = plan.rows - y < plan.band ? plan.rows - y : plan.band;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t x = 0; x < plan.columns; ++x) count[x] = 0;
      for (int64_t g = 0; g < plan.groups; ++g) {
        double count_y = 0;
        for (int64_t i = plan.group_begin[g]; i < plan.group_begin[g + 1]; ++i)
          count_y += static_cast<double>(plan.views[i].weight) *
                     plan.y.count[plan.views[i].dy * plan.rows + y + r];
        if (!(count_y > 0)) continue;
        const double* const count_x = plan.x.count + g * plan.columns;
        for (int64_t x = 0; x < plan.columns; ++x) count[x] += count_y * count_x[x];
      }
      Acc* const inverse = inverses + r * plan.columns;
      for (int64_t x = 0; x < plan.columns; ++x) {
        const double before = plan.seen ? plan.seen[(y + r) * plan.columns + x] : 0;
        const double total = before + plan.scale * count[x];
        inverse[x] = total > 0 ? static_cast<Acc>(plan.scale / total) : 0;
        if (plan.seen)
          keeps[r * plan.columns + x] = total > 0 ? static_cast<Acc>(before / total) : 0;
      }
    }

    const int64_t chunk = task % chunks * plan.chunk;
    const int64_t chunk_end =
        chunk + plan.chunk < plan.channels ? chunk + plan.chunk : plan.channels;
    for (int64_t c = chunk; c < chunk_end; c += plan.pass) {
      const int64_t n = chunk_end - c < plan.pass ? chunk_end - c : plan.pass;
      const T* const tokens = static_cast<const T*>(plan.tokens) + b * plan.token_strides[1] + c;
      Out* const out = static_cast<Out*>(plan.out) + b * plan.out_strides[0] +
                       c * plan.out_strides[1] + y * plan.out_strides[2];
      const bool finite = with_tile(plan.tile_y.tile, [&](auto tile) {
        return combine_tile<tile.value, false>(plan, band, tokens, n, base);
      });
      if (finite) {
        with_tile(plan.tile_x.tile,
                  [&](auto tile) { filter_rows<tile.value, false>(plan, 0, rows, n, out, base); });
        continue;
      }
      for (int64_t r = 0; r < rows; ++r) {
        combine_tile<1, true>(plan, y + r, tokens, n, base);
        filter_rows<1, true>(plan, r, r + 1, n, out, base);
      }
    }
  }
}

template <class Acc>
struct SourceRow {
  const void* pixels;
  Acc weight;
};

// One source position of a line: the vertical taps at column `column`, -1 being a padded zero.
template <class T, class Acc>
Acc vertical_taps(const SourceRow<Acc>* rows, int row_count, int64_t column) {
  Acc sum = 0;
  if (column >= 0) {
    for (int r = 0; r < row_count; ++r)
      sum += rows[r].weight * load_part(static_cast<const T*>(rows[r].pixels) + column, 1, 1)[0];
  }
  return sum;
}

template <class T>
void shift(const ShiftPlan& plan, int64_t begin, int64_t end, void* scratch) {
  using Acc = typename AccumulatorOf<T>::type;
  constexpr int lanes = kLanes<Acc>;
  Acc* line = static_cast<Acc*>(scratch);
  const int64_t width = plan.width;

  for (int64_t task = begin; task < end; ++task) {
    const int64_t y = task % plan.height;
    const int64_t plane = task / plan.height % plan.planes;
    const int64_t v = task / plan.height / plan.planes;
    const ShiftPlan::View& view = plan.views[v];
    const int64_t* source_y = plan.source_y + v * (plan.height + 3) + y;
    const int64_t* source_x = plan.source_x + v * (width + 3);
    const T* image = static_cast<const T*>(plan.image) + plane * plan.height * width;
    T* out = static_cast<T*>(plan.out) + task * width;

    // Whole pixels on both axes: a copy, bit for bit.
    if (view.y.taps == 1 && view.x.taps == 1) {
      if (source_y[0] < 0) {
        std::memset(static_cast<void*>(out), 0, static_cast<size_t>(width) * sizeof(T));
        continue;
      }
      const T* row = image + source_y[0] * width;
      const int64_t inner_end = view.inner_end < width ? view.inner_end : width;
      const int64_t inner_begin = view.inner_begin < inner_end ? view.inner_begin : inner_end;
      for (int64_t x = 0; x < inner_begin; ++x) out[x] = source_x[x] < 0 ? T{} : row[source_x[x]];
      if (inner_begin < inner_end)
        std::memcpy(static_cast<void*>(out + inner_begin), row + view.x.first + inner_begin,
                    static_cast<size_t>(inner_end - inner_begin) * sizeof(T));
      for (int64_t x = inner_end; x < width; ++x) out[x] = source_x[x] < 0 ? T{} : row[source_x[x]];
      continue;
    }

    // The vertical taps first, into a line that already holds the horizontal padding.
    SourceRow<Acc> rows[4];
    int row_count = 0;
    for (int k = 0; k < view.y.taps; ++k) {
      if (source_y[k] >= 0)
        rows[row_count++] = {image + source_y[k] * width, static_cast<Acc>(view.y.weight[k])};
    }
    const int64_t positions = width + view.x.taps - 1;
    int64_t m = 0;
    for (; m < view.inner_begin; ++m) line[m] = vertical_taps<T>(rows, row_count, source_x[m]);
    for (; m + lanes <= view.inner_end; m += lanes) {
      Vec<Acc> sum = {};
      for (int r = 0; r < row_count; ++r)
        sum += rows[r].weight * load(static_cast<const T*>(rows[r].pixels) + view.x.first + m);
      store(line + m, sum);
    }
    for (; m < positions; ++m) line[m] = vertical_taps<T>(rows, row_count, source_x[m]);

    Acc weight[4];
    for (int k = 0; k < view.x.taps; ++k) weight[k] = static_cast<Acc>(view.x.weight[k]);
    for (int64_t x = 0; x < width; x += lanes) {
      Vec<Acc> sum = {};
      for (int k = 0; k < view.x.taps; ++k) sum += weight[k] * load(line + x + k);
      if (x + lanes <= width) {
        store(out + x, sum);
      } else {
        store_part(out + x, 1, width - x, sum);
      }
    }
  }
}

}  // namespace
}  // namespace srt::cpu
