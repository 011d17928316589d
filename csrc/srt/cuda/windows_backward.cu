// The gradients of windows on the device, from the gradient of the windows [B, N, C, Ph, Pw].
//
// With respect to the images [B, C, H, W]: a counting sort lists, for each row of pixels, the rows
// of samples that read it. The order depends only on the positions, not on timing. Each pixel then
// gathers from the list of its row, so no two threads add to one pixel and the result is
// deterministic.
//
// With respect to centers and scale [B, N, 2]: the threads of a block divide windows as in the
// forward pass. Each thread sums the gradient times the spatial derivative of the image over its
// samples, and the sums of a window are added in a tree.

#include "windows.cuh"

namespace srt::cuda {
namespace {

// ---- the lists of rows --------------------------------------------------------------------------

// An entry of the lists: row `row` of the samples of a window reads row y of the pixels with
// `weight`.
template <class Acc>
struct alignas(sizeof(Acc) * 4) Line {
  int32_t window, row, y;
  Acc weight;
};

// The columns of pixels that a window reads.
struct Span {
  int32_t low, high;  // no pixels outside of [low, high] are read
  int32_t first;      // the pixel at or left of the first sample, if `inverse` is not 0
  float inverse;      // 1 / scale; 0 if the samples that read a pixel cannot be computed
};

template <class Acc>
struct Lists {
  int32_t chunks;    // chunks of the lines of an image; lines are counted and placed by chunk
  int32_t chunk;     // lines of a chunk
  int32_t* ends;     // [B, H, chunks]; counts of lines, then the end of each list in `lines`
  Line<Acc>* lines;  // [2 * B * N * Ph], sorted by rows of pixels
  SampleTaps<Acc>* columns;  // [B, N, Pw]
  Span* spans;               // [B, N]

  Lists(const WindowsArgs& args, Workspace& space) {
    constexpr int64_t kLeast = 256, kMost = 128;  // lines per chunk, chunks of all images
    const int64_t windows = args.batch * args.count, lines = args.count * args.size[0];
    const int64_t most = std::max<int64_t>(1, kMost / args.batch);
    chunks = static_cast<int32_t>(std::clamp<int64_t>(div_up(lines, kLeast), 1, most));
    chunk = static_cast<int32_t>(div_up(lines, chunks));
    ends = space.take<int32_t>(args.batch * args.height * chunks);
    this->lines = space.take<Line<Acc>>(2 * windows * args.size[0]);
    columns = space.take<SampleTaps<Acc>>(windows * args.size[1]);
    spans = space.take<Span>(windows);
  }
  __device__ int64_t counters(const WindowsPlan& plan, int64_t images) const {
    return images * plan.pixels[0] * chunks;
  }
};

__device__ Span span_of(const WindowsPlan& plan, const InlineArrays& parameters, int32_t window) {
  const double center = plan.center(parameters, window, 1), step = plan.step(parameters, window, 1);
  const int32_t samples = plan.size[1], width = plan.pixels[1];
  if (!window_is_valid(center, step)) return {width, -1, 0, 0};
  const auto tap = [&](int32_t i) { return window_tap(window_position(center, step, i, samples)); };
  const WindowTap first = tap(0), last = tap(samples - 1);
  const WindowTap &low = step < 0 ? last : first, &high = step < 0 ? first : last;
  const int64_t begin = low.first, end = high.first + (high.fraction > 0);
  const bool inside = begin >= 0 && end < width;
  if (!inside && (plan.padding == Padding::reflect || plan.padding == Padding::circular))
    return {0, width - 1, 0, 0};
  const auto clamped = [&](int64_t x) {
    return static_cast<int32_t>(max(int64_t{0}, min(x, int64_t{width} - 1)));
  };
  // Outside of the image, the first pixel may not fit 32 bits; the inverse of a tiny scale is
  // useless.
  const bool fits = first.first == static_cast<int32_t>(first.first) && fabs(step) > 0x1p-20;
  return {clamped(begin), clamped(end), static_cast<int32_t>(first.first),
          fits ? static_cast<float>(1 / step) : 0.0f};
}

// Clears the counters and computes the spans and the taps along x of all windows.
template <class Acc>
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(const __grid_constant__ WindowsPlan plan,
                   const __grid_constant__ InlineArrays parameters, int64_t images,
                   const __grid_constant__ Lists<Acc> lists) {
  SRT_FOR_THREAD(i, lists.counters(plan, images)) { lists.ends[i] = 0; }
  SRT_FOR_THREAD(i, plan.windows) {
    lists.spans[i] = span_of(plan, parameters, static_cast<int32_t>(i));
  }
  SRT_FOR_THREAD(i, int64_t{plan.windows} * plan.size[1]) {
    const int64_t window = i / plan.size[1];
    lists.columns[i] = plan.taps<Acc>(parameters, static_cast<int32_t>(window), 1,
                                      static_cast<int32_t>(i - window * plan.size[1]));
  }
}

// The index of the counter for line i of image b and the row of pixels y.
template <class Acc>
__device__ int64_t counter(const WindowsPlan& plan, const Lists<Acc>& lists, int32_t b, int32_t i,
                           int32_t y) {
  return (int64_t{b} * plan.pixels[0] + y) * lists.chunks + i / lists.chunk;
}

// Counts the lines of each row of pixels, by chunk.
template <class Acc>
__global__ void __launch_bounds__(kThreads)
    count_kernel(const __grid_constant__ WindowsPlan plan,
                 const __grid_constant__ InlineArrays parameters,
                 const __grid_constant__ Lists<Acc> lists) {
  const int32_t rows = plan.size[0];
  SRT_FOR_THREAD(line, int64_t{plan.windows} * rows) {
    const int32_t window = static_cast<int32_t>(line / rows), b = window / plan.count;
    const int32_t i = static_cast<int32_t>(line - int64_t{b} * plan.count * rows);
    const auto taps = plan.taps<Acc>(parameters, window, 0, i % rows);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (taps.weight[k] != 0 && taps.at[k] >= 0)
        atomicAdd(lists.ends + counter(plan, lists, b, i, taps.at[k]), 1);
    }
  }
}

// Replaces counts by their exclusive prefix sums. Launched with one block.
static __global__ void __launch_bounds__(kThreads) sum_kernel(int64_t n, int32_t* counts) {
  const int64_t share = div_up(n, kThreads);
  const int64_t begin = min(n, threadIdx.x * share), end = min(n, begin + share);
  int32_t own = 0, total = 0;
#pragma unroll 8
  for (int64_t i = begin; i < end; ++i) own += counts[i];
  int32_t before = exclusive_sum(own, total);
#pragma unroll 8
  for (int64_t i = begin; i < end; ++i) {
    const int32_t count = counts[i];
    counts[i] = before;
    before += count;
  }
}

// Places the lines of a chunk into the lists. A block processes one chunk, in batches of one thread
// per tap. Within a batch, the position of a line is the number of lines of the same list before
// it, so it does not depend on timing.
template <class Acc>
__global__ void __launch_bounds__(kThreads)
    place_kernel(const __grid_constant__ WindowsPlan plan,
                 const __grid_constant__ InlineArrays parameters, int64_t images,
                 const __grid_constant__ Lists<Acc> lists) {
  __shared__ int32_t pixels[kThreads];
  const int32_t rows = plan.size[0], thread = static_cast<int32_t>(threadIdx.x);
  SRT_FOR_BLOCK(work, images * lists.chunks) {
    const int32_t b = static_cast<int32_t>(work / lists.chunks);
    const int32_t begin = static_cast<int32_t>(work % lists.chunks) * lists.chunk;
    const int32_t end = min(begin + lists.chunk, plan.count * rows);
    for (int32_t batch = begin; batch < end; batch += kThreads / 2) {
      const int32_t i = batch + thread / 2, window = b * plan.count + i / rows;
      int32_t y = -1;
      Acc weight = 0;
      if (i < end) {
        const auto taps = plan.taps<Acc>(parameters, window, 0, i % rows);
        weight = thread % 2 ? taps.weight[1] : taps.weight[0];
        if (weight != 0) y = thread % 2 ? taps.at[1] : taps.at[0];
      }
      pixels[thread] = y;
      __syncthreads();
      int32_t before = 0, after = 0;
      for (int32_t u = 0; u < kThreads; ++u) {
        if (pixels[u] == y) ++(u < thread ? before : after);
      }
      int32_t* const at = y < 0 ? nullptr : lists.ends + counter(plan, lists, b, i, y);
      const int32_t slot = at ? *at + before : 0;
      if (at) lists.lines[slot] = {window, i % rows, y, weight};
      __syncthreads();
      if (at && after == 1) *at = slot + 1;  // the last one of its list (`after` includes itself)
      __syncthreads();
    }
  }
}

// ---- the gradient of the image ------------------------------------------------------------------

struct GradPlan {
  const void* grad;  // [B, N, C, Ph, Pw]
  int64_t images;
  void* out;  // [B, C, H, W]
};

// Returns the number of earlier threads of the block for which `wanted` is true, and adds the
// number of all such threads to `total`. Called by a whole block.
__device__ inline int place_among(bool wanted, int& total) {
  __shared__ uint32_t votes[kWarps];
  const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  const uint32_t own = __ballot_sync(0xffffffffu, wanted);
  if (lane == 0) votes[warp] = own;
  __syncthreads();
  int before = __popc(own & ((1u << lane) - 1));
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const int number = __popc(votes[w]);
    if (w < warp) before += number;
    total += number;
  }
  __syncthreads();
  return before;
}

// The range of the lines of `rows` rows of pixels, starting at `row`, numbered through all images.
template <class Acc>
struct Range {
  int32_t begin, end;
  __device__ Range(const Lists<Acc>& lists, int64_t row, int32_t rows) {
    begin = row == 0 ? 0 : load(lists.ends + row * lists.chunks - 1);
    end = load(lists.ends + (row + rows) * lists.chunks - 1);
  }
};

constexpr int kResident = 4;  // resident blocks per multiprocessor
constexpr int kChannels = 4;  // per thread, which processes one column
constexpr int kRows = 4;      // per block, processed in sequence

// A line that a tile reads, in shared memory.
template <class Acc>
struct Staged {
  Line<Acc> line;
  Span span;
};

// Calls visit(j, weight) for the samples j of a line that read pixel x. The candidates are computed
// from the scale, except at the ends of a row: there, samples in the padding can read the pixel,
// too.
template <class Acc, class Visit>
__device__ void visit_samples(const WindowsPlan& plan, const SampleTaps<Acc>* columns,
                              const Span& span, int32_t x, Visit&& visit) {
  int32_t begin = 0, end = plan.size[1];
  if (span.inverse != 0 && x != 0 && x != plan.pixels[1] - 1) {
    // Sample j is left of first + 1 + j / inverse and within one pixel of x. `slack` covers the
    // rounding errors of 2 ulp.
    const float distance = static_cast<float>(int64_t{x} - span.first);
    const float from = (distance - 2) * span.inverse, to = (distance + 1) * span.inverse;
    const float slack = 0x1p-20f * (1 + max(fabsf(from), fabsf(to)));
    const float most = static_cast<float>(end);
    begin = static_cast<int32_t>(max(0.0f, min(floorf(min(from, to) - slack) + 1, most)));
    end = static_cast<int32_t>(max(0.0f, min(ceilf(max(from, to) + slack), most)));
  }
#pragma unroll 2
  for (int32_t j = begin; j < end; ++j) {
    const SampleTaps<Acc> taps = load(columns + j);
    const Acc weight =
        (taps.at[0] == x ? taps.weight[0] : Acc{0}) + (taps.at[1] == x ? taps.weight[1] : Acc{0});
    if (weight != 0) visit(j, weight);
  }
}

// The pixel that a thread computes: its column in the current row, kChannels channels.
template <class T, class Acc>
struct Pixel {
  int32_t x;
  int channels;  // 0 beyond the image
  int64_t plane, width;
  T* to;
  Acc sum[kChannels] = {};

  __device__ void write_and_go_down() {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      if (c < channels) store(to + c * plane, from_acc<T>(sum[c]), /*keep_in_l2=*/true);
      sum[c] = 0;
    }
    to += width;
  }

  // Adds a line. `grad` points to its first sample and channel.
  __device__ void add(const WindowsPlan& plan, const Staged<Acc>& staged,
                      const SampleTaps<Acc>* columns, const T* grad) {
    Acc line[kChannels] = {};
    visit_samples(plan, columns, staged.span, x, [&](int32_t j, Acc weight) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        if (c < channels) line[c] += weight * to_acc(load(grad + c * plan.area() + j));
      }
    });
#pragma unroll
    for (int c = 0; c < kChannels; ++c) sum[c] += staged.line.weight * line[c];
  }
};

// Computes the gradient of the images. A block computes a tile of kRows rows. Each thread processes
// one column and goes down its pixels, because the lines are sorted by rows.
template <class T, class Acc>
__global__ void __launch_bounds__(kThreads, kResident)
    gather_windows_kernel(const __grid_constant__ WindowsPlan plan,
                          const __grid_constant__ Lists<Acc> lists,
                          const __grid_constant__ GradPlan call) {
  __shared__ Staged<Acc> staged[kThreads];
  const int64_t chunks = div_up(plan.channels, kChannels);
  const int32_t tiles_x = static_cast<int32_t>(div_up(plan.pixels[1], kThreads));
  const int32_t tiles_y = static_cast<int32_t>(div_up(plan.pixels[0], kRows));
  const int thread = static_cast<int>(threadIdx.x);
  SRT_FOR_BLOCK(work, call.images * tiles_y * tiles_x * chunks) {
    int64_t b = work;
    const int64_t channel = int64_t{take_digit(b, chunks)} * kChannels;
    const int32_t x0 = take_digit(b, tiles_x) * kThreads, x = x0 + thread;
    int32_t y = take_digit(b, tiles_y) * kRows;
    const int32_t end_y = min(y + kRows, plan.pixels[0]);
    const Range<Acc> range(lists, b * plan.pixels[0] + y, end_y - y);
    const int64_t plane = int64_t{plan.pixels[0]} * plan.pixels[1];
    Pixel<T, Acc> pixel{x, 0, plane, plan.pixels[1], nullptr};
    if (x < plan.pixels[1]) {
      pixel.channels = static_cast<int>(min(plan.channels - channel, int64_t{kChannels}));
      pixel.to = static_cast<T*>(call.out) + (b * plan.channels + channel) * plane +
                 int64_t{y} * plan.pixels[1] + x;
    }
    for (int32_t begin = range.begin; begin < range.end; begin += kThreads) {
      Staged<Acc> read{};
      bool wanted = false;
      if (begin + thread < range.end) {
        read.line = load(lists.lines + begin + thread);
        read.span = load(lists.spans + read.line.window);
        wanted = read.span.low < x0 + kThreads && read.span.high >= x0;
      }
      int number = 0;
      const int at = place_among(wanted, number);
      if (wanted) staged[at] = read;
      __syncthreads();
      for (int k = 0; k < number; ++k) {
        const Line<Acc>& line = staged[k].line;
        for (; y < line.y; ++y) pixel.write_and_go_down();
        if (x < staged[k].span.low || x > staged[k].span.high) continue;
        const T* const grad = static_cast<const T*>(call.grad) +
                              (line.window * plan.channels + channel) * plan.area() +
                              int64_t{line.row} * plan.size[1];
        pixel.add(plan, staged[k], lists.columns + int64_t{line.window} * plan.size[1], grad);
      }
      __syncthreads();  // before the next lines overwrite these
    }
    for (; y < end_y; ++y) pixel.write_and_go_down();
  }
}

// The same for windows of one sample (points). A block computes kPixels pixels of a row. Each warp
// adds the gradients of the points, one after the other, to sums in shared memory; each lane
// processes its own channels.
constexpr int kPixels = 16;
template <class Acc>
constexpr int kOwnChannels = sizeof(Acc) == sizeof(double) ? 1 : 2;  // per lane
constexpr int kInFlight = 4;  // gradients that a lane loads before it uses the first one

template <class Acc>
struct Point {
  int32_t window;
  int32_t at[2];  // pixels of the tile, or -1
  Acc weight[2];
};

// Adds points to the sums [kPixels, pitch] of the channels of this lane. `grad` points to window 0.
template <class T, int kOwn, class Acc>
__device__ void add_points(const Point<Acc>* points, int number, const T* grad, int64_t channels,
                           Acc* sums, int pitch) {
  for (int first = 0; first < number; first += kInFlight) {
    Pack<T, kOwn> value[kInFlight];
#pragma unroll
    for (int p = 0; p < kInFlight; ++p)
      value[p] = load_pack<T, kOwn>(grad + points[min(first + p, number - 1)].window * channels);
#pragma unroll
    for (int p = 0; p < kInFlight; ++p) {
      if (first + p >= number) break;
      const Point<Acc>& point = points[first + p];
      const Pack<Acc, kOwn> added = to_acc(value[p]);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        if (point.at[k] < 0) continue;
        auto* const sum = reinterpret_cast<Pack<Acc, kOwn>*>(sums + point.at[k] * pitch);
        Pack<Acc, kOwn> next = *sum;
#pragma unroll
        for (int e = 0; e < kOwn; ++e) next.at[e] += point.weight[k] * added.at[e];
        *sum = next;
      }
    }
  }
}

template <class T, int kOwn, class Acc>
__global__ void __launch_bounds__(kThreads, kResident)
    gather_points_kernel(const __grid_constant__ WindowsPlan plan,
                         const __grid_constant__ Lists<Acc> lists,
                         const __grid_constant__ GradPlan call) {
  constexpr int kOfWarp = kWarpThreads * kOwn, kPitch = kOfWarp + kOwn;  // avoids bank conflicts
  alignas(kVectorBytes) __shared__ Acc sums[kWarps][kPixels * kPitch];
  __shared__ Point<Acc> points[kThreads];
  const int64_t tiles = div_up(plan.pixels[1], kPixels);
  const int64_t chunks = div_up(plan.channels, kWarps * kOfWarp);
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarpThreads, lane = thread % kWarpThreads;
  SRT_FOR_BLOCK(work, call.images * plan.pixels[0] * tiles * chunks) {
    int64_t row = work;
    const int64_t of_block = int64_t{take_digit(row, chunks)} * kWarps;
    const int64_t of_warp = (of_block + warp) * kOfWarp;  // the first channel of the warp
    const int64_t channel = of_warp + lane * kOwn;
    const int32_t x0 = take_digit(row, tiles) * kPixels;
    const Range<Acc> range(lists, row, 1);
    for (int i = lane; i < kPixels * kPitch; i += kWarpThreads) sums[warp][i] = 0;
    for (int32_t begin = range.begin; begin < range.end; begin += kThreads) {
      Point<Acc> own{0, {-1, -1}, {0, 0}};
      if (begin + thread < range.end) {
        const Line<Acc> line = load(lists.lines + begin + thread);
        const SampleTaps<Acc> taps = load(lists.columns + line.window);
        own.window = line.window;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          own.weight[k] = line.weight * taps.weight[k];
          const bool inside = taps.at[k] >= x0 && taps.at[k] < x0 + kPixels;
          if (inside && taps.weight[k] != 0) own.at[k] = taps.at[k] - x0;
        }
      }
      int number = 0;
      const bool wanted = own.at[0] >= 0 || own.at[1] >= 0;
      const int at = place_among(wanted, number);
      if (wanted) points[at] = own;
      __syncthreads();
      if (channel < plan.channels)
        add_points<T, kOwn>(points, number, static_cast<const T*>(call.grad) + channel,
                            plan.channels, &sums[warp][lane * kOwn], kPitch);
      __syncthreads();  // before the next points overwrite these
    }
    __syncwarp();
    const int columns = min(kPixels, plan.pixels[1] - x0);
    const int64_t b = row / plan.pixels[0], y = row - b * plan.pixels[0];
    T* const out =
        static_cast<T*>(call.out) + (b * plan.channels * plan.pixels[0] + y) * plan.pixels[1] + x0;
    for (int i = lane; i < kPixels * kOfWarp; i += kWarpThreads) {
      const int x = i % kPixels, c = i / kPixels;
      if (x < columns && of_warp + c < plan.channels)
        store(out + (of_warp + c) * plan.pixels[0] * plan.pixels[1] + x,
              from_acc<T>(sums[warp][x * kPitch + c]), /*keep_in_l2=*/true);
    }
    __syncwarp();  // before the sums of the next tile overwrite these
  }
}

template <class T>
void gather(const WindowsCall& call, const WindowsPlan& plan,
            const Lists<typename AccumulatorOf<T>::type>& lists, const GradPlan& grad,
            CUstream_st* stream) {
  using Acc = typename AccumulatorOf<T>::type;
  const int64_t channels = call.args.channels;
  const auto run = [&](auto kernel, int64_t rows, int64_t columns, int64_t of_block) {
    const int64_t tiles = div_up(call.args.height, rows) * div_up(call.args.width, columns);
    launch(call.op, kernel, call.args.batch * tiles * div_up(channels, of_block), stream, plan,
           lists, grad);
  };
  if (plan.area() > 1) return run(gather_windows_kernel<T, Acc>, kRows, kThreads, kChannels);
  constexpr int kOwn = kOwnChannels<Acc>;
  const bool whole =
      channels % kOwn == 0 && reinterpret_cast<uintptr_t>(grad.grad) % (kOwn * sizeof(T)) == 0;
  if (whole) {
    run(gather_points_kernel<T, kOwn, Acc>, 1, kPixels, kThreads * kOwn);
  } else {
    run(gather_points_kernel<T, 1, Acc>, 1, kPixels, kThreads);
  }
}

// ---- the gradients of the centers and of the scale ----------------------------------------------

// Computes slope[axis], the derivative of one sample with respect to its position times its
// gradient, summed over the channels of a thread.
template <class T, int kPack, class Acc>
__device__ void differentiate(const ImagePlan& image, const SampleTaps<Acc>& y,
                              const SampleTaps<Acc>& x, int32_t b, int64_t begin, int64_t packs,
                              int lanes, const T* grad, int64_t area, Acc (&slope)[2]) {
  // The difference of two pixels along one axis is used if the weight along the other axis is not
  // 0.
  const Corners<T> corners(image, b, y, x,
                           [&](int i, int j) { return (y.weight[i] != 0) | (x.weight[j] != 0); });
  slope[0] = slope[1] = 0;
#pragma unroll(kPack == 1 ? 2 : 1)
  for (int64_t pack = begin; pack < packs; pack += lanes) {
    const int64_t channel = pack * kPack;
    const Pack<Acc, kPack> of_sample = to_acc(load_pack<T, kPack>(grad + channel * area));
    Pack<Acc, kPack> value[2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j)
        value[i][j] = to_acc(corners.template value<kPack>(i, j, channel));
    }
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      Acc along[2] = {};
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        if (x.weight[k] != 0) along[0] += x.weight[k] * (value[1][k].at[e] - value[0][k].at[e]);
        if (y.weight[k] != 0) along[1] += y.weight[k] * (value[k][1].at[e] - value[k][0].at[e]);
      }
#pragma unroll
      for (int axis = 0; axis < 2; ++axis) slope[axis] += of_sample.at[e] * along[axis];
    }
  }
}

// out[0] is the gradient of the centers, out[1] the gradient of the scale, both in float64.
struct PointsPlan {
  ImagePlan image;
  const void* grad;  // [B, N, C, Ph, Pw]
  double* out[2];    // [B, N, 2] each
};

constexpr int kSums = 4;  // per window: two axes for the center, two for the scale

// Adds the sums of the threads of each window in a tree; the first thread of the window gets the
// total.
__device__ inline void add_up(double (*sums)[kThreads], int size, int rank) {
  const int thread = static_cast<int>(threadIdx.x);
  int reach = 1;
  while (reach < size) reach *= 2;
  for (reach /= 2; reach > 0; reach /= 2) {
    __syncthreads();
    if (rank < reach && rank + reach < size) {
#pragma unroll
      for (int s = 0; s < kSums; ++s) sums[s][thread] += sums[s][thread + reach];
    }
  }
}

// Computes the gradients of centers and scale. A block processes teams.windows windows at a time.
template <class T, int kPack>
__global__ void __launch_bounds__(kThreads, 2)
    windows_backward_points_kernel(const __grid_constant__ WindowsPlan plan,
                                   const __grid_constant__ Teams teams,
                                   const __grid_constant__ PointsPlan call,
                                   const __grid_constant__ InlineArrays parameters) {
  using Acc = typename AccumulatorOf<T>::type;
  __shared__ TapTable<Acc> table;
  __shared__ double sums[kSums][kThreads];
  const Member member(teams);
  const int thread = static_cast<int>(threadIdx.x);
  const int size = teams.tile[0] * teams.tile[1] * teams.lanes;
  SRT_FOR_BLOCK(group, div_up(plan.windows, teams.windows)) {
    const int32_t first = static_cast<int32_t>(group) * teams.windows;
    const int32_t window = first + member.window;
    const bool has_window = member.window < teams.windows && window < plan.windows;
    double own[kSums] = {};
    for (int32_t y0 = 0; y0 < plan.size[0]; y0 += teams.tile[0]) {
      for (int32_t x0 = 0; x0 < plan.size[1]; x0 += teams.tile[1]) {
        table.fill(plan, parameters, teams, first, y0, x0);
        __syncthreads();
        const int32_t sample[2] = {y0 + member.sample[0], x0 + member.sample[1]};
        if (has_window && sample[0] < plan.size[0] && sample[1] < plan.size[1]) {
          const T* const grad = static_cast<const T*>(call.grad) +
                                window * plan.channels * plan.area() +
                                int64_t{sample[0]} * plan.size[1] + sample[1];
          Acc slope[2];
          differentiate<T, kPack>(call.image, table.of(teams, member, 0),
                                  table.of(teams, member, 1), window / plan.count, member.lane,
                                  teams.packs, teams.lanes, grad, plan.area(), slope);
#pragma unroll
          for (int axis = 0; axis < 2; ++axis) {
            own[axis] += slope[axis];
            own[2 + axis] += slope[axis] * (sample[axis] - 0.5 * (plan.size[axis] - 1));
          }
        }
        __syncthreads();  // before the taps of the next tile overwrite these
      }
    }
#pragma unroll
    for (int s = 0; s < kSums; ++s) sums[s][thread] = own[s];
    add_up(sums, size, thread % size);
    if (has_window && thread % size == 0) {
      // An invalid window is set to 0 explicitly: its sums are 0 times the gradient, which may be
      // NaN.
      const bool valid = plan.is_valid(parameters, window);
#pragma unroll
      for (int s = 0; s < kSums; ++s)
        store(call.out[s / 2] + int64_t{2} * window + s % 2, valid ? sums[s][thread] : 0.0,
              /*keep_in_l2=*/true);
    }
    __syncthreads();  // before the sums of the next windows overwrite these
  }
}

constexpr char kImageOp[] = "_windows_backward_image";
constexpr char kPointsOp[] = "_windows_backward_points";

// Throws if there are too many lines: each reads two rows of pixels, and the entries are counted in
// 32 bits.
void check_lines(const WindowsArgs& args) {
  constexpr int64_t kMost = int64_t{1} << 29;
  const int64_t lines = args.batch * args.count * args.size[0];
  if (lines > kMost)
    throw Error("srt::" + std::string(kImageOp) +
                ": on CUDA B * N * Ph must be at most 2^29; got " + std::to_string(lines));
}

}  // namespace
}  // namespace srt::cuda

namespace srt {

int64_t windows_backward_image_cuda_workspace(const WindowsArgs& args, const ViewArray& centers,
                                              const ViewArray& scale) {
  using namespace cuda;
  if (args.batch == 0 || args.channels == 0) return 0;
  check_lines(args);
  Workspace space(nullptr);
  InlineArrays parameters;
  WindowsCall{kImageOp, args, centers, scale}.plan(space, /*run=*/false, nullptr, parameters);
  dispatch_floating(args.dtype, [&](auto element) {
    Lists<typename AccumulatorOf<decltype(element)>::type>(args, space);
  });
  return space.bytes();
}

void windows_backward_image_cuda(const WindowsArgs& args, const ViewArray& centers,
                                 const ViewArray& scale, void* grad_image, void* workspace,
                                 CUstream_st* stream) {
  using namespace cuda;
  if (args.batch == 0 || args.channels == 0) return;
  const WindowsCall call{kImageOp, args, centers, scale};
  Workspace space(workspace);
  InlineArrays parameters;
  const WindowsPlan plan = call.plan(space, /*run=*/true, stream, parameters);
  dispatch_floating(args.dtype, [&](auto element) {
    using T = decltype(element);
    using Acc = typename AccumulatorOf<T>::type;
    const Lists<Acc> lists(args, space);
    const int64_t counters = args.batch * args.height * lists.chunks;
    const int64_t lines = call.windows() * args.size[0];
    const int64_t most = std::max({counters, lines, call.windows() * args.size[1]});
    launch(kImageOp, prepare_kernel<Acc>, div_up(most, kThreads), stream, plan, parameters,
           args.batch, lists);
    if (lines > 0)
      launch(kImageOp, count_kernel<Acc>, div_up(lines, kThreads), stream, plan, parameters, lists);
    launch(kImageOp, sum_kernel, 1, stream, counters, lists.ends);
    if (lines > 0)
      launch(kImageOp, place_kernel<Acc>, args.batch * lists.chunks, stream, plan, parameters,
             args.batch, lists);
    gather<T>(call, plan, lists, GradPlan{args.out, args.batch, grad_image}, stream);
  });
}

int64_t windows_backward_points_cuda_workspace(const WindowsArgs& args, const ViewArray& centers,
                                               const ViewArray& scale) {
  using namespace cuda;
  Workspace space(nullptr);
  InlineArrays parameters;
  WindowsCall{kPointsOp, args, centers, scale}.plan(space, /*run=*/false, nullptr, parameters);
  return space.bytes();
}

void windows_backward_points_cuda(const WindowsArgs& args, const ViewArray& centers,
                                  const ViewArray& scale, double* grad_centers, double* grad_scale,
                                  void* workspace, CUstream_st* stream) {
  using namespace cuda;
  const WindowsCall call{kPointsOp, args, centers, scale};
  if (call.windows() == 0) return;
  Workspace space(workspace);
  InlineArrays parameters;
  const WindowsPlan plan = call.plan(space, /*run=*/true, stream, parameters);
  const PointsPlan points{image_plan(args), args.out, {grad_centers, grad_scale}};
  dispatch_floating(args.dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = [&](auto kernel, int64_t packs) {
      const Teams teams(args, packs);
      launch(kPointsOp, kernel, div_up(call.windows(), teams.windows), stream, plan, teams, points,
             parameters);
    };
    if (has_vectors<T>(args)) {
      run(windows_backward_points_kernel<T, kVectorOf<T>>, args.channels / kVectorOf<T>);
    } else {
      run(windows_backward_points_kernel<T, 1>, args.channels);
    }
  });
}

}  // namespace srt
