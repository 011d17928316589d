// The inner loops of the mean: tokens [V, B, h*w, C] to a field [B, C, H', W'], in two separable
// passes over a band of output rows. First, for every group of views that share a dx, the token
// rows that the band reads are summed along y into scratch, [band, groups, columns, channels]. Then
// each output row is computed from these sums along x, over all groups at once. At stride 1 both
// passes are walks (walk.h): between kinks a pixel costs one multiply-add per channel, however many
// views there are. At other strides they are products with small tiles of weights (TileTable).
// Vectors run along the channels. plan.h has the formula, vector_blocks-inl.h the rules for code in
// this file.
#pragma once
#include "vector_blocks-inl.h"

namespace srt::cpu {
namespace {

// The type as which tokens are read. Channels are independent, so if input and output are both
// bfloat16, even and odd channels stay in separate vectors, in registers and in the scratch, and
// are interleaved again by the store.
template <class T, class Out>
struct InputOf {
  using type = T;
};
template <>
struct InputOf<BFloat16, BFloat16> {
  using type = PairedBFloat16;
};

// The output of one pass of a task: n channels of cells [x, x_end) in rows [y, y_end) of a band.
template <class T, class Out>
struct MeanPart {
  int64_t y, y_end, x, x_end;
  Span columns;                                  // places of the tokens that are read
  const typename InputOf<T, Out>::type* tokens;  // at view 0, token 0
  Out* out;                                      // at cell (y, x)
  int64_t n;
};

// Runs steps [first, first + n_steps) of a walk; its sums must restart at the first one. Input i is
// the n channels at from + i * scale; `kFar` means that the inputs are not in the cache. Calls
// emit(i, value + position[i] * slope) for the i-th step.
template <bool kFar, int V, class T, class Acc, class Emit>
SRT_INLINE void walk(const WalkTable<Acc>& table, int64_t first, int64_t n_steps,
                     const Acc* position, const T* from, int64_t scale, int64_t n, Emit&& emit) {
  Vec<Acc> value[V] = {}, slope[V] = {};
  const auto* tap = table.taps + table.begin[first];
  for (int64_t i = 0; i < n_steps; ++i) {
    if (table.restart[first + i]) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) value[v] = slope[v] = Vec<Acc>{};
    }
    for (const auto* const last = table.taps + table.begin[first + i + 1]; tap != last; ++tap) {
      const T* const p = from + tap->input * scale;
      Vec<Acc> in[V];
      load_inputs(p, n, in);
      if constexpr (kFar) prefetch_next<V * kLanes<Acc>>(p);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        value[v] += tap->value * in[v];
        slope[v] += tap->slope * in[v];
      }
    }
    Vec<Acc> sum[1][V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[0][v] = value[v] + position[i] * slope[v];
    emit(i, sum);
  }
}

// ---- rows of tokens: the sum over the views of every group --------------------------------------

// Sums token rows along y for X output rows of tile number `tile`, starting at its row `first`.
// Writes sums [X, groups, columns, pass], padded with zeros to a whole block. X is the whole tile,
// or 1 with `kExact`. Returns whether the sums are finite and small enough for the pass along x
// (see kMaxSumOfSquares).
template <int X, bool kExact, class T, class Out, class Acc>
bool sum_rows(const MeanPlan<Acc>& plan, const MeanPart<T, Out>& part, int64_t tile, int64_t first,
              char* base) {
  const TileTable<Acc>& table = plan.tile_y;
  const int64_t pitch = kExact ? table.tile : X;
  int64_t* const at = in(base, plan.scratch.at);
  Acc* const weights = in(base, plan.scratch.weights);
  Acc* sums = in(base, plan.scratch.sums);
  Vec<Acc> squares = {};
  for (int64_t g = 0; g < plan.groups; ++g, sums += plan.columns * plan.pass) {
    int64_t count = 0;
    for (int64_t i = plan.group_begin[g]; i < plan.group_begin[g + 1]; ++i) {
      const auto& view = plan.counted_views[i];
      const int64_t slot = view.dy * table.tiles + tile;
      for (int64_t k = table.begin[slot]; k < table.begin[slot + 1]; ++k, ++count) {
        at[count] = view.index * plan.token_strides[0] +
                    table.input[k] * plan.tokens_x * plan.token_strides[2];
        for (int64_t y = 0; y < pitch; ++y)
          weights[count * pitch + y] = view.weight * table.weight[k * pitch + y];
      }
    }
    const int64_t* const token_x = plan.token_x + g * plan.places_x;
    const int64_t row = plan.groups * plan.columns * plan.pass;
    for (int64_t j = part.columns.begin; j < part.columns.end; ++j) {
      Acc* const to = sums + (j - part.columns.begin) * plan.pass;
      if (j - part.columns.begin >= plan.tokens_x) {  // a token at a second place: copy its sum
        for (int y = 0; y < X; ++y)
          std::memcpy(to + y * row, to + y * row - plan.tokens_x * plan.pass,
                      static_cast<size_t>(plan.pass) * sizeof(Acc));
        continue;
      }
      store_sums<X, kExact>(part.tokens + token_x[j] * plan.token_strides[2], at, weights + first,
                            pitch, count, part.n, to, row, squares);
    }
  }
  return all_below(squares, kMaxSumOfSquares<Acc>);
}

// Computes the same sums for a whole band by walking down its rows, group by group. Unlike in
// sum_rows, the channels are padded with zeros only to half a block if they fit one.
template <class T, class Out, class Acc>
bool walk_down(const MeanPlan<Acc>& plan, const MeanPart<T, Out>& part, char* base) {
  constexpr int lanes = kLanes<Acc>;
  const int64_t row = plan.groups * plan.columns * plan.pass;
  Acc* sums = in(base, plan.scratch.sums);
  Vec<Acc> squares[kVectors] = {};
  for (int64_t g = 0; g < plan.groups; ++g, sums += plan.columns * plan.pass) {
    const int64_t* const token_x = plan.token_x + g * plan.places_x;
    for (int64_t j = part.columns.begin; j < part.columns.end; ++j) {
      const auto* const tokens = part.tokens + token_x[j] * plan.token_strides[2];
      for (int64_t c = 0; c < part.n; c += kVectors * lanes) {
        Acc* const to = sums + (j - part.columns.begin) * plan.pass + c;
        with_vectors<Acc>(part.n - c, [&](auto vectors) __attribute__((always_inline)) {
          constexpr int V = decltype(vectors)::value;
          walk<true, V>(plan.walk_y, g * plan.height + part.y, part.y_end - part.y,
                        plan.walk_y.position + part.y, tokens + c, 1, part.n - c,
                        [&](int64_t y, auto& sum) __attribute__((always_inline)) {
#pragma GCC unroll 4
                          for (int v = 0; v < V; ++v) {
                            store(to + y * row + v * lanes, sum[0][v]);
                            squares[v] += sum[0][v] * sum[0][v];
                          }
                        });
        });
      }
    }
  }
  for (int v = 1; v < kVectors; ++v) squares[0] += squares[v];
  return all_below(squares[0], kMaxSumOfSquares<Acc>);
}

// ---- cells: from the sums of all groups ---------------------------------------------------------

// Stores n channels of any stride: out = sums + keep * out. Not inlined, because it would be
// compiled once for each cell of a tile.
template <int V, class Out, class Acc>
__attribute__((noinline)) void write_part(const Acc* sums, Acc keep, Out* out, int64_t stride_c,
                                          int64_t n) {
  Vec<Acc> sum[V], before[V] = {};
  load_block(sums, 1, V * kLanes<Acc>, sum);
  if (keep != 0) load_block(out, stride_c, n, before);
  for (int v = 0; keep != 0 && v < V; ++v) sum[v] += keep * before[v];
  store_block(out, stride_c, n, sum);
}

// Writes a cell: out = inverse * sum + keep * out, where keep is 0 outside of streams. `finite`
// states that all sums are finite.
template <int V, class Out, class Acc>
SRT_INLINE void write_cell(Vec<Acc> (&sum)[V], Acc inverse, Acc keep, Out* out, int64_t stride_c,
                           int64_t n, bool finite, bool past_cache) {
  constexpr int lanes = kLanes<Acc>;
  // A cell without weight is 0, even if its sum is infinite. Adding 0 turns -0 into 0, as the
  // products with weights of 0 do in a tile.
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) sum[v] = inverse != 0 ? sum[v] * inverse + Acc{0} : Vec<Acc>{};
  if (finite && stride_c == 1 && n >= V * lanes) {
    if constexpr (std::is_same<Out, Acc>::value) {
#pragma GCC unroll 4
      for (int v = 0; keep != 0 && v < V; ++v) sum[v] += keep * load(out + v * lanes);
    }
    return store_whole(out, sum, past_cache);
  }
  if constexpr (std::is_same<Out, BFloat16>::value) {
#pragma GCC unroll 2
    for (int v = 0; v < V; v += 2) put_in_order(sum[v], sum[v + 1]);
  }
  Acc sums[V * lanes];
  store_block(sums, 1, V * lanes, sum);
  write_part<V>(sums, keep, out, stride_c, n);
}

// Writes the first `cells` of X cells starting at cell x of row r of the band, starting at channel
// c. `finite` states that all sums are finite.
template <int X, int V, class T, class Out, class Acc>
SRT_INLINE void write_cells(const MeanPlan<Acc>& plan, const MeanPart<T, Out>& part, int64_t r,
                            int64_t x, int64_t cells, int64_t c, Vec<Acc> (&sum)[X][V], bool finite,
                            char* base) {
  const int64_t cell = r * plan.part + x - part.x;
  const Acc* const inverse = in(base, plan.scratch.inverse) + cell;
  const Acc* const keep = plan.total_weight ? in(base, plan.scratch.keep) + cell : nullptr;
  Out* const to = part.out + r * plan.out_strides[2] + (x - part.x) * plan.out_strides[3] +
                  c * plan.out_strides[1];
#pragma GCC unroll 8
  for (int i = 0; i < X; ++i) {
    if (i < cells)
      write_cell(sum[i], inverse[i], keep ? keep[i] : Acc{0}, to + i * plan.out_strides[3],
                 plan.out_strides[1], part.n - c, finite, plan.past_cache);
  }
}

// Computes row r of the band by a walk along x.
template <class T, class Out, class Acc>
void walk_along(const MeanPlan<Acc>& plan, const MeanPart<T, Out>& part, int64_t r, char* base) {
  constexpr int64_t block = kVectors * kLanes<Acc>;
  const Acc* const sums = in(base, plan.scratch.sums) +
                          (r * plan.groups * plan.columns - part.columns.begin) * plan.pass;
  for (int64_t c = 0; c < part.n; c += block) {
    with_vectors<Acc>(part.n - c, [&](auto vectors) __attribute__((always_inline)) {
      walk<false, decltype(vectors)::value>(
          plan.walk_x, part.x, part.x_end - part.x, plan.walk_x.position + part.x, sums + c,
          plan.pass, block, [&](int64_t x, auto& sum) __attribute__((always_inline)) {
            write_cells(plan, part, r, part.x + x, 1, c, sum, true, base);
          });
    });
  }
}

// Computes the rows of a band with the tiles along x, X cells at a time.
template <int X, class T, class Out, class Acc>
void filter_tiles(const MeanPlan<Acc>& plan, const MeanPart<T, Out>& part, char* base) {
  const TileTable<Acc>& table = plan.tile_x;
  constexpr int V = kTileVectors<X>;
  constexpr int64_t block = V * kLanes<Acc>;
  const Acc* sums = in(base, plan.scratch.sums) - part.columns.begin * plan.pass;
  for (int64_t r = 0; r < part.y_end - part.y;
       ++r, sums += plan.groups * plan.columns * plan.pass) {
    for (int64_t x = part.x; x < part.x_end; x += X) {
      const int64_t first = table.begin[x / X], count = table.begin[x / X + 1] - first;
      for (int64_t c = 0; c < part.n; c += block) {
        Vec<Acc> sum[X][V];
        sum_inputs<X, false, false>(sums + c, table.input + first, plan.pass,
                                    table.weight + first * X, X, count, block, sum);
        write_cells(plan, part, r, x, least(part.x_end - x, X), c, sum, true, base);
      }
    }
  }
}

// Computes row r of the band cell by cell from the axis table. Only tokens that a cell reads enter
// its sum, so a non-finite token does not reach other cells.
template <class T, class Out, class Acc>
void filter_row(const MeanPlan<Acc>& plan, const MeanPart<T, Out>& part, int64_t r, char* base) {
  int64_t* const at = in(base, plan.scratch.at);
  Acc* const weights = in(base, plan.scratch.weights);
  const Acc* const sums = in(base, plan.scratch.sums);
  for (int64_t x = part.x; x < part.x_end; ++x) {
    int64_t count = 0;
    for (int64_t g = 0; g < plan.groups; ++g) {
      const int64_t slot = g * plan.width + x;
      for (int64_t k = 0; k < plan.x.taps[slot]; ++k, ++count) {
        at[count] = g * plan.columns + plan.x.first[slot] + k - part.columns.begin;
        weights[count] = plan.x.weight[slot * plan.x.max_taps + k];
      }
    }
    constexpr int64_t block = kVectors * kLanes<Acc>;
    for (int64_t c = 0; c < part.n; c += block) {
      Vec<Acc> sum[1][kVectors];
      sum_inputs<1, true, false>(sums + c, at, plan.pass, weights, 1, count, block, sum);
      write_cells(plan, part, r, x, 1, c, sum, false, base);
    }
  }
}

// ---- tasks --------------------------------------------------------------------------------------

// For each cell of row r of the band: `inverse`, the factor of its sum, and in a stream `keep`, the
// factor of its previous state.
template <class T, class Out, class Acc>
void fill_inverse(const MeanPlan<Acc>& plan, const MeanPart<T, Out>& part, int64_t r, char* base) {
  const int64_t y = part.y + r, cells = part.x_end - part.x;
  double* const weight = in(base, plan.scratch.weight);
  Acc* const inverse = in(base, plan.scratch.inverse) + r * plan.part;
  Acc* const keep = in(base, plan.scratch.keep) + r * plan.part;
  sum_weights(plan, y, part.x, cells, /*counts_views=*/false, weight);
  for (int64_t x = 0; x < cells; ++x) {
    const double before = plan.total_weight ? plan.total_weight[y * plan.width + part.x + x] : 0;
    const double total = before + plan.scale * weight[x];
    inverse[x] = total > 0 ? static_cast<Acc>(plan.scale / total) : 0;
    if (plan.total_weight) keep[x] = total > 0 ? static_cast<Acc>(before / total) : 0;
  }
}

// Computes a part by walks or tiles. If a sum along y is not finite or too large, it is computed
// again by the exact path: from the axis tables, one row and one cell at a time.
template <class T, class Out, class Acc>
void mean_of_part(const MeanPlan<Acc>& plan, const MeanPart<T, Out>& part, char* base) {
  const bool small =
      plan.walks_y ? walk_down(plan, part, base) : with_tile(plan.tile_y.tile, [&](auto tile) {
        return sum_rows<tile.value, false>(plan, part, part.y / plan.band, 0, base);
      });
  if (small && !plan.walks_x) {
    with_tile(plan.tile_x.tile, [&](auto tile) { filter_tiles<tile.value>(plan, part, base); });
    return;
  }
  for (int64_t r = 0; r < part.y_end - part.y; ++r) {
    if (small) {
      walk_along(plan, part, r, base);
    } else {
      sum_rows<1, true>(plan, part, (part.y + r) / plan.tile_y.tile,
                        (part.y + r) % plan.tile_y.tile, base);
      filter_row(plan, part, r, base);
    }
  }
}

template <class T, class Out, class Acc>
void mean(const MeanPlan<Acc>& plan, int64_t begin, int64_t end, void* scratch) {
  char* const base = static_cast<char*>(scratch);
  const int64_t chunks = (plan.channels + plan.chunk - 1) / plan.chunk;
  const int64_t bands = (plan.height + plan.band - 1) / plan.band;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t chunk = task % chunks * plan.chunk;
    const int64_t p = task / chunks % plan.parts;
    const int64_t b = task / chunks / plan.parts / bands;
    MeanPart<T, Out> part{};
    part.y = task / chunks / plan.parts % bands * plan.band;
    part.y_end = least(part.y + plan.band, plan.height);
    part.x = p * plan.part;
    part.x_end = least(part.x + plan.part, plan.width);
    part.columns = plan.columns_of[p];
    for (int64_t r = 0; r < part.y_end - part.y; ++r) fill_inverse(plan, part, r, base);
    const int64_t chunk_end = least(chunk + plan.chunk, plan.channels);
    for (int64_t c = chunk; c < chunk_end; c += plan.pass) {
      part.n = least(chunk_end - c, plan.pass);
      part.tokens = static_cast<const typename InputOf<T, Out>::type*>(plan.tokens) +
                    b * plan.token_strides[1] + c;
      part.out = static_cast<Out*>(plan.out) + b * plan.out_strides[0] + c * plan.out_strides[1] +
                 part.y * plan.out_strides[2] + part.x * plan.out_strides[3];
      mean_of_part(plan, part, base);
    }
  }
  if (plan.past_cache) fence_past_cache();
}

}  // namespace
}  // namespace srt::cpu
