// shift on the device: images [B*C, H, W] to views [V, B*C, H, W]. The views are V times larger
// than the images, so writing them determines the time. A warp computes a strip of a few rows: it
// reads each row once with coalesced loads, sums the taps along y in registers, passes the rows
// through shared memory for the taps along x, and writes 16 bytes per lane. Whole-pixel offsets
// skip the arithmetic and are copied bit for bit. Offsets are read on the device, so the call does
// not synchronise.
#include "../shift.h"
#include "common.cuh"

namespace srt::cuda {
namespace {

// A warp computes a strip of one view of one plane: a few rows of at most kColumns pixels. A lane
// reads every 32nd position of a row. The source columns of these positions, including the padding,
// are the same for all rows of the strip and are computed once.
constexpr int kColumns = 256;
constexpr int kPositions = kColumns / kWarpThreads;  // per lane
// Whole vectors are read from a line, so they can reach past its last position.
constexpr int kLine = kColumns + kVectorBytes;
template <class Acc>
constexpr int kRows = sizeof(Acc) == sizeof(double) ? 2 : 4;
constexpr int kResident = 2;  // resident blocks per multiprocessor

// The state that the warps of a block share. Their strips are stacked vertically.
template <class T>
struct Block {
  const T* image;     // the plane
  T* out;             // the plane of the view
  int32_t y, x;       // of the first pixel
  ShiftTaps taps[2];  // along y and x; no taps if the offset is invalid
};

// Locates the tile number `index`. Called by two threads, one for each axis.
template <int kTaps, class T>
__device__ void locate(const ShiftPlan& plan, const InlineArrays& inline_offsets, int64_t index,
                       int block_rows, int axis, Block<T>& block) {
  const int64_t tiles_y = div_up(plan.height, block_rows), tiles_x = div_up(plan.width, kColumns);
  const int64_t rows = index / tiles_x, layer = rows / tiles_y, view = layer / plan.planes;
  // Depends on kTaps so that the compiler omits the cubic weights from the kernel that does not
  // need them.
  const Interpolation interpolation = kTaps == 4 ? Interpolation::bicubic
                                      : plan.interpolation == Interpolation::nearest
                                          ? Interpolation::nearest
                                          : Interpolation::bilinear;
  block.taps[axis] = plan.taps(inline_offsets, 2 * view + axis, interpolation);
  if (axis != 0) return;
  const int64_t plane = plan.height * plan.width;
  block.image = static_cast<const T*>(plan.from) + (layer - view * plan.planes) * plane;
  block.out = static_cast<T*>(plan.out) + layer * plane;
  block.y = static_cast<int32_t>(rows - layer * tiles_y) * block_rows;
  block.x = static_cast<int32_t>(index - rows * tiles_x) * kColumns;
}

// Not inlined: few positions are padded, so one copy of the divisions is enough.
__device__ __noinline__ int32_t padded_index(int32_t i, int32_t n, Padding padding) {
  return static_cast<int32_t>(pad_index(i, n, padding));
}
__device__ inline int32_t source_index(int32_t i, int32_t n, Padding padding) {
  return static_cast<uint32_t>(i) < static_cast<uint32_t>(n) ? i : padded_index(i, n, padding);
}

// The strip of one warp.
template <class T>
struct Strip {
  using Acc = typename AccumulatorOf<T>::type;
  const ShiftPlan& plan;
  const T* image;
  T* out;  // at the first pixel of the strip
  int lane, rows, columns;
  int taps_y, taps_x;
  int32_t first_row;  // first image row that the strip reads; may be in the padding
  // Source columns of the positions lane + 32 i, plus one for the taps beyond the last column. -1
  // for a padded zero and for positions that do not exist.
  int32_t column[kPositions + 1];

  __device__ Strip(const ShiftPlan& plan, const Block<T>& block)
      : plan(plan), image(block.image), taps_y(block.taps[0].taps), taps_x(block.taps[1].taps) {
    const int32_t warp = static_cast<int32_t>(threadIdx.x) / kWarpThreads;
    const int32_t height = static_cast<int32_t>(plan.height), y = block.y + warp * kRows<Acc>;
    const int32_t width = static_cast<int32_t>(plan.width);
    lane = static_cast<int>(threadIdx.x) % kWarpThreads;
    out = block.out + y * plan.width + block.x;
    rows = max(0, min(height - y, kRows<Acc>));
    columns = min(width - block.x, kColumns);
    first_row = y + static_cast<int32_t>(block.taps[0].first);
    const int32_t first = block.x + static_cast<int32_t>(block.taps[1].first);
#pragma unroll
    for (int i = 0; i <= kPositions; ++i) {
      const int at = lane + i * kWarpThreads;
      column[i] = at < columns + taps_x - 1 ? source_index(first + at, width, plan.padding) : -1;
    }
  }

  // The i-th row that the strip reads; null for a padded zero.
  __device__ const T* row(int i) const {
    const int32_t height = static_cast<int32_t>(plan.height);
    const int32_t source = source_index(first_row + i, height, plan.padding);
    return source < 0 ? nullptr : image + source * plan.width;
  }

  // Writes the strip. make(from, to) computes the pixels `to` from the line that begins at `from`.
  template <class Line, class Make>
  __device__ void write(const Line (*lines)[kLine], Make&& make) const {
    if (plan.aligned) {
      write_packs<kVectorBytes / sizeof(T)>(lines, make);
    } else {
      write_packs<1>(lines, make);
    }
  }
  template <int kPack, class Line, class Make>
  __device__ void write_packs(const Line (*lines)[kLine], Make& make) const {
#pragma unroll
    for (int r = 0; r < kRows<Acc>; ++r) {
#pragma unroll
      for (int i = 0; i < div_up(kColumns, kWarpThreads * kPack); ++i) {
        const int x = (lane + i * kWarpThreads) * kPack;
        if (r >= rows || x >= columns) continue;
        Pack<T, kPack> value;
        make(lines[r] + x, value.at);
        T* const to = out + r * plan.width + x;
        store(reinterpret_cast<Pack<T, kPack>*>(to), value, plan.keep_in_l2);
      }
    }
  }
};

// Reads a strip whose offset is whole pixels along both axes. The pixels are not converted to the
// accumulator type, so that they are copied bit for bit.
template <class T>
__device__ void read_pixels(const Strip<T>& strip, T (*lines)[kLine]) {
  constexpr int kStripRows = kRows<typename Strip<T>::Acc>;
  const bool counts = strip.taps_y * strip.taps_x > 0;
  const T* row[kStripRows];
  T value[kStripRows][kPositions];  // all loads are issued before the first is used
#pragma unroll
  for (int r = 0; r < kStripRows; ++r) row[r] = counts && r < strip.rows ? strip.row(r) : nullptr;
#pragma unroll
  for (int r = 0; r < kStripRows; ++r) {
#pragma unroll
    for (int i = 0; i < kPositions; ++i)
      value[r][i] = row[r] && strip.column[i] >= 0 ? load(row[r] + strip.column[i]) : T{};
  }
#pragma unroll
  for (int r = 0; r < kStripRows; ++r) {
#pragma unroll
    for (int i = 0; i < kPositions; ++i) lines[r][strip.lane + i * kWarpThreads] = value[r][i];
  }
}

// Sums the taps along y at every position that the taps along x read, into `lines`.
template <int kTaps, class T, class Acc>
__device__ void filter_rows(const Strip<T>& strip, const ShiftTaps& taps, Acc (*lines)[kLine]) {
  // A view with fewer taps uses the last of the kTaps, so row p - (kTaps - 1) of the strip is
  // complete after the p-th row of the image has been added.
  const int absent = kTaps - strip.taps_y;
  constexpr int kReads = kRows<Acc> + kTaps - 1;
  Acc weight[kTaps];
#pragma unroll
  for (int k = 0; k < kTaps; ++k)
    weight[k] = k < absent ? Acc{0} : static_cast<Acc>(taps.weight[k - absent]);
  const T* row[kReads];  // computed first, so that the loads of all rows are independent
#pragma unroll
  for (int p = 0; p < kReads; ++p)
    row[p] = p >= absent && p < strip.rows + kTaps - 1 ? strip.row(p - absent) : nullptr;
  Acc sum[kRows<Acc>][kPositions + 1] = {};
#pragma unroll
  for (int p = 0; p < kReads; ++p) {
#pragma unroll
    for (int i = 0; i <= kPositions; ++i) {
      const bool reads = row[p] && strip.column[i] >= 0;
      const Acc value = reads ? to_acc(load(row[p] + strip.column[i])) : Acc{0};
#pragma unroll
      for (int k = 0; k < kTaps; ++k) {
        const int r = p - k;
        // Absent taps are skipped, because 0 times a non-finite value is NaN.
        const bool has_tap = k == kTaps - 1 || k >= absent;
        if (r >= 0 && r < kRows<Acc> && has_tap) sum[r][i] += weight[k] * value;
      }
    }
    const int done = p - (kTaps - 1);
    if (done < 0) continue;
#pragma unroll
    for (int i = 0; i <= kPositions; ++i) {
      const int at = strip.lane + i * kWarpThreads;
      if (i < kPositions || at < kColumns + kTaps - 1) lines[done][at] = sum[done][i];
    }
  }
}

// out[i] = line[i], read as one vector.
template <class T, int N>
__device__ void copy_line(const T* line, T (&out)[N]) {
  const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(line);
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = pack.at[i];
}

// out[i] = sum over k < taps of weight[k] * line[i + k]. Several pixels are read as whole vectors.
template <int kTaps, class T, class Acc, int N>
__device__ void filter_line(const Acc* line, int taps, const Acc (&weight)[kTaps], T (&out)[N]) {
  constexpr int kReads = N + kTaps - 1, kLanes = kVectorBytes / sizeof(Acc);
  Pack<Acc, kLanes> value[(kReads + kLanes - 1) / kLanes];
  if (N > 1) {
#pragma unroll
    for (int i = 0; i * kLanes < kReads; ++i)
      value[i] = *reinterpret_cast<const Pack<Acc, kLanes>*>(line + i * kLanes);
  } else {
#pragma unroll
    for (int i = 0; i < kReads; ++i) value[i / kLanes].at[i % kLanes] = line[i];
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    Acc sum = 0;
#pragma unroll
    for (int k = 0; k < kTaps; ++k) {
      if (k == 0 || k < taps) sum += weight[k] * value[(i + k) / kLanes].at[(i + k) % kLanes];
    }
    out[i] = from_acc<T>(sum);
  }
}

// kTaps: the maximum number of taps of an axis.
template <class T, int kTaps>
__global__ void __launch_bounds__(kThreads, kResident)
    shift_kernel(const __grid_constant__ ShiftPlan plan,
                 const __grid_constant__ InlineArrays inline_offsets) {
  using Acc = typename AccumulatorOf<T>::type;
  constexpr int kBlockRows = kWarps * kRows<Acc>;
  alignas(kVectorBytes) __shared__ Acc lines[kWarps][kRows<Acc>][kLine];
  __shared__ Block<T> block;
  const int64_t tiles = div_up(plan.height, kBlockRows) * div_up(plan.width, kColumns);

  SRT_FOR_BLOCK(index, plan.views * plan.planes * tiles) {
    if (threadIdx.x < 2) {
      const int axis = static_cast<int>(threadIdx.x);
      locate<kTaps>(plan, inline_offsets, index, kBlockRows, axis, block);
    }
    __syncthreads();
    const Strip<T> strip(plan, block);
    auto* const own = lines[threadIdx.x / kWarpThreads];
    if (strip.taps_y * strip.taps_x <= 1) {
      auto* const line = reinterpret_cast<T(*)[kLine]>(own);
      read_pixels(strip, line);
      __syncwarp();
      strip.write(line, [](const T* from, auto& to) { copy_line(from, to); });
    } else {
      if (strip.rows > 0) filter_rows<kTaps>(strip, block.taps[0], own);
      __syncwarp();
      Acc weight[kTaps];
#pragma unroll
      for (int k = 0; k < kTaps; ++k) weight[k] = static_cast<Acc>(block.taps[1].weight[k]);
      strip.write(own,
                  [&](const Acc* from, auto& to) { filter_line(from, strip.taps_x, weight, to); });
    }
    __syncthreads();  // before the next tile overwrites the state
  }
}

}  // namespace
}  // namespace srt::cuda

namespace srt {

int64_t shift_cuda_workspace(const ShiftArgs& args) {
  return 2 * args.views <= cuda::kInlineDoubles
             ? 0
             : 2 * args.views * static_cast<int64_t>(sizeof(double));
}

void shift_cuda(const ShiftArgs& args, const ViewArray& offsets, void* workspace,
                CUstream_st* stream) {
  using namespace cuda;
  if (args.planes == 0 || args.height == 0 || args.width == 0) return;
  InlineArrays inline_offsets{};
  ShiftPlan plan = make_shift_plan("shift", args, offsets, workspace, stream, inline_offsets);
  dispatch_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int64_t kSize = sizeof(T);
    const int64_t image_bytes = kSize * args.planes * args.height * args.width;
    plan.aligned = args.width * kSize % kVectorBytes == 0 &&
                   reinterpret_cast<uintptr_t>(args.out) % kVectorBytes == 0;
    plan.keep_in_l2 = fits_l2("shift", image_bytes, args.views * image_bytes);
    constexpr int64_t kBlockRows = kWarps * kRows<typename AccumulatorOf<T>::type>;
    const int64_t tiles = div_up(args.height, kBlockRows) * div_up(args.width, kColumns);
    const bool cubic = args.interpolation == Interpolation::bicubic;
    launch("shift", cubic ? shift_kernel<T, 4> : shift_kernel<T, 2>,
           args.views * args.planes * tiles, stream, plan, inline_offsets);
  });
}

}  // namespace srt
