// The inner loops. inner.cpp compiles this header once for each instruction set, with other flags.
// Everything here, and everything it calls, has internal linkage: a template or inline function
// with one name in all the objects would be merged by the linker, and the copy it kept could hold
// instructions that the processor lacks. So no std:: templates and no functions of other headers.
#pragma once
#include "kernels.h"
#include "lanes.h"

namespace srt::cpu {
namespace {

// Four vectors of channels at a time: independent sums enough to hide the latency of an add, with
// registers left on every instruction set.
constexpr int kVectors = 4;
constexpr int64_t kBlockBytes = kVectors * kVectorBytes;

// sum += weight * the n channels from `from` on; lanes past n stay as they are.
template <class T, class V>
void add_block(const T* from, int64_t n, typename AccumulatorOf<T>::type weight,
               V (&sum)[kVectors]) {
  constexpr int lanes = kLanes<typename AccumulatorOf<T>::type>;
  if (n >= kVectors * lanes) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[v] += weight * load(from + v * lanes);
    return;
  }
  for (int v = 0; v < kVectors && v * lanes < n; ++v) {
    const int64_t rest = n - v * lanes;
    sum[v] += weight * load_part(from + v * lanes, 1, rest < lanes ? rest : lanes);
  }
}

template <int N, class T, class V>
void store_block(T* to, int64_t stride, int64_t n, const V (&value)[N]) {
  constexpr int lanes = kLanes<typename AccumulatorOf<T>::type>;
  if (n >= N * lanes && stride == 1) {
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) store(to + v * lanes, value[v]);
    return;
  }
  for (int v = 0; v < N && v * lanes < n; ++v) {
    const int64_t rest = n - v * lanes;
    store_part(to + v * lanes * stride, stride, rest < lanes ? rest : lanes, value[v]);
  }
}

template <int N, class T, class V>
void load_block(const T* from, int64_t stride, int64_t n, V (&value)[N]) {
  constexpr int lanes = kLanes<typename AccumulatorOf<T>::type>;
  for (int v = 0; v < N && v * lanes < n; ++v) {
    const int64_t rest = n - v * lanes;
    value[v] = load_part(from + v * lanes * stride, stride, rest < lanes ? rest : lanes);
  }
}

// sums[j] = sum over rows of weight * row[j], for n channels of each token; zeros up to a whole
// block.
template <class T, class Acc>
void combine_rows(const TokenRow<Acc>* rows, int64_t row_count, int64_t tokens_x, int64_t stride_n,
                  int64_t n, int64_t chunk, Acc* sums) {
  constexpr int64_t block = kBlockBytes / sizeof(Acc);
  for (int64_t j = 0; j < tokens_x; ++j) {
    for (int64_t c = 0; c < n; c += block) {
      Vec<Acc> sum[kVectors] = {};
      for (int64_t r = 0; r < row_count; ++r)
        add_block(static_cast<const T*>(rows[r].tokens) + j * stride_n + c, n - c, rows[r].weight,
                  sum);
      store_block(sums + j * chunk + c, 1, block, sum);
    }
  }
}

// One output row: out[x] = inverse[x] * sum over groups and taps of weight * sums[token], and where
// there is a `keep`, keep[x] * out[x] is added.
template <class Out, class Acc>
void filter_row(const GroupFilter<Acc>* filters, int64_t filter_count, int64_t max_taps,
                const Acc* inverse, const Acc* keep, int64_t columns, int64_t n, int64_t chunk,
                Out* out, int64_t stride_c, int64_t stride_x) {
  constexpr int64_t block = kBlockBytes / sizeof(Acc);
  for (int64_t x = 0; x < columns; ++x) {
    for (int64_t c = 0; c < n; c += block) {
      Vec<Acc> sum[kVectors] = {};
      for (int64_t g = 0; g < filter_count; ++g) {
        const GroupFilter<Acc>& filter = filters[g];
        const Acc* token = filter.sums + filter.first[x] * chunk + c;
        const Acc* weight = filter.weight + x * max_taps;
        for (int32_t k = 0; k < filter.taps[x]; ++k, token += chunk)
          if (weight[k] != 0) add_block(token, block, weight[k], sum);
      }
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        sum[v] = inverse[x] != 0 ? sum[v] * inverse[x] : Vec<Acc>{};
      Out* const cell = out + x * stride_x + c * stride_c;
      if (keep && keep[x] != 0) {
        Vec<Acc> before[kVectors] = {};
        load_block(cell, stride_c, n - c, before);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[v] += keep[x] * before[v];
      }
      store_block(cell, stride_c, n - c, sum);
    }
  }
}

template <class T, class Out, class Acc>
void mean(const MeanPlan<Acc>& plan, int64_t begin, int64_t end, void* scratch) {
  char* base = static_cast<char*>(scratch);
  Acc* sums = reinterpret_cast<Acc*>(base + plan.scratch.sums);
  auto* token_rows = reinterpret_cast<TokenRow<Acc>*>(base + plan.scratch.rows);
  auto* filters = reinterpret_cast<GroupFilter<Acc>*>(base + plan.scratch.filters);
  double* count = reinterpret_cast<double*>(base + plan.scratch.count);
  Acc* inverse = reinterpret_cast<Acc*>(base + plan.scratch.inverse);
  Acc* keep = plan.seen ? reinterpret_cast<Acc*>(base + plan.scratch.keep) : nullptr;
  const int64_t chunks = (plan.channels + plan.chunk - 1) / plan.chunk;
  const int64_t bands = (plan.rows + plan.band - 1) / plan.band;

  for (int64_t task = begin; task < end; ++task) {
    const int64_t c = task % chunks * plan.chunk;
    const int64_t band = task / chunks % bands;
    const int64_t b = task / chunks / bands;
    const int64_t n = plan.channels - c < plan.chunk ? plan.channels - c : plan.chunk;
    const T* tokens = static_cast<const T*>(plan.tokens) + b * plan.token_strides[1] + c;
    const int64_t y_end = (band + 1) * plan.band < plan.rows ? (band + 1) * plan.band : plan.rows;

    for (int64_t y = band * plan.band; y < y_end; ++y) {
      int64_t filter_count = 0;
      for (int64_t x = 0; x < plan.columns; ++x) count[x] = 0;
      for (int64_t g = 0; g < plan.groups; ++g) {
        // The rows that the views of this group have for output row y, and their part of the count.
        int64_t row_count = 0;
        double count_y = 0;
        for (int64_t i = plan.group_begin[g]; i < plan.group_begin[g + 1]; ++i) {
          const auto& view = plan.views[i];
          const int64_t slot = view.dy * plan.rows + y;
          count_y += static_cast<double>(view.weight) * plan.y.count[slot];
          const T* row = tokens + view.index * plan.token_strides[0] +
                         plan.y.first[slot] * plan.tokens_x * plan.token_strides[2];
          for (int32_t k = 0; k < plan.y.taps[slot]; ++k) {
            const Acc weight = plan.y.weight[slot * plan.y.max_taps + k];
            if (weight != 0) token_rows[row_count++] = {row, view.weight * weight};
            row += plan.tokens_x * plan.token_strides[2];
          }
        }
        const int64_t table = g * plan.columns;
        if (count_y > 0) {
          for (int64_t x = 0; x < plan.columns; ++x) count[x] += count_y * plan.x.count[table + x];
        }
        if (row_count == 0) continue;
        Acc* group_sums = sums + g * plan.tokens_x * plan.chunk;
        combine_rows<T>(token_rows, row_count, plan.tokens_x, plan.token_strides[2], n, plan.chunk,
                        group_sums);
        filters[filter_count++] = {plan.x.first + table, plan.x.taps + table,
                                   plan.x.weight + table * plan.x.max_taps, group_sums};
      }
      for (int64_t x = 0; x < plan.columns; ++x) {
        const double before = plan.seen ? plan.seen[y * plan.columns + x] : 0;
        const double total = before + plan.scale * count[x];
        inverse[x] = total > 0 ? static_cast<Acc>(plan.scale / total) : 0;
        if (keep) keep[x] = total > 0 ? static_cast<Acc>(before / total) : 0;
      }
      Out* out = static_cast<Out*>(plan.out) + b * plan.out_strides[0] + c * plan.out_strides[1] +
                 y * plan.out_strides[2];
      filter_row(filters, filter_count, plan.x.max_taps, inverse, keep, plan.columns, n, plan.chunk,
                 out, plan.out_strides[1], plan.out_strides[3]);
    }
  }
}

// One source position of a line: the vertical taps at column `column`, -1 being a padded zero.
template <class T, class Acc>
Acc vertical_taps(const TokenRow<Acc>* rows, int row_count, int64_t column) {
  Acc sum = 0;
  if (column >= 0) {
    for (int r = 0; r < row_count; ++r)
      sum += rows[r].weight * load_part(static_cast<const T*>(rows[r].tokens) + column, 1, 1)[0];
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
    TokenRow<Acc> rows[4];
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
        sum += rows[r].weight * load(static_cast<const T*>(rows[r].tokens) + view.x.first + m);
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
