// Code that windows and its gradients share: the plan of a call, the taps of a sample, and the
// division of the samples of windows among the threads of a block.
#pragma once
#include "../windows.h"
#include "common.cuh"

namespace srt::cuda {

// The two taps of a sample along one axis: pixel at[k] with weight[k]. -1 is a padded zero. A tap
// of weight 0 is not part of the sum and must not be read, except by derivatives.
template <class Acc>
struct alignas(kVectorBytes) SampleTaps {
  int32_t at[2];
  Acc weight[2];
};

// Not inlined: only a few threads of a block call it, once.
__device__ __noinline__ inline int32_t padded_pixel(int64_t i, int32_t n, Padding padding) {
  return static_cast<int32_t>(pad_index(i, n, padding));
}

// The plan of one call. Axes are in the order y, x.
struct WindowsPlan {
  int32_t windows;    // B * N
  int32_t count;      // N
  int32_t size[2];    // samples of a window, (Ph, Pw)
  int32_t pixels[2];  // pixels of an image, (H, W)
  int64_t channels;
  DeviceArray centers;  // [B, N, 2], pixels
  DeviceArray scale;    // [B, N, 2] or [2], pixels per sample
  bool scaled, scale_of_each;
  Padding padding;

  SRT_HD int64_t area() const { return int64_t{size[0]} * size[1]; }
  __device__ double center(const InlineArrays& parameters, int32_t window, int axis) const {
    return centers.value(parameters, int64_t{2} * window + axis);
  }
  __device__ double step(const InlineArrays& parameters, int32_t window, int axis) const {
    if (!scaled) return 1;
    return scale.value(parameters, scale_of_each ? int64_t{2} * window + axis : axis);
  }

  // Whether the values of a window are valid.
  __device__ bool is_valid(const InlineArrays& parameters, int32_t window) const {
    return window_is_valid(center(parameters, window, 0), step(parameters, window, 0)) &&
           window_is_valid(center(parameters, window, 1), step(parameters, window, 1));
  }

  // The taps of sample i of a window along an axis; none if the values of the axis are invalid.
  template <class Acc>
  __device__ SampleTaps<Acc> taps(const InlineArrays& parameters, int32_t window, int axis,
                                  int32_t i) const {
    const double from = center(parameters, window, axis), by = step(parameters, window, axis);
    if (!window_is_valid(from, by)) return {{-1, -1}, {0, 0}};
    const WindowTap tap = window_tap(window_position(from, by, i, size[axis]));
    SampleTaps<Acc> taps;
#pragma unroll
    for (int k = 0; k < 2; ++k) taps.at[k] = padded_pixel(tap.first + k, pixels[axis], padding);
    taps.weight[0] = static_cast<Acc>(1 - tap.fraction);
    taps.weight[1] = static_cast<Acc>(tap.fraction);
    return taps;
  }
};

// One call of windows or of one of its gradients.
struct WindowsCall {
  const char* op;
  const WindowsArgs& args;
  const ViewArray &centers, &scale;

  int64_t windows() const { return args.batch * args.count; }
  int64_t center_values() const { return 2 * windows(); }
  int64_t scale_values() const {
    return !scale.host && !scale.device ? 0 : args.scale_of_each ? 2 * windows() : 2;
  }
  // Whether the values on the host fit the parameters of a kernel.
  bool fits() const {
    return (centers.host ? center_values() : 0) + (scale.host ? scale_values() : 0) <=
           kInlineDoubles;
  }

  // Makes the plan. Values on the host that do not fit the parameters are copied to pieces of the
  // workspace. Without `run`, only the size of the workspace is counted.
  WindowsPlan plan(Workspace& workspace, bool run, CUstream_st* stream,
                   InlineArrays& parameters) const {
    double* const new_centers =
        centers.host && !fits() ? workspace.take<double>(center_values()) : nullptr;
    double* const new_scale =
        scale.host && !fits() ? workspace.take<double>(scale_values()) : nullptr;
    WindowsPlan plan{};
    plan.windows = static_cast<int32_t>(windows());
    plan.count = static_cast<int32_t>(args.count);
    const int64_t pixels[2] = {args.height, args.width};
    for (int axis = 0; axis < 2; ++axis) {
      plan.size[axis] = static_cast<int32_t>(args.size[axis]);
      plan.pixels[axis] = static_cast<int32_t>(pixels[axis]);
    }
    plan.channels = args.channels;
    plan.scaled = scale_values() > 0;
    plan.scale_of_each = args.scale_of_each;
    plan.padding = args.padding;
    parameters = {};
    if (!run) return plan;
    plan.centers =
        place_array(op, centers, center_values(), fits(), parameters, 0, new_centers, stream);
    plan.scale = place_array(op, scale, scale_values(), fits(), parameters,
                             centers.host ? center_values() : 0, new_scale, stream);
    return plan;
  }
};

// Divides `rest` by n and returns the remainder. n is usually 1, and 64-bit division is slow.
__device__ inline int32_t take_digit(int64_t& rest, int64_t n) {
  if (n == 1) return 0;
  const int64_t whole = rest / n, digit = rest - whole * n;
  rest = whole;
  return static_cast<int32_t>(digit);
}

// ---- windows shared by the threads of a block ---------------------------------------------------

// Divides windows among the threads of a block. A block processes a tile of samples of one or
// several windows. Each sample has one thread, which loops over the channels; threads of a row of
// samples are neighbours. If a window is a single sample, it has several threads (lanes), which
// divide its channels or packs of channels; neighbouring lanes access neighbouring memory.
struct Teams {
  static constexpr int kMostLanes = 16;
  int32_t tile[2];  // samples of a tile
  int32_t lanes;    // threads per sample
  int32_t windows;  // windows per block
  int64_t packs;    // packs of channels

  Teams(const WindowsArgs& args, int64_t packs) : packs(packs) {
    tile[1] = even_part(args.size[1], kThreads);
    tile[0] = even_part(args.size[0], kThreads / tile[1]);
    const bool points = args.size[0] * args.size[1] == 1;
    lanes = points ? even_part(std::max<int64_t>(1, packs), kMostLanes) : 1;
    windows = kThreads / (tile[0] * tile[1] * lanes);
  }
  // The size of the parts if n is divided evenly into as few parts of at most `most` as possible.
  static int32_t even_part(int64_t n, int64_t most) {
    return static_cast<int32_t>(div_up(n, div_up(n, most)));
  }
};

// The place of a thread in its block.
struct Member {
  int window, sample[2], lane;  // window in the block, sample in the tile, lane of the sample

  __device__ explicit Member(const Teams& teams) {
    int rest = static_cast<int>(threadIdx.x);
    lane = rest % teams.lanes;
    rest /= teams.lanes;
    sample[1] = rest % teams.tile[1];
    rest /= teams.tile[1];
    sample[0] = rest % teams.tile[0];
    window = rest / teams.tile[0];  // >= teams.windows: the thread has no window
  }
};

// The taps of a tile in shared memory: for each window, the taps of its rows, then of its columns.
// Every sample has a thread, so there are at most two taps per thread.
template <class Acc>
struct TapTable {
  SampleTaps<Acc> taps[2 * kThreads];

  // Fills the taps of the tile that begins at sample (y, x), for the windows starting at `first`.
  // Called by a whole block.
  __device__ void fill(const WindowsPlan& plan, const InlineArrays& parameters, const Teams& teams,
                       int32_t first, int32_t y, int32_t x) {
    const int rows = teams.tile[0], of_window = rows + teams.tile[1];
    for (int i = static_cast<int>(threadIdx.x); i < teams.windows * of_window; i += kThreads) {
      const int32_t window = first + i / of_window;
      const int place = i % of_window, axis = place < rows ? 0 : 1;
      const int32_t sample = axis == 0 ? y + place : x + place - rows;
      if (window < plan.windows && sample < plan.size[axis])
        taps[i] = plan.taps<Acc>(parameters, window, axis, sample);
    }
  }
  __device__ const SampleTaps<Acc>& of(const Teams& teams, const Member& member, int axis) const {
    return taps[member.window * (teams.tile[0] + teams.tile[1]) +
                (axis == 0 ? member.sample[0] : teams.tile[0] + member.sample[1])];
  }
};

template <class T, int kPack>
__device__ inline Pack<T, kPack> load_pack(const T* from) {
  return load(reinterpret_cast<const Pack<T, kPack>*>(from));
}

// The images that are read.
struct ImagePlan {
  const void* data;
  int64_t strides[4];  // of B, C, H and W, in elements
};

// The addresses of the four pixels that a sample reads.
template <class T>
struct Corners {
  const T* pixel[2][2];  // null if the pixel is not read
  int64_t step;          // to the next channel

  // reads(i, j) returns whether the sample needs a pixel. Written without branches.
  template <class Acc, class Reads>
  __device__ Corners(const ImagePlan& image, int32_t b, const SampleTaps<Acc>& y,
                     const SampleTaps<Acc>& x, Reads&& reads)
      : step(image.strides[1]) {
    const T* const origin = static_cast<const T*>(image.data) + b * image.strides[0];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = y.at[i] * image.strides[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const bool exists = (y.at[i] >= 0) & (x.at[j] >= 0);
        const T* const from = origin + row + x.at[j] * image.strides[3];
        pixel[i][j] = exists & reads(i, j) ? from : nullptr;
      }
    }
  }

  // Loads kPack channels of a pixel, starting at `channel`; 0 if it is not read. Loaded as one
  // word, because the compiler would otherwise select between value and 0 element by element.
  template <int kPack>
  __device__ Pack<T, kPack> value(int i, int j, int64_t channel) const {
    using Word = WordOf<sizeof(T) * kPack>;
    Word word{};
    if (pixel[i][j]) word = load(reinterpret_cast<const Word*>(pixel[i][j] + channel * step));
    Pack<T, kPack> pack;
    memcpy(&pack, &word, sizeof(pack));
    return pack;
  }
};

inline ImagePlan image_plan(const WindowsArgs& args) {
  ImagePlan image{args.image, {}};
  std::copy_n(args.image_strides, 4, image.strides);
  return image;
}

// Channels of a vector. More than 8 values would need too many registers; images of bytes have few
// channels.
template <class T>
constexpr int kVectorOf = sizeof(T) == 1 ? 4 : kVectorBytes / static_cast<int>(sizeof(T));

// Whether channels can be accessed as vectors: windows are single samples, and the channels of a
// pixel and of a window are dense, aligned and a multiple of the vector size.
template <class T>
bool has_vectors(const WindowsArgs& args) {
  const int64_t sizes[4] = {args.batch, args.channels, args.height, args.width};
  bool whole = args.size[0] * args.size[1] == 1 && args.image_strides[1] == 1;
  for (int d = 0; d < 4; ++d) {
    const int64_t step = d == 1 ? args.channels : args.image_strides[d];
    whole = whole && ((d != 1 && sizes[d] == 1) || step % kVectorOf<T> == 0);
  }
  for (const void* data : {args.image, static_cast<const void*>(args.out)})
    whole = whole && reinterpret_cast<uintptr_t>(data) % (kVectorOf<T> * sizeof(T)) == 0;
  return whole;
}

}  // namespace srt::cuda
