// Code that the CUDA kernels share: loads and stores of every element type, access to offsets and
// weights on the host or the device, checked launches, the plan of shift, and the sorted views of
// ensemble.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "../axis.h"
#include "../ensemble.h"
#include "../shift.h"
#include "../types.h"
#include "../validation.h"
#include "cuda.h"

namespace srt::cuda {

constexpr int kThreads = 256;  // per block, in every kernel
constexpr int kWarpThreads = 32;
constexpr int kWarps = kThreads / kWarpThreads;
constexpr int kVectorBytes = 16;

// ---- elements -----------------------------------------------------------------------------------

// N elements that are loaded and stored together, 16 bytes per instruction.
template <class T, int N>
struct alignas(sizeof(T) * N < kVectorBytes ? sizeof(T) * N : kVectorBytes) Pack {
  T at[N];
};

__device__ inline float to_acc(float value) { return value; }
__device__ inline double to_acc(double value) { return value; }
__device__ inline float to_acc(uint8_t value) { return value; }
__device__ inline float to_acc(Half value) { return __half2float(__ushort_as_half(value.bits)); }
__device__ inline float to_acc(BFloat16 value) {
  return __bfloat162float(__ushort_as_bfloat16(value.bits));
}

template <class T, int N>
__device__ inline auto to_acc(const Pack<T, N>& pack) {
  Pack<typename AccumulatorOf<T>::type, N> values;
#pragma unroll
  for (int e = 0; e < N; ++e) values.at[e] = to_acc(pack.at[e]);
  return values;
}
// Converts two elements at a time; otherwise the compiler needs three instructions for them.
template <int N>
__device__ inline auto to_acc(const Pack<BFloat16, N>& pack) {
  uint32_t word[(N + 1) / 2];
  memcpy(word, &pack, sizeof(pack));
  Pack<float, N> values;
#pragma unroll
  for (int e = 0; e < N; ++e) {
    const uint32_t bits = e % 2 == 0 ? word[e / 2] << 16 : word[e / 2] & 0xffff0000u;
    memcpy(&values.at[e], &bits, sizeof(bits));
  }
  return values;
}

template <class T>
__device__ inline T from_acc(typename AccumulatorOf<T>::type value) {
  return value;
}
template <>
__device__ inline Half from_acc<Half>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}
template <>
__device__ inline BFloat16 from_acc<BFloat16>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}
// Rounds half to even and saturates.
template <>
__device__ inline uint8_t from_acc<uint8_t>(float value) {
  return static_cast<uint8_t>(rintf(fminf(fmaxf(value, 0.0f), 255.0f)));
}

template <int kBytes>
using WordOf = std::conditional_t<
    kBytes == 1, unsigned char,
    std::conditional_t<
        kBytes == 2, unsigned short,
        std::conditional_t<kBytes == 4, unsigned int,
                           std::conditional_t<kBytes == 8, unsigned long long, uint4>>>>;

// Loads data that no thread of this kernel writes, through the read-only cache and in as few
// instructions as its alignment allows. Otherwise the compiler may split a pack.
template <class T>
__device__ inline T load(const T* from) {
  constexpr int kBytes = sizeof(T) < kVectorBytes ? sizeof(T) : kVectorBytes;
  using Word = WordOf<kBytes>;
  Word word[sizeof(T) / kBytes];
#pragma unroll
  for (size_t i = 0; i < sizeof(T) / kBytes; ++i)
    word[i] = __ldg(reinterpret_cast<const Word*>(from) + i);
  T value;
  memcpy(&value, word, sizeof(value));
  return value;
}

template <class Word>
__device__ inline void store_word(Word* to, Word word) {
#ifdef __CUDACC__
  *to = word;  // __stwb would be a strong store
#else
  __stwb(to, word);  // python_tests/cuda_on_host counts the stores
#endif
}

// Writes an output element; every element is written once. With `keep_in_l2` (see fits_l2) it stays
// in L2 for the kernel that reads it next. Otherwise it is stored evict-first, so that it does not
// evict the tokens, which are read again.
template <class T>
__device__ inline void store(T* to, const T& value, bool keep_in_l2) {
  using Word = WordOf<sizeof(T)>;
  Word word;
  memcpy(&word, &value, sizeof(word));
  if (keep_in_l2) {
    store_word(reinterpret_cast<Word*>(to), word);
  } else {
    __stcs(reinterpret_cast<Word*>(to), word);
  }
}

// ---- offsets and weights ------------------------------------------------------------------------

// Offsets and weights on the host are passed as kernel parameters, which hold 4 KB. A copy from
// pageable host memory could synchronise with the stream, and a CUDA graph that captured it would
// read the host memory again at each replay.
constexpr int64_t kInlineDoubles = 480;
struct InlineArrays {
  double at[kInlineDoubles];
};

// An array that a kernel reads, in device memory or in its parameters.
struct DeviceArray {
  const void* data;  // null if the values are in the parameters, starting at `begin`
  bool f64;          // whether `data` is float64; otherwise it is float32
  int64_t begin;

  __device__ double value(const InlineArrays& parameters, int64_t i) const {
    if (!data) return parameters.at[begin + i];
    return f64 ? static_cast<const double*>(data)[i]
               : static_cast<double>(static_cast<const float*>(data)[i]);
  }
};

// ---- launches -----------------------------------------------------------------------------------

inline void check(const char* op, cudaError_t status) {
  if (status != cudaSuccess)
    throw Error("srt::" + std::string(op) + ": CUDA: " + cudaGetErrorString(status));
}

inline int64_t attribute(const char* op, cudaDeviceAttr name) {
  int device = 0, value = 0;
  check(op, cudaGetDevice(&device));
  check(op, cudaDeviceGetAttribute(&value, name, device));
  return value;
}

inline int64_t processors(const char* op) { return attribute(op, cudaDevAttrMultiProcessorCount); }

// Throws if there are too many views: some kernels count them in 32 bits, up to one block beyond
// the last.
inline void check_views(const char* op, int64_t views) {
  if (views > INT32_MAX - kThreads)
    throw Error("srt::" + std::string(op) +
                ": on CUDA the number of views must be below 2^31; got " + std::to_string(views));
}

// Whether the input and the result of a kernel fit L2 together.
inline bool fits_l2(const char* op, int64_t input_bytes, int64_t result_bytes) {
  return input_bytes + result_bytes <= attribute(op, cudaDevAttrL2CacheSize);
}

// Launches a kernel with kThreads threads per block. The size of a grid is limited, so most kernels
// loop over their work in steps of the grid.
template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), int64_t blocks, CUstream_st* stream,
            Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim =
      dim3(static_cast<unsigned>(std::min(blocks, attribute(op, cudaDevAttrMaxGridDimX))));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  check(op, cudaLaunchKernelEx(&config, kernel, arguments...));
}

// Loops over work items 0 .. n - 1: block b processes the items b, b + gridDim.x, ...
#define SRT_FOR_BLOCK(work, n) for (int64_t work = blockIdx.x; work < (n); work += gridDim.x)
// As SRT_FOR_BLOCK, with one work item per thread.
#define SRT_FOR_THREAD(work, n)                                                              \
  for (int64_t work = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; work < (n); \
       work += static_cast<int64_t>(gridDim.x) * kThreads)

// Returns the sum of `own` over the threads before this one, and adds the sum over all threads to
// `total`. All threads of the block must call it.
__device__ inline int32_t exclusive_sum(int32_t own, int32_t& total) {
  __shared__ int32_t values[kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  values[thread] = own;
  __syncthreads();
  int32_t before = 0, all = 0;
  for (int i = 0; i < kThreads; ++i) {
    if (i < thread) before += values[i];
    all += values[i];
  }
  __syncthreads();
  total += all;
  return before;
}

static __global__ void __launch_bounds__(kThreads)
    upload_kernel(const __grid_constant__ InlineArrays parameters, int64_t n, double* to) {
  SRT_FOR_THREAD(i, n) { to[i] = parameters.at[i]; }
}

// Makes an array of the views available to kernels. n doubles on the host are copied into the
// parameters, starting at `at`, if `fits`. Otherwise launches copy them to `device`, kInlineDoubles
// per launch.
inline DeviceArray place_array(const char* op, const ViewArray& array, int64_t n, bool fits,
                               InlineArrays& parameters, int64_t at, double* device,
                               CUstream_st* stream) {
  if (!array.host) return {array.device, array.dtype == DType::f64, 0};
  if (fits) {
    std::copy_n(array.host, n, parameters.at + at);
    return {nullptr, true, at};
  }
  for (int64_t i = 0; i < n; i += kInlineDoubles) {
    const int64_t part = std::min(n - i, kInlineDoubles);
    InlineArrays own;
    std::copy_n(array.host + i, part, own.at);
    launch(op, upload_kernel, div_up(part, kThreads), stream, own, part, device + i);
  }
  return {device, true, 0};
}

// Divides a workspace into aligned pieces. If `base` is null, it only counts the bytes.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t n) {
    char* piece = base_ + bytes_;
    const int64_t end = bytes_ + n * static_cast<int64_t>(sizeof(T));
    bytes_ = div_up(end, kAlignment) * kAlignment;
    if (workspace_gap) {
      bytes_ += kAlignment;
      if (base_) workspace_gap(base_ + end, bytes_ - end);
    }
    return base_ ? reinterpret_cast<T*>(piece) : nullptr;
  }
  int64_t bytes() const { return bytes_; }

 private:
  static constexpr int64_t kAlignment = 256;
  char* base_;
  int64_t bytes_ = 0;
};

// ---- shift --------------------------------------------------------------------------------------

// The plan of shift and its gradient.
struct ShiftPlan {
  const void* from;               // [B*C, H, W]; for the gradient [V, B*C, H, W]
  int64_t planes, height, width;  // pixels
  int64_t views;
  DeviceArray offsets;  // [V, 2] (dy, dx), pixels
  Padding padding;
  Interpolation interpolation;
  bool aligned;     // whether every row of `out` is aligned to 16 bytes
  bool keep_in_l2;  // of `out`, see store()
  void* out;        // [V, B*C, H, W]; for the gradient [B*C, H, W]

  // The taps of offset i, which is 2 * view + axis; none if the offset is invalid.
  __device__ ShiftTaps taps(const InlineArrays& inline_offsets, int64_t i, Interpolation of) const {
    const double offset = offsets.value(inline_offsets, i);
    const bool counts = fabs(offset) <= static_cast<double>(kMaxOffset);
    return counts ? shift_taps(offset, of) : ShiftTaps{};
  }
};

inline ShiftPlan make_shift_plan(const char* op, const ShiftArgs& args, const ViewArray& offsets,
                                 void* workspace, CUstream_st* stream,
                                 InlineArrays& inline_offsets) {
  // Positions along an axis, including the padding, are stored in 32 bits.
  constexpr int64_t kMostPixels = int64_t{1} << 28;
  if (args.height > kMostPixels || args.width > kMostPixels)
    throw Error("srt::" + std::string(op) + ": on CUDA height and width must be at most " +
                std::to_string(kMostPixels) + "; got " + std::to_string(args.height) + " x " +
                std::to_string(args.width));
  ShiftPlan plan{args.image,   args.planes,        args.height, args.width, args.views, {},
                 args.padding, args.interpolation, false,       false,      args.out};
  plan.offsets = place_array(op, offsets, 2 * args.views, 2 * args.views <= kInlineDoubles,
                             inline_offsets, 0, static_cast<double*>(workspace), stream);
  return plan;
}

// ---- the views of ensemble ----------------------------------------------------------------------

struct View {
  double dy, dx;  // pixels; NaN for a view that covers nothing
  double weight;  // at most 1
  int64_t index;  // of the view in `tokens`
};

// The views in the order of the arguments, before sorting.
struct RawViews {
  DeviceArray offsets, weights;  // [V, 2] and [V]
  int64_t views;
  bool weighted;
  bool float_weights;             // whether weights are rounded to float, as the sums use them
  bool absolute_weights = false;  // of a stream: weights are compared across chunks, and limited

  __device__ View operator()(const InlineArrays& parameters, int64_t v) const {
    View view{};
    view.index = v;
    view.dy = offsets.value(parameters, 2 * v);
    view.dx = offsets.value(parameters, 2 * v + 1);
    view.weight = weighted ? weights.value(parameters, v) : 1;
    if (absolute_weights && !(view.weight >= 0x1p-500 && view.weight <= 0x1p500)) view.weight = 0;
    return view;
  }
};

// Applies the rules that the host enforces with errors: an invalid view gets weight 0 and covers
// nothing. Only ratios of weights matter, so they are scaled to at most 1.
__device__ inline View counted_view(View view, double largest) {
  view.weight /= largest;
  const double limit = static_cast<double>(kMaxOffset);
  if (!(fabs(view.dy) <= limit && fabs(view.dx) <= limit && view.weight >= 0x1p-80 &&
        view.weight <= 1)) {
    view.weight = 0;
    view.dy = view.dx = nan("");
  }
  return view;
}

// Sorts the views by dx. The rank of a view is the number of views before it, which each thread
// counts for its own view. This is stable and needs no synchronisation.
static __global__ void __launch_bounds__(kThreads)
    sort_views_kernel(const __grid_constant__ RawViews raw,
                      const __grid_constant__ InlineArrays parameters, View* sorted,
                      double* scale) {
  SRT_FOR_THREAD(v, raw.views) {
    double largest = 0;
    for (int64_t u = 0; u < raw.views; ++u) {
      const double weight = raw(parameters, u).weight;
      if (weight > largest && isfinite(weight)) largest = weight;
    }
    if (scale && v == 0) *scale = largest;
    View own = counted_view(raw(parameters, v), largest);
    if (raw.float_weights) own.weight = static_cast<float>(own.weight);
    int64_t rank = 0;
    for (int64_t u = 0; u < raw.views; ++u) {
      const double dx = counted_view(raw(parameters, u), largest).dx;
      const bool tie = u < v && (dx == own.dx || (isnan(dx) && isnan(own.dx)));
      if (dx < own.dx || tie || (isnan(own.dx) && !isnan(dx))) ++rank;
    }
    sorted[rank] = own;
  }
}

// The input and output of the kernels of ensemble.
struct FieldPlan {
  const void* tokens;        // [V, B, h*w, C]
  int64_t token_strides[3];  // of V, B and h*w, in elements
  int64_t views, batch, channels;
  void* out;               // [B, C, H', W']
  int64_t out_strides[4];  // in elements
  bool keep_in_l2;         // of everything that is written, see store()
};

// One call of ensemble or of its gradient. If `workspace` is null, only its size is computed.
struct Call {
  const char* op;
  const EnsembleArgs& args;
  const ViewArray &offsets, &weights;
  void* workspace;
  CUstream_st* stream;

  Axis axis(int i) const {
    return {args.grid[i], args.patch[i], args.stride[i], args.upsample, args.border};
  }
  // The number of elements of all tokens, and of a field.
  int64_t token_elements() const {
    return args.views * args.batch * args.grid[0] * args.grid[1] * args.channels;
  }
  int64_t field_elements() const {
    return args.batch * args.channels * axis(0).cells() * axis(1).cells();
  }
  // `cell_bytes`: bytes written per element of the field.
  void set_field(FieldPlan& plan, int64_t token_bytes, int64_t cell_bytes) const {
    plan.tokens = args.tokens;
    std::copy_n(args.token_strides, 3, plan.token_strides);
    plan.views = args.views;
    plan.batch = args.batch;
    plan.channels = args.channels;
    plan.out = args.out;
    std::copy_n(args.out_strides, 4, plan.out_strides);
    plan.keep_in_l2 = fits_l2(op, token_bytes * token_elements(), cell_bytes * field_elements());
  }
};

// The views of a call. Values that do not fit the parameters are copied to a piece of the
// workspace.
inline RawViews raw_views(const Call& call, Workspace& workspace, InlineArrays& parameters) {
  const ViewArray &offsets = call.offsets, &weights = call.weights;
  const int64_t views = call.args.views;
  const bool weighted = weights.host || weights.device;
  const bool fits = (weighted ? 3 : 2) * views <= kInlineDoubles;
  double* const new_offsets = offsets.host && !fits ? workspace.take<double>(2 * views) : nullptr;
  double* const new_weights = weights.host && !fits ? workspace.take<double>(views) : nullptr;
  parameters = {};
  RawViews raw{};
  raw.views = views;
  raw.weighted = weighted;
  // The total weight of a stream is stored in float64.
  raw.float_weights = call.args.dtype != DType::f64 && !call.args.total_weight;
  if (!call.workspace) return raw;
  raw.offsets =
      place_array(call.op, offsets, 2 * views, fits, parameters, 0, new_offsets, call.stream);
  raw.weights = place_array(call.op, weights, views, fits, parameters, offsets.host ? 2 * views : 0,
                            new_weights, call.stream);
  return raw;
}

// Sorts the views by dx; views that cover nothing come last. Stores the largest weight in `scale`
// unless it is null.
inline void sort_views(const Call& call, const RawViews& raw, const InlineArrays& parameters,
                       View* sorted, double* scale) {
  launch(call.op, sort_views_kernel, div_up(raw.views, kThreads), call.stream, raw, parameters,
         sorted, scale);
}

// The reductions in mean.cu and per_view.cu. They return the size of the workspace in bytes; if
// call.workspace is null, they launch nothing.
int64_t run_mean(const Call& call);
int64_t run_per_view(const Call& call);

}  // namespace srt::cuda
