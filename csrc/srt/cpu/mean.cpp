// The mean on the CPU: builds the plan of a call (walks or tiles along each axis, sizes of bands,
// parts and channel chunks that fit the cache) and distributes its tasks over threads. mean-inl.h
// has the inner loops.
#include <algorithm>
#include <vector>

#include "../ensemble.h"
#include "../walk.h"
#include "dispatch.h"
#include "ensemble_views.h"

namespace srt::cpu {
namespace {

// The minimum size of a part of a row, in cells and in tokens. Neighbouring parts read about two
// tokens twice: larger parts repeat less, but the sums of smaller parts stay in the cache.
constexpr int64_t kPartCells = 48, kPartTokens = 3;

// The minimum rows of a band that is walked along y. The walk restarts in each band.
constexpr int64_t kBandRows = 8;

// Outputs of at least this size are written with non-temporal stores, which bypass the cache. The
// write itself is not slower at any size, but the next reader finds less in the cache. Measured on
// 2 cores with 2 MB of L2 each, writing plus one read takes up to 25 % longer at 24 MB, up to 15 %
// longer at 48 MB, and two thirds of the time at 96 MB.
constexpr int64_t kPastCacheBytes = int64_t{32} << 20;

// Builds and owns a WalkTable.
template <class Acc>
struct WalkStorage {
  std::vector<int64_t> begin{0};
  std::vector<typename WalkTable<Acc>::Tap> taps;
  std::vector<uint8_t> restart;
  std::vector<Acc> position;

  // Adds a walk over n views. offset(i) returns the offset of view i, row(i) its row of the axis
  // table, and tap(i, place, value, slope) the entry of the walk for a change of one of its tokens.
  template <class Offset, class Row, class Tap>
  void add(const Axis& axis, const AxisTable<Acc>& table, int64_t n, Offset&& offset, Row&& row,
           Tap&& tap) {
    for (int64_t cell = 0; cell < table.cells; ++cell) {
      bool starts = cell % walk_interval(axis) == 0;
      for (int64_t i = 0; i < n && !starts; ++i) {  // as stops_at, but from the table
        const int32_t* const at = table.taps + row(i) * table.cells + cell;
        starts = at[-1] > 0 && at[0] == 0;
      }
      for (int64_t i = 0; i < n; ++i) {
        visit_step(axis, offset(i), cell, starts, [&](int32_t place, double value, double slope) {
          taps.push_back(tap(i, place, static_cast<Acc>(value), static_cast<Acc>(slope)));
        });
      }
      begin.push_back(static_cast<int64_t>(taps.size()));
      restart.push_back(starts);
    }
  }
  WalkTable<Acc> table(const Axis& axis) {
    for (int64_t cell = 0; cell < axis.cells(); ++cell)
      position.push_back(static_cast<Acc>(walk_position(axis, cell)));
    return {begin.data(), taps.data(), restart.data(), position.data()};
  }
};

// Builds and owns the tables of one call.
template <class Acc>
struct MeanTables {
  using Tap = typename WalkTable<Acc>::Tap;
  WalkStorage<Acc> walk_y, walk_x;
  TileStorage<Acc> tile_y, tile_x;
  std::vector<Span> columns;

  void make_walk_x(const Axis& axis, const std::vector<double>& dx, MeanPlan<Acc>& plan) {
    split_row(axis, walk_interval(axis), plan);
    walk_x.add(
        axis, plan.x, plan.groups, [&](int64_t g) { return dx[static_cast<size_t>(g)]; },
        [](int64_t g) { return g; },
        [&](int64_t g, int64_t place, Acc value, Acc slope) {
          return Tap{g * plan.columns + place, value, slope};
        });
    plan.walk_x = walk_x.table(axis);
  }

  void make_walk_y(const Axis& axis, const std::vector<double>& dy, MeanPlan<Acc>& plan) {
    for (int64_t g = 0; g < plan.groups; ++g) {
      const auto* const own = plan.counted_views + plan.group_begin[g];
      walk_y.add(
          axis, plan.y, plan.group_begin[g + 1] - plan.group_begin[g],
          [&](int64_t i) { return dy[static_cast<size_t>(own[i].dy)]; },
          [&](int64_t i) { return own[i].dy; },
          [&](int64_t i, int64_t place, Acc value, Acc slope) {
            const int64_t token = plan.token_y[own[i].dy * plan.places_y + place];
            const int64_t at = own[i].index * plan.token_strides[0] +
                               token * plan.tokens_x * plan.token_strides[2];
            return Tap{at, own[i].weight * value, own[i].weight * slope};
          });
    }
    plan.walk_y = walk_y.table(axis);
    plan.band = div_up(kBandRows, walk_interval(axis)) * walk_interval(axis);
  }

  void make_tiles(const Axis& axis, int64_t largest, MeanPlan<Acc>& plan) {
    const int64_t tile = choose_tile(plan.x, plan.groups, largest, kLoadSums, once);
    split_row(axis, tile, plan);
    for (int64_t cell = 0; cell < plan.width; cell += tile) {
      for (int64_t g = 0; g < plan.groups; ++g)
        tile_x.add(plan.x, g, cell, tile, [&](int64_t place) { return g * plan.columns + place; });
      tile_x.close();
    }
    plan.tile_x = tile_x.table(tile, plan.width);
  }

  // Splits a row into parts of equal size, each a multiple of `unit` cells.
  void split_row(const Axis& axis, int64_t unit, MeanPlan<Acc>& plan) {
    const int64_t cells = std::max(kPartCells, kPartTokens * axis.patch / axis.stride);
    const int64_t parts = std::max<int64_t>(1, plan.width / cells);
    plan.part = div_up(div_up(plan.width, parts), unit) * unit;
    plan.parts = div_up(plan.width, plan.part);
    for (int64_t x = 0; x < plan.width; x += plan.part) {
      Span own{plan.places_x, 0};
      for (int64_t g = 0; g < plan.groups; ++g) {
        const auto [first, end] = inputs_of_tile(plan.x, g, x, plan.part);
        if (first < end) own = {std::min(own.begin, first), std::max(own.end, end)};
      }
      // A walk also changes the token after the last one read, whose weight is 0 at the last pixel.
      own = {std::min(own.begin, own.end), std::min(own.end + 1, plan.places_x)};
      columns.push_back(own);
      plan.columns = std::max(plan.columns, own.end - own.begin);
    }
    plan.columns_of = columns.data();
  }
};

// The largest allowed tile of rows: its sums, for at least a piece of channels, must fit the cache,
// and there must be a tile for each thread. `row_bytes` is the size of the sums of one row and one
// channel.
template <class Acc>
int64_t largest_tile(const MeanPlan<Acc>& plan, int64_t block, int64_t row_bytes, int64_t threads) {
  const int64_t piece = std::min(div_up(plan.channels, block) * block,
                                 kPieceBytes / static_cast<int64_t>(sizeof(Acc)));
  int64_t largest = kernels().max_tile;
  while (largest > 1 && (largest * row_bytes * piece > sums_bytes ||
                         plan.batch * div_up(plan.height, largest) < threads))
    largest /= 2;
  return largest;
}

// Whether the output is written with non-temporal stores: it is large and consists of whole aligned
// cache lines.
template <class Out>
bool goes_past_cache(const EnsembleArgs& args, int64_t elements) {
  constexpr int64_t line = 64, size = sizeof(Out);
  const auto whole = [&](int64_t stride) { return stride * size % line == 0; };
  return !args.total_weight && elements * size >= kPastCacheBytes && args.out_strides[1] == 1 &&
         reinterpret_cast<uintptr_t>(args.out) % line == 0 && whole(args.out_strides[0]) &&
         whole(args.out_strides[2]) && whole(args.out_strides[3]);
}

template <class Acc>
int64_t place_scratch(int64_t inputs, MeanPlan<Acc>& plan) {
  const int64_t row = plan.groups * plan.columns * plan.pass;
  Layout layout;
  layout.place(plan.scratch.sums, plan.band * row);
  layout.place(plan.scratch.at, inputs);
  layout.place(plan.scratch.weights, inputs * plan.tile_y.tile);
  layout.place(plan.scratch.weight, plan.part);
  layout.place(plan.scratch.inverse, plan.band * plan.part);
  layout.place(plan.scratch.keep, plan.total_weight ? plan.band * plan.part : 0);
  return layout.bytes;
}

template <class T, class Acc = typename AccumulatorOf<T>::type>
void mean_of(const EnsembleArgs& args, const Parallel& parallel) {
  const Kernels& isa = kernels();
  MeanPlan<Acc> plan{};
  const Views<Acc> views(args, /*divide=*/false, plan);
  constexpr auto kSize = static_cast<int64_t>(sizeof(Acc));
  const int64_t block = isa.block_bytes / kSize;
  const Axis axis_y{args.grid[0], args.patch[0], args.stride[0], args.upsample, args.border};
  const Axis axis_x{args.grid[1], args.patch[1], args.stride[1], args.upsample, args.border};
  MeanTables<Acc> tables;
  plan.walks_y = args.stride[0] == 1;
  plan.walks_x = args.stride[1] == 1;
  if (plan.walks_x) {
    tables.make_walk_x(axis_x, views.dx, plan);
  } else {
    tables.make_tiles(axis_x, isa.max_tile, plan);
  }
  // There are no groups if all weights are 0.
  const int64_t row_bytes = std::max<int64_t>(1, plan.groups * plan.columns) * kSize;
  // A band and pass whose sums are too large take the exact path, which adds in another order than
  // a walk. Results must be bitwise equal for any number of threads, so with walks the sizes of a
  // band and of a pass must not depend on that number.
  const bool walks = plan.walks_y || plan.walks_x;
  const int64_t largest = largest_tile(plan, block, row_bytes, walks ? 1 : parallel.threads);
  const int64_t tile_y =
      plan.walks_y ? 1 : choose_tile(plan.y, plan.offsets_y, largest, kLoadTokens, once);
  tables.tile_y.add_rows(plan.y, plan.offsets_y, tile_y, [&](int64_t d, int64_t place) {
    return plan.token_y[d * plan.places_y + place];
  });
  plan.tile_y = tables.tile_y.table(tile_y, plan.height);
  plan.band = tile_y;
  if (plan.walks_y) tables.make_walk_y(axis_y, views.dy, plan);
  plan.past_cache = goes_past_cache<T>(args, plan.batch * plan.channels * plan.height * plan.width);

  plan.pass = fitting_channels(plan.channels, block, plan.band * row_bytes);
  const int64_t unit = walks ? plan.pass : block;
  plan.chunk = div_up(plan.channels, unit) * unit;
  const auto count_tasks = [&] {
    return plan.batch * div_up(plan.height, plan.band) * plan.parts *
           div_up(plan.channels, plan.chunk);
  };
  split_channels(unit, parallel.threads, plan.chunk, count_tasks);
  plan.pass = std::min(plan.pass, plan.chunk);
  const int64_t taps =
      std::max(views.largest_group() * plan.y.max_taps, plan.groups * plan.x.max_taps);
  const int64_t inputs = std::max(taps, views.largest_group() * tables.tile_y.largest());
  const int64_t scratch_bytes = place_scratch(inputs, plan);
  const double work = static_cast<double>(plan.batch) *
                      static_cast<double>(args.channels * plan.height) *
                      static_cast<double>(plan.groups * plan.width * plan.x.max_taps +
                                          plan.counted * plan.tokens_x * plan.y.max_taps);
  run_tasks(plan, args.total_weight ? isa.of<T>().stream_mean : isa.of<T>().mean, count_tasks(),
            workers_for(work, parallel), scratch_bytes, parallel);
}

}  // namespace

void run_mean(const EnsembleArgs& args, const Parallel& parallel) {
  dispatch_floating(args.dtype, [&](auto element) { mean_of<decltype(element)>(args, parallel); });
}

}  // namespace srt::cpu
