#include "../shift.h"
#include "device.cuh"

namespace srt::cuda {
namespace {

// A block writes a tile of one view of one plane, each warp one row of at most 256 pixels.
constexpr int kTileRows = kThreads / kWarpThreads;
constexpr int kTileColumns = 256;
constexpr int kMaxTaps = 4;

struct ShiftPlan {
  const void* image;              // [planes, height, width]
  int64_t planes, height, width;  // pixels
  int64_t views;
  DeviceNumbers offsets;  // [V, 2] (dy, dx), pixels
  Padding padding;
  Interpolation interpolation;
  bool aligned;  // every row of `out` starts at a multiple of 16 bytes
  void* out;     // [V, planes, height, width]
};

// out[i] = sum over k < taps of weight[k] * line[i + k]. A pack is read in whole vectors.
template <class T, class Line, int N>
__device__ void filter_line(const Line* line, int taps, const Line (&weight)[kMaxTaps],
                            T (&out)[N]) {
  constexpr int kReads = N + kMaxTaps - 1, kLanes = kVectorBytes / sizeof(Line);
  Pack<Line, kLanes> value[(kReads + kLanes - 1) / kLanes];
  if (N > 1) {
#pragma unroll
    for (int i = 0; i * kLanes < kReads; ++i)
      value[i] = *reinterpret_cast<const Pack<Line, kLanes>*>(line + i * kLanes);
  } else {
#pragma unroll
    for (int i = 0; i < kReads; ++i) value[i / kLanes].at[i % kLanes] = line[i];
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    Line sum = 0;
#pragma unroll
    for (int k = 0; k < kMaxTaps; ++k) {
      if (k < taps) sum += weight[k] * value[(i + k) / kLanes].at[(i + k) % kLanes];
    }
    out[i] = from_acc<T>(sum);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    shift_kernel(const __grid_constant__ ShiftPlan plan,
                 const __grid_constant__ InlineNumbers inline_offsets) {
  using Acc = typename AccumulatorOf<T>::type;
  constexpr int kPack = kVectorBytes / sizeof(T);
  // Whole vectors are read from a line: they may reach past its last position.
  constexpr int kLine = kTileColumns + kVectorBytes;
  alignas(kVectorBytes) __shared__ Acc lines[kTileRows][kLine];
  __shared__ ShiftTaps taps[2];
  const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  const int64_t tiles_y = div_up(plan.height, kTileRows),
                tiles_x = div_up(plan.width, kTileColumns);

  SRT_FOR_BLOCK(tile, plan.views * plan.planes * tiles_y * tiles_x) {
    const int64_t x0 = tile % tiles_x * kTileColumns;
    const int64_t y = tile / tiles_x % tiles_y * kTileRows + warp;
    const int64_t layer = tile / tiles_x / tiles_y;  // of the planes of all views
    // Of this warp's row; none for a row below the image.
    const int columns =
        y < plan.height ? static_cast<int>(min(plan.width - x0, int64_t{kTileColumns})) : 0;
    const T* image =
        static_cast<const T*>(plan.image) + layer % plan.planes * plan.height * plan.width;
    T* out = static_cast<T*>(plan.out) + (layer * plan.height + y) * plan.width + x0;

    if (threadIdx.x < 2) {
      const int64_t i = 2 * (layer / plan.planes) + threadIdx.x;
      const double offset = plan.offsets.data ? plan.offsets[i] : inline_offsets.at[i];
      taps[threadIdx.x].taps = 0;
      if (fabs(offset) <= static_cast<double>(kMaxOffset))
        taps[threadIdx.x] = shift_taps(offset, plan.interpolation);
    }
    __syncthreads();
    const bool nothing = taps[0].taps == 0 || taps[1].taps == 0;
    const bool copy = nothing || (taps[0].taps == 1 && taps[1].taps == 1);
    const int64_t first_x = taps[1].first + x0;
    const T* row[kMaxTaps];  // null for a padded zero
    Acc weight_y[kMaxTaps];
#pragma unroll
    for (int k = 0; k < kMaxTaps; ++k) {
      const int64_t source =
          k < taps[0].taps ? pad_index(taps[0].first + y + k, plan.height, plan.padding) : -1;
      row[k] = source < 0 || nothing ? nullptr : image + source * plan.width;
      weight_y[k] = static_cast<Acc>(taps[0].weight[k]);
    }

    if (copy) {
      // Whole pixels on both axes: bit for bit, so not through the accumulator.
      T* line = reinterpret_cast<T*>(lines[warp]);
      for (int x = lane; x < columns; x += kWarpThreads) {
        const int64_t source = pad_index(first_x + x, plan.width, plan.padding);
        T value{};
        if (row[0] && source >= 0) value = row[0][source];
        if (plan.aligned) {
          line[x] = value;
        } else {
          store(out + x, value);
        }
      }
      __syncthreads();
      if (plan.aligned) {
        for (int x = lane * kPack; x < columns; x += kWarpThreads * kPack)
          store(reinterpret_cast<Pack<T, kPack>*>(out + x),
                *reinterpret_cast<const Pack<T, kPack>*>(line + x));
      }
    } else {
      // The vertical taps first, into a line that already holds the horizontal padding.
      Acc* line = lines[warp];
      const int positions = columns == 0 ? 0 : columns + taps[1].taps - 1;
      for (int x = lane; x < positions; x += kWarpThreads) {
        const int64_t source = pad_index(first_x + x, plan.width, plan.padding);
        Acc sum = 0;
#pragma unroll
        for (int k = 0; k < kMaxTaps; ++k) {
          if (row[k] && source >= 0) sum += weight_y[k] * to_acc(row[k][source]);
        }
        line[x] = sum;
      }
      __syncthreads();
      Acc weight_x[kMaxTaps];
#pragma unroll
      for (int k = 0; k < kMaxTaps; ++k) weight_x[k] = static_cast<Acc>(taps[1].weight[k]);
      if (plan.aligned) {
        for (int x = lane * kPack; x < columns; x += kWarpThreads * kPack) {
          Pack<T, kPack> value;
          filter_line(line + x, taps[1].taps, weight_x, value.at);
          store(reinterpret_cast<Pack<T, kPack>*>(out + x), value);
        }
      } else {
        for (int x = lane; x < columns; x += kWarpThreads) {
          T value[1];
          filter_line(line + x, taps[1].taps, weight_x, value);
          store(out + x, value[0]);
        }
      }
    }
    __syncthreads();  // before the next tile overwrites the taps and the lines
  }
}

}  // namespace
}  // namespace srt::cuda

namespace srt {

int64_t shift_cuda_workspace(const ShiftArgs& args) {
  return 2 * args.views <= cuda::kInlineNumbers
             ? 0
             : 2 * args.views * static_cast<int64_t>(sizeof(double));
}

void shift_cuda(const ShiftArgs& args, const ViewNumbers& offsets, void* workspace,
                CUstream_st* stream) {
  using namespace cuda;
  if (args.planes == 0 || args.height == 0 || args.width == 0) return;
  const auto run = [&](auto kernel, int64_t element_size) {
    ShiftPlan plan{args.image,
                   args.planes,
                   args.height,
                   args.width,
                   args.views,
                   device_numbers(offsets),
                   args.padding,
                   args.interpolation,
                   args.width * element_size % kVectorBytes == 0 &&
                       reinterpret_cast<uintptr_t>(args.out) % kVectorBytes == 0,
                   args.out};
    InlineNumbers inline_offsets{};
    if (offsets.host && 2 * args.views <= kInlineNumbers) {
      std::copy_n(offsets.host, 2 * args.views, inline_offsets.at);
    } else if (offsets.host) {
      plan.offsets =
          upload("shift", offsets.host, 2 * args.views, static_cast<double*>(workspace), stream);
    }
    const int64_t tiles = div_up(args.height, kTileRows) * div_up(args.width, kTileColumns);
    launch("shift", kernel, args.views * args.planes * tiles, stream, plan, inline_offsets);
  };
  switch (args.dtype) {
    case DType::f32:
      return run(shift_kernel<float>, 4);
    case DType::f16:
      return run(shift_kernel<Half>, 2);
    case DType::bf16:
      return run(shift_kernel<BFloat16>, 2);
    case DType::f64:
      return run(shift_kernel<double>, 8);
    case DType::u8:
      return run(shift_kernel<uint8_t>, 1);
  }
}

}  // namespace srt
