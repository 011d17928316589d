// The CUDA kernels under compute-sanitizer: small odd calls on buffers of exact size, compared with
// the CPU kernels. No torch: its caching allocator would hide an access out of bounds. Exit status
// 1 if any call is wrong or any CUDA call fails.
//
// The bound of every comparison. A kernel and the truth (the CPU kernel in float64) sum the same T
// products of total size M (the call on |values|): the sum and the roundings of the tables are
// within (T + 8) * eps * M in the precision of the sums, and the result is rounded once to its
// dtype, by half an eps of that.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../csrc/srt/cuda/cuda.h"

namespace {

using namespace srt;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}
#define CHECK(call) check(call, #call)

// ---- elements -----------------------------------------------------------------------------------

struct Type {
  DType dtype;
  const char* name;
  int64_t size;  // bytes
  double eps;    // of the stored type
  double tiny;   // its smallest normal number
};
constexpr Type kF32{DType::f32, "f32", 4, 0x1p-23, 0x1p-126};
constexpr Type kF16{DType::f16, "f16", 2, 0x1p-10, 0x1p-14};
constexpr Type kBF16{DType::bf16, "bf16", 2, 0x1p-7, 0x1p-126};
constexpr Type kF64{DType::f64, "f64", 8, 0x1p-52, 0x1p-1022};
constexpr Type kU8{DType::u8, "u8", 1, 0, 0};
constexpr Type kFloating[] = {kF32, kF16, kBF16, kF64};
constexpr Type kAll[] = {kF32, kF16, kBF16, kF64, kU8};

template <class T>
T load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

double decode(DType dtype, const void* from) {
  switch (dtype) {
    case DType::f32:
      return load<float>(from);
    case DType::f16:
      return __half2float(load<__half>(from));
    case DType::bf16:
      return __bfloat162float(load<__nv_bfloat16>(from));
    case DType::f64:
      return load<double>(from);
    case DType::u8:
      return load<uint8_t>(from);
  }
  return kNaN;
}

void encode(DType dtype, double value, void* to) {
  const auto put = [&](auto element) { std::memcpy(to, &element, sizeof(element)); };
  switch (dtype) {
    case DType::f32:
      return put(static_cast<float>(value));
    case DType::f16:
      return put(__float2half_rn(static_cast<float>(value)));
    case DType::bf16:
      return put(__float2bfloat16_rn(static_cast<float>(value)));
    case DType::f64:
      return put(value);
    case DType::u8:
      return put(static_cast<uint8_t>(value));
  }
}

// Random values that the type holds, as bytes and as doubles.
struct Values {
  std::vector<char> bytes;
  std::vector<double> exact;

  Values(const Type& type, int64_t n, unsigned seed) : bytes(n * type.size), exact(n) {
    std::mt19937 engine(seed);
    std::uniform_real_distribution<double> real(-2, 2), byte(0, 256);
    for (int64_t i = 0; i < n; ++i) {
      char* at = bytes.data() + i * type.size;
      encode(type.dtype, type.dtype == DType::u8 ? byte(engine) : real(engine), at);
      exact[i] = decode(type.dtype, at);
    }
  }
};

std::vector<double> magnitudes(std::vector<double> values) {
  for (double& value : values) value = std::fabs(value);
  return values;
}

// ---- device -------------------------------------------------------------------------------------

cudaStream_t stream;
bool failed = false;

// Ends where its allocation ends, and starts `skip` bytes into it: cudaMalloc alone gives only
// aligned addresses.
class Buffer {
 public:
  Buffer(int64_t bytes, int64_t skip) : bytes_(bytes), skip_(skip) {
    if (bytes > 0) CHECK(cudaMalloc(&base_, bytes + skip));
  }
  explicit Buffer(const std::vector<char>& content, int64_t skip = 0)
      : Buffer(static_cast<int64_t>(content.size()), skip) {
    if (bytes_ > 0)
      CHECK(cudaMemcpyAsync(data(), content.data(), bytes_, cudaMemcpyHostToDevice, stream));
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
    if (cudaFree(base_) == cudaSuccess) return;
    std::printf("FAILED: cudaFree\n");
    failed = true;
  }

  char* data() const { return base_ ? static_cast<char*>(base_) + skip_ : nullptr; }
  void fill(int byte) const { CHECK(cudaMemsetAsync(data(), byte, bytes_, stream)); }
  std::vector<char> read() const {
    std::vector<char> content(bytes_);
    CHECK(cudaMemcpyAsync(content.data(), data(), bytes_, cudaMemcpyDeviceToHost, stream));
    CHECK(cudaStreamSynchronize(stream));
    return content;
  }

 private:
  int64_t bytes_, skip_;
  void* base_ = nullptr;
};

// What lies between the pieces of the workspaces of a call (cuda.h).
struct Gap {
  void* at;
  int64_t bytes;
};
std::vector<Gap> gaps;
constexpr char kPoison = 0x5a;

void poison_gap(void* at, int64_t bytes) {
  CHECK(cudaMemsetAsync(at, kPoison, bytes, stream));
  gaps.push_back({at, bytes});
}

// Waits for a call, whose workspace still exists.
void finish(const std::string& what) {
  CHECK(cudaStreamSynchronize(stream));
  for (const Gap& gap : gaps) {
    std::vector<char> content(gap.bytes);
    CHECK(cudaMemcpy(content.data(), gap.at, gap.bytes, cudaMemcpyDeviceToHost));
    if (std::count(content.begin(), content.end(), kPoison) != gap.bytes)
      throw std::runtime_error(what + ": written between two pieces of the workspace");
  }
  gaps.clear();
}

// How the numbers of the views reach the kernel.
enum class Where { host, device_f32, device_f64 };

struct Numbers {
  const std::vector<double>& host;
  std::unique_ptr<Buffer> device;
  ViewNumbers view{};

  Numbers(const std::vector<double>& values, Where where) : host(values) {
    if (values.empty()) return;
    if (where == Where::host) {
      view.host = host.data();
      return;
    }
    const Type& type = where == Where::device_f32 ? kF32 : kF64;
    std::vector<char> bytes(values.size() * type.size);
    for (size_t i = 0; i < values.size(); ++i)
      encode(type.dtype, values[i], bytes.data() + i * type.size);
    device = std::make_unique<Buffer>(bytes);
    view = {nullptr, device->data(), type.dtype};
  }
};

// The values that the kernel gets to see.
std::vector<double> as_given(std::vector<double> values, Where where) {
  if (where == Where::device_f32)
    for (double& value : values) value = static_cast<float>(value);
  return values;
}

void run_serial(int64_t n, Parallel::Body body, void* context) { body(0, n, context); }
constexpr Parallel kSerial{1, run_serial};

// ---- comparison ---------------------------------------------------------------------------------

double worst;  // of the group: the largest error over its bound
int runs;
bool reduced = false;  // of the types of a group, one for each call

// `place[i]` is where element i of the dense truth lies in the output, in elements. Two runs, on
// two poisons: an element that no run writes differs between them, and so does a race; what lies
// between the elements keeps its poison.
template <class Run>
void compare(const Type& type, const std::string& what, int64_t out_elements, int64_t skip,
             const std::vector<int64_t>& place, const std::vector<double>& truth,
             const std::vector<double>& bound, Run&& run) {
  const Buffer out(out_elements * type.size, skip);
  std::vector<char> results[2];
  const int poisons[2] = {0xff, 0x5a};
  for (int i = 0; i < 2; ++i) {
    out.fill(poisons[i]);
    run(out.data());
    CHECK(cudaGetLastError());
    results[i] = out.read();
  }
  std::vector<bool> written(out_elements);
  for (size_t i = 0; i < place.size(); ++i) {
    const char* at = results[0].data() + place[i] * type.size;
    written[place[i]] = true;
    if (std::memcmp(at, results[1].data() + place[i] * type.size, type.size) != 0)
      throw std::runtime_error(what + ": element " + std::to_string(i) +
                               " differs between two runs, or is not written");
    const double error = std::fabs(decode(type.dtype, at) - truth[i]);
    const double ratio = error == 0 ? 0 : error / bound[i];
    if (!(ratio <= 1))
      throw std::runtime_error(what + ": element " + std::to_string(i) + " is " +
                               std::to_string(decode(type.dtype, at)) + ", not " +
                               std::to_string(truth[i]));
    worst = std::max(worst, ratio);
  }
  for (int64_t i = 0; i < out_elements * type.size; ++i)
    for (int k = 0; k < 2; ++k)
      if (!written[i / type.size] && results[k][i] != static_cast<char>(poisons[k]))
        throw std::runtime_error(what + ": written between the elements, at byte " +
                                 std::to_string(i));
  ++runs;
}

// ---- ensemble -----------------------------------------------------------------------------------

enum class Layout { channels_last, nchw, padded };

struct Ensemble {
  int64_t grid[2] = {3, 5}, patch[2] = {4, 6}, stride[2] = {1, 1};
  int64_t batch = 2, channels = 19;
  int64_t prefix = 0;    // tokens before the grid: base and view stride of a sliced model output
  int64_t gap = 0;       // elements between the channels of one token and of the next
  int64_t skip = 0;      // elements from an aligned address to the first
  int64_t out_skip = 0;  // the same of the output
  Layout layout = Layout::channels_last;
  Upsample upsample = Upsample::bilinear;
  Border border = Border::coverage;
  Where where = Where::host;
  Reduce reduce = Reduce::mean;
  bool stream = false;  // the views are the first chunk of one
  std::vector<double> offsets = {-3, -2, -3, 0, -3, 2, 0, -2, 0, 0, 0, 2, 3, -2, 3, 0, 3, 2};
  std::vector<double> weights;
};

// The call, but for its pointers and the strides of its output.
EnsembleArgs call(const Ensemble& e, const Type& type) {
  const int64_t count = e.prefix + e.grid[0] * e.grid[1], pitch = e.channels + e.gap;
  EnsembleArgs args{};
  args.dtype = type.dtype;
  args.views = static_cast<int64_t>(e.offsets.size()) / 2;
  args.batch = e.batch;
  args.channels = e.channels;
  args.token_strides[0] = e.batch * count * pitch;
  args.token_strides[1] = count * pitch;
  args.token_strides[2] = pitch;
  std::copy_n(e.grid, 2, args.grid);
  std::copy_n(e.patch, 2, args.patch);
  std::copy_n(e.stride, 2, args.stride);
  args.upsample = e.upsample;
  args.border = e.border;
  args.reduce = e.reduce;
  return args;
}

// The tokens of all views, with what lies before and between them.
Values tokens_of(const Ensemble& e, const Type& type) {
  const EnsembleArgs args = call(e, type);
  return {type, args.views * args.token_strides[0] - e.gap, 1};
}

// The numbers of the views as the host accepts them: a refused view has weight 0.
struct Accepted {
  std::vector<double> offsets, weights;

  explicit Accepted(const Ensemble& e)
      : offsets(as_given(e.offsets, e.where)), weights(as_given(e.weights, e.where)) {
    weights.resize(offsets.size() / 2, 1);
    double largest = 0;
    for (double& weight : weights) {
      if (!(weight >= 0 && weight < kInf)) weight = 0;
      largest = std::max(largest, weight);
    }
    for (size_t v = 0; v < weights.size(); ++v) {
      if (weights[v] < largest * 0x1p-80) weights[v] = 0;
      for (size_t k = 0; k < 2; ++k) {
        if (std::fabs(offsets[2 * v + k]) <= static_cast<double>(kMaxOffset)) continue;
        offsets[2 * v + k] = 0;
        weights[v] = 0;
      }
    }
  }
};

// Where the elements of a field lie: [planes, B, C, H', W'], in elements.
struct Places {
  int64_t strides[4], plane_stride;
  std::vector<int64_t> place;  // of the dense field

  Places(const Ensemble& e, int64_t planes) {
    const int64_t height = e.grid[0] * e.patch[0] / e.stride[0];
    const int64_t width = e.grid[1] * e.patch[1] / e.stride[1];
    const int64_t last[4] = {height * width * e.channels, 1, width * e.channels, e.channels};
    const int64_t first[4] = {e.channels * height * width, height * width, width, 1};
    std::copy_n(e.layout == Layout::nchw ? first : last, 4, strides);
    if (e.layout == Layout::padded) {  // gaps after every channel run, row and image
      strides[3] = e.channels + 3;
      strides[2] = width * strides[3] + 5;
      strides[0] = height * strides[2] + 7;
    }
    plane_stride = e.batch * strides[0] + 16;
    for (int64_t p = 0; p < planes; ++p)
      for (int64_t b = 0; b < e.batch; ++b)
        for (int64_t c = 0; c < e.channels; ++c)
          for (int64_t y = 0; y < height; ++y)
            for (int64_t x = 0; x < width; ++x)
              place.push_back(p * plane_stride + b * strides[0] + c * strides[1] + y * strides[2] +
                              x * strides[3]);
  }
  int64_t elements() const {
    return place.empty() ? 0 : *std::max_element(place.begin(), place.end()) + 1;
  }
};

double largest_of(const std::vector<double>& values) {
  double most = 1;
  for (const double value : values) most = std::max(most, std::fabs(value));
  return most;
}

void run(const Ensemble& e, const Type& type, const std::string& what) {
  EnsembleArgs args = call(e, type);
  const int64_t height = e.grid[0] * e.patch[0] / e.stride[0];
  const int64_t width = e.grid[1] * e.patch[1] / e.stride[1];
  const int64_t first = e.prefix * args.token_strides[2];
  const Values tokens = tokens_of(e, type);
  const int64_t planes = e.reduce == Reduce::moments
                             ? 2
                             : (e.stream && e.reduce == Reduce::median ? kWindowPlanes : 1);
  const Accepted accepted(e);
  const int64_t cells = e.batch * e.channels * height * width;
  const auto cpu = [&](const std::vector<double>& values) {
    std::vector<double> field(planes * cells), seen(height * width);
    EnsembleArgs on_host = args;
    on_host.dtype = DType::f64;
    on_host.tokens = values.data() + first;
    on_host.offsets = accepted.offsets.data();
    on_host.weights = accepted.weights.data();
    on_host.out = field.data();
    const int64_t dense[4] = {e.channels * height * width, height * width, width, 1};
    std::copy_n(dense, 4, on_host.out_strides);
    on_host.variance = field.data() + cells;
    on_host.plane_stride = cells;
    if (e.stream) on_host.seen = seen.data();
    if (e.reduce == Reduce::median) on_host.weights = nullptr;
    ensemble_cpu(on_host, kSerial);
    return field;
  };
  const std::vector<double> truth = cpu(tokens.exact);
  std::vector<double> size = cpu(magnitudes(tokens.exact));
  if (e.reduce != Reduce::mean) {  // a value is no larger than the tokens, a variance than a square
    const double most = largest_of(tokens.exact);
    std::fill(size.begin(), size.end(), 4 * most * most);
  }
  const double terms = static_cast<double>(4 * args.views * e.stride[0] * e.stride[1]);
  const double acc = type.dtype == DType::f64 ? kF64.eps : kF32.eps;
  const Type& out_type = e.stream ? (type.dtype == DType::f64 ? kF64 : kF32) : type;
  std::vector<double> bound(truth.size());
  for (size_t i = 0; i < truth.size(); ++i)
    bound[i] = (terms + 8) * acc * size[i] +
               0.5 * out_type.eps * std::max(std::fabs(truth[i]), out_type.tiny);

  const Places field(e, planes);
  // Only what the call may read: the tokens of the grid, from the first to the end of the last.
  const std::vector<char> readable(tokens.bytes.begin() + first * type.size, tokens.bytes.end());
  const Buffer device_tokens(readable, e.skip * type.size);
  args.tokens = device_tokens.data();
  std::copy_n(field.strides, 4, args.out_strides);
  const int64_t skip = e.out_skip * out_type.size;
  compare(out_type, what, field.elements(), skip, field.place, truth, bound, [&](void* out) {
    const Numbers moves(e.offsets, e.where), scales(e.weights, e.where);
    const Buffer seen(height * width * static_cast<int64_t>(sizeof(double)), 0);
    seen.fill(0);
    args.out = out;
    args.variance = static_cast<char*>(out) + field.plane_stride * out_type.size;
    args.plane_stride = field.plane_stride;
    if (e.stream) args.seen = reinterpret_cast<double*>(seen.data());
    const Buffer workspace(ensemble_cuda_workspace(args, moves.view, scales.view), 0);
    ensemble_cuda("ensemble", args, moves.view, scales.view, workspace.data(), stream);
    finish(what);
  });
}

// The gradient of the same call.
struct EnsembleGradient : Ensemble {};

void run(const EnsembleGradient& e, const Type& type, const std::string& what) {
  EnsembleArgs args = call(e, type);
  const int64_t first = e.prefix * args.token_strides[2];
  const Values tokens = tokens_of(e, type);
  const Accepted accepted(e);
  const Places field(e, e.reduce == Reduce::moments ? 2 : 1);
  const Values grad(type, field.elements(), 4);
  std::copy_n(field.strides, 4, args.out_strides);

  const int64_t count = args.views * e.batch * e.grid[0] * e.grid[1] * e.channels;
  const auto cpu = [&](Reduce reduce, std::vector<double> of_field) {
    std::vector<double> of_tokens(count);
    EnsembleArgs on_host = args;
    on_host.dtype = DType::f64;
    on_host.reduce = reduce;
    on_host.tokens = tokens.exact.data() + first;
    on_host.offsets = accepted.offsets.data();
    on_host.weights = reduce == Reduce::median ? nullptr : accepted.weights.data();
    on_host.out = of_field.data();
    on_host.variance = of_field.data() + field.plane_stride;
    ensemble_backward_cpu(on_host, of_tokens.data(), kSerial);
    return of_tokens;
  };
  const std::vector<double> truth = cpu(e.reduce, grad.exact);
  // That of a variance is a gradient times twice a value less a mean.
  std::vector<double> sizes = magnitudes(grad.exact);
  if (e.reduce == Reduce::moments)
    for (size_t i = 0; i < field.place.size() / 2; ++i)
      sizes[field.place[i]] +=
          4 * largest_of(tokens.exact) * sizes[field.place[i] + field.plane_stride];
  const std::vector<double> size = cpu(e.reduce == Reduce::median ? e.reduce : Reduce::mean, sizes);
  const int64_t cells = 4 * e.patch[0] * e.patch[1];  // whose taps a token is among
  const double terms = static_cast<double>(4 * args.views * e.stride[0] * e.stride[1] + cells);
  const double acc = type.dtype == DType::f64 ? kF64.eps : kF32.eps;
  std::vector<int64_t> place(count);
  std::vector<double> bound(count);
  for (int64_t i = 0; i < count; ++i) {
    place[i] = i;
    bound[i] =
        (terms + 8) * acc * size[i] + 0.5 * type.eps * std::max(std::fabs(truth[i]), type.tiny);
  }

  const std::vector<char> readable(tokens.bytes.begin() + first * type.size, tokens.bytes.end());
  const Buffer device_tokens(readable, e.skip * type.size);
  const Buffer device_grad(grad.bytes, e.skip * type.size);
  args.tokens = e.reduce == Reduce::mean ? nullptr : device_tokens.data();
  args.out = device_grad.data();
  args.variance = device_grad.data() + field.plane_stride * type.size;
  compare(type, what, count, e.out_skip * type.size, place, truth, bound, [&](void* out) {
    const Numbers moves(e.offsets, e.where), scales(e.weights, e.where);
    const Buffer workspace(ensemble_backward_cuda_workspace(args, moves.view, scales.view), 0);
    ensemble_backward_cuda("ensemble", args, moves.view, scales.view, out, workspace.data(),
                           stream);
    finish(what);
  });
}

// ---- shift --------------------------------------------------------------------------------------

struct Shift {
  int64_t planes = 3, height = 9, width = 21;
  int64_t skip = 0, out_skip = 0;  // elements from an aligned address to the first
  Padding padding = Padding::reflect;
  Interpolation interpolation = Interpolation::bilinear;
  Where where = Where::host;
  std::vector<double> offsets = {0, 0, 0.25, -0.625, -3.3, 7.1, 2, -3, 2.5, 4, -40.5, 100.25};
};

// The call, but for its pointers.
ShiftArgs call(const Shift& s, const Type& type) {
  ShiftArgs args{};
  args.dtype = type.dtype;
  args.planes = s.planes;
  args.height = s.height;
  args.width = s.width;
  args.views = static_cast<int64_t>(s.offsets.size()) / 2;
  args.padding = s.padding;
  args.interpolation = s.interpolation;
  return args;
}

void run(const Shift& s, const Type& type, const std::string& what) {
  ShiftArgs args = call(s, type);
  const int64_t views = args.views, elements = s.planes * s.height * s.width;
  const Values image(type, elements, 2);

  std::vector<double> offsets = as_given(s.offsets, s.where);
  std::vector<bool> refused(views);
  for (int64_t i = 0; i < 2 * views; ++i) {
    if (std::fabs(offsets[i]) <= static_cast<double>(kMaxOffset)) continue;
    offsets[i] = 0;
    refused[i / 2] = true;
  }
  std::vector<double> truth(views * elements), bound(views * elements);
  args.dtype = DType::f64;
  args.image = image.exact.data();
  args.offsets = offsets.data();
  args.out = truth.data();
  shift_cpu(args, kSerial);
  // At most 4 x 4 products; cubic weights reach 2 in total on an axis. An element is at most 2 in
  // size, or 255.
  const double largest = type.dtype == DType::u8 ? 255 : 2;
  const double acc = type.dtype == DType::f64 ? kF64.eps : kF32.eps;
  std::vector<int64_t> place(truth.size());
  for (size_t i = 0; i < truth.size(); ++i) {
    place[i] = static_cast<int64_t>(i);
    if (refused[i / elements]) truth[i] = 0;
    bound[i] = (16 + 8) * acc * 4 * largest;
    if (type.dtype == DType::u8) {
      truth[i] = std::min(std::max(truth[i], 0.0), 255.0);
      bound[i] += 0.5;
    } else {
      bound[i] += 0.5 * type.eps * std::max(std::fabs(truth[i]), type.tiny);
    }
  }

  const Buffer device_image(image.bytes, s.skip * type.size);
  args.dtype = type.dtype;
  args.image = device_image.data();
  args.offsets = nullptr;
  const int64_t out_elements = views * elements;
  compare(type, what, out_elements, s.out_skip * type.size, place, truth, bound, [&](void* out) {
    const Numbers moves(s.offsets, s.where);
    args.out = out;
    const Buffer workspace(shift_cuda_workspace(args), 0);
    shift_cuda(args, moves.view, workspace.data(), stream);
    finish(what);
  });
}

// The gradient of the same call.
struct ShiftGradient : Shift {};

void run(const ShiftGradient& s, const Type& type, const std::string& what) {
  ShiftArgs args = call(s, type);
  const int64_t views = args.views, plane = s.height * s.width, elements = s.planes * plane;
  const Values grad(type, views * elements, 5);

  // The truth, product by product.
  const std::vector<double> offsets = as_given(s.offsets, s.where);
  std::vector<double> truth(elements), size(elements), terms(elements);
  std::vector<int64_t> place(elements);
  for (int64_t v = 0; v < views; ++v) {
    const double dy = offsets[2 * v], dx = offsets[2 * v + 1];
    if (!(std::fabs(dy) <= static_cast<double>(kMaxOffset) &&
          std::fabs(dx) <= static_cast<double>(kMaxOffset)))
      continue;
    const ShiftTaps rows = shift_taps(dy, s.interpolation),
                    columns = shift_taps(dx, s.interpolation);
    for (int64_t y = 0; y < s.height; ++y)
      for (int64_t x = 0; x < s.width; ++x)
        for (int64_t k = 0; k < rows.taps * columns.taps; ++k) {
          const int64_t ky = k / columns.taps, kx = k % columns.taps;
          const int64_t iy = pad_index(y + rows.first + ky, s.height, s.padding);
          const int64_t ix = pad_index(x + columns.first + kx, s.width, s.padding);
          if (iy < 0 || ix < 0) continue;
          for (int64_t p = 0; p < s.planes; ++p) {
            const int64_t at = p * plane + iy * s.width + ix;
            const double product = rows.weight[ky] * columns.weight[kx] *
                                   grad.exact[v * elements + p * plane + y * s.width + x];
            truth[at] += product;
            size[at] += std::fabs(product);
            ++terms[at];
          }
        }
  }
  const double acc = type.dtype == DType::f64 ? kF64.eps : kF32.eps;
  std::vector<double> bound(elements);
  for (int64_t i = 0; i < elements; ++i) {
    place[i] = i;
    bound[i] =
        (terms[i] + 8) * acc * size[i] + 0.5 * type.eps * std::max(std::fabs(truth[i]), type.tiny);
  }

  const Buffer device_grad(grad.bytes, s.skip * type.size);
  args.out = device_grad.data();
  compare(type, what, elements, s.out_skip * type.size, place, truth, bound, [&](void* out) {
    const Numbers moves(s.offsets, s.where);
    const Buffer workspace(shift_backward_cuda_workspace(args), 0);
    shift_backward_cuda(args, moves.view, out, workspace.data(), stream);
    finish(what);
  });
}

// ---- the calls ----------------------------------------------------------------------------------

const std::vector<double> kReal = {0, 0, 0.25, -0.625, -3.3, 7.1, 2.5, 2.5, -0.7, -5.9};

// More numbers than fit into the parameters of one kernel.
std::vector<double> many(int64_t views) {
  std::vector<double> offsets(2 * views);
  std::mt19937 engine(3);
  std::uniform_real_distribution<double> real(-9, 9);
  for (double& offset : offsets) offset = std::round(8 * real(engine)) / 8;
  return offsets;
}

template <class Case>
Case with(void (*change)(Case&)) {
  Case made;
  change(made);
  return made;
}

template <class Case, size_t N>
bool group(const char* name, const Type (&types)[N], const std::vector<Case>& cases) {
  worst = 0;
  runs = 0;
  try {
    for (size_t i = 0; i < cases.size(); ++i)
      for (size_t t = 0; t < N; ++t)
        if (!reduced || t == i % N)
          run(cases[i], types[t], std::string(types[t].name) + ", call " + std::to_string(i));
  } catch (const std::exception& error) {
    std::printf("%-32s FAILED: %s\n", name, error.what());
    std::fflush(stdout);
    return false;
  }
  std::printf("%-32s %3d runs, largest error / bound %.3f\n", name, runs, worst);
  std::fflush(stdout);
  return true;
}

bool all() {
  using E = Ensemble;
  using S = Shift;
  bool ok = true;
  ok &= group<E>("ensemble: borders, upsamplings", kFloating,
                 {
                     E{},
                     with<E>([](E& e) { e.upsample = Upsample::nearest; }),
                     with<E>([](E& e) { e.border = Border::zeros, e.offsets = kReal; }),
                     with<E>([](E& e) { e.border = Border::clamp, e.offsets = kReal; }),
                     with<E>([](E& e) {
                       e.upsample = Upsample::nearest, e.border = Border::clamp;
                       e.offsets = {12, 0, 0.5, -30, 0x1p20, -0x1p20};
                     }),
                 });
  ok &= group<E>(
      "ensemble: strides", kFloating,
      {
          with<E>([](E& e) { e.stride[0] = 4, e.stride[1] = 6, e.upsample = Upsample::nearest; }),
          with<E>([](E& e) { e.stride[0] = 6, e.stride[1] = 10, e.offsets = kReal; }),
          with<E>([](E& e) { e.stride[0] = 12, e.stride[1] = 30, e.border = Border::zeros; }),
          with<E>([](E& e) { e.patch[0] = e.patch[1] = 1, e.stride[0] = 3, e.offsets = kReal; }),
          with<E>([](E& e) { e.grid[0] = e.grid[1] = 1, e.channels = 1, e.batch = 1; }),
      });
  ok &= group<E>(
      "ensemble: channels, alignment", kFloating,
      {
          with<E>([](E& e) { e.channels = 64, e.batch = 1; }),
          with<E>([](E& e) { e.channels = 64, e.skip = 1, e.prefix = 1; }),
          with<E>([](E& e) { e.channels = 32, e.out_skip = 1; }),
          with<E>([](E& e) { e.channels = 16, e.gap = 1, e.prefix = 2; }),
          with<E>([](E& e) { e.channels = 151, e.batch = 1, e.prefix = 1; }),
          with<E>([](E& e) { e.channels = 520, e.batch = 1, e.patch[0] = 2, e.patch[1] = 3; }),
      });
  ok &= group<E>("ensemble: layouts of out", kFloating,
                 {
                     with<E>([](E& e) { e.layout = Layout::nchw; }),
                     with<E>([](E& e) { e.layout = Layout::nchw, e.channels = 32; }),
                     with<E>([](E& e) { e.layout = Layout::padded, e.channels = 32; }),
                     with<E>([](E& e) { e.layout = Layout::padded, e.stride[1] = 2; }),
                 });
  ok &= group<E>("ensemble: numbers of the views", kFloating,
                 {
                     with<E>([](E& e) { e.offsets = kReal, e.weights = {1, 0, 2.5, 1e-3, 7}; }),
                     with<E>([](E& e) {
                       e.offsets = kReal, e.weights = {1, 0, 2.5, 1e-3, 7};
                       e.where = Where::device_f32;
                     }),
                     with<E>([](E& e) { e.offsets = kReal, e.where = Where::device_f64; }),
                     with<E>([](E& e) {
                       e.offsets = {kNaN, 0, 1, kInf, 2, 2, -1, 0x1p21, 3, -1};
                       e.where = Where::device_f32;
                     }),
                     with<E>([](E& e) {
                       e.offsets = kReal, e.weights = {kNaN, -1, 2, 0x1p-90, kInf};
                       e.where = Where::device_f64;
                     }),
                     with<E>([](E& e) { e.weights.assign(9, 0); }),
                 });
  ok &= group<E>(
      "ensemble: many views", kFloating,
      {
          with<E>([](E& e) { e.offsets = many(301), e.batch = 1, e.channels = 9; }),
          with<E>([](E& e) {
            e.offsets = many(301), e.batch = 1, e.channels = 8;
            e.weights.assign(301, 0.5), e.weights[7] = 0;
          }),
          with<E>([](E& e) { e.offsets = many(301), e.batch = 1, e.where = Where::device_f64; }),
      });
  // 330 tiles of 16 rows, 32 cells and 32 float32 channels, or as many of their like: enough for
  // the kernels with large tiles on a GPU of 165 processors.
  ok &= group<E>("ensemble: large tiles", kFloating,
                 {
                     with<E>([](E& e) { e.batch = 5, e.channels = 2112, e.prefix = 1; }),
                     with<E>([](E& e) {
                       e.batch = 5, e.channels = 2112, e.offsets = kReal;
                       e.weights = {1, 0, 2.5, 1e-3, 7}, e.where = Where::device_f64;
                       e.stride[0] = 2, e.border = Border::clamp;
                     }),
                     with<E>([](E& e) {
                       e.batch = 5, e.channels = 2112, e.upsample = Upsample::nearest;
                       e.layout = Layout::nchw;
                     }),
                 });
  const auto reduced = [](Reduce reduce, bool stream, int64_t views) {
    E e;
    e.reduce = reduce, e.stream = stream, e.border = Border::clamp;
    e.offsets = many(views), e.batch = views > 100 ? 1 : 2, e.channels = views > 100 ? 9 : 19;
    return e;
  };
  std::vector<E> medians, others;
  for (const int64_t views : {9, 25, 49, 64, 130}) {
    medians.push_back(reduced(Reduce::median, false, views));
    medians.back().where = views == 49 ? Where::device_f64 : Where::host;
  }
  for (const bool stream : {false, true}) {
    for (const Reduce reduce : {Reduce::mean, Reduce::median, Reduce::moments}) {
      if (!stream && reduce != Reduce::moments) continue;
      for (const Layout layout : {Layout::channels_last, Layout::padded}) {
        others.push_back(reduced(reduce, stream, 9));
        others.back().layout = layout;
        others.back().prefix = 1;
      }
      others.push_back(reduced(reduce, stream, 301));
      if (reduce != Reduce::median) others.back().weights = std::vector<double>(301, 0.5);
    }
  }
  ok &= group<E>("ensemble: medians", kFloating, medians);
  ok &= group<E>("ensemble: moments, streams", kFloating, others);
  ok &= group<E>("ensemble: nothing", kFloating,
                 {with<E>([](E& e) { e.batch = 0; }), with<E>([](E& e) { e.channels = 0; })});

  using EG = EnsembleGradient;
  ok &= group<EG>(
      "gradients: means", kFloating,
      {
          EG{},
          with<EG>([](EG& e) { e.upsample = Upsample::nearest, e.border = Border::clamp; }),
          with<EG>([](EG& e) { e.border = Border::zeros, e.offsets = kReal; }),
          with<EG>([](EG& e) { e.stride[0] = 4, e.stride[1] = 6, e.channels = 64; }),
          with<EG>([](EG& e) { e.stride[0] = 6, e.stride[1] = 10, e.offsets = kReal; }),
          with<EG>([](EG& e) { e.grid[0] = e.grid[1] = 1, e.channels = 1, e.batch = 1; }),
          with<EG>([](EG& e) { e.channels = 64, e.skip = 1; }),
          with<EG>([](EG& e) { e.channels = 32, e.out_skip = 1; }),
          with<EG>([](EG& e) { e.channels = 151, e.layout = Layout::padded; }),
          with<EG>([](EG& e) { e.offsets = many(301), e.batch = 1, e.channels = 9; }),
          with<EG>([](EG& e) {
            e.offsets = kReal, e.weights = {1, 0, 2.5, 1e-3, 7};
            e.where = Where::device_f32;
          }),
          with<EG>([](EG& e) {
            e.offsets = {kNaN, 0, 1, kInf, 2, 2, -1, 0x1p21, 3, -1};
            e.where = Where::device_f64;
          }),
          with<EG>([](EG& e) { e.weights.assign(9, 0); }),
          with<EG>([](EG& e) { e.batch = 0; }),
          with<EG>([](EG& e) { e.channels = 0; }),
      });
  std::vector<EG> values;
  for (const Reduce reduce : {Reduce::moments, Reduce::median})
    for (const int64_t views : {9, 49, 130})
      for (const Layout layout : {Layout::channels_last, Layout::padded}) {
        EG e;
        e.reduce = reduce, e.layout = layout, e.offsets = many(views), e.batch = 1, e.prefix = 1;
        e.border = Border::clamp;
        // Values that are tokens: of two that are nearly the same, rounding cannot choose another.
        if (reduce == Reduce::median) e.upsample = Upsample::nearest;
        e.where = layout == Layout::padded ? Where::device_f64 : Where::host;
        values.push_back(e);
        if (reduce == Reduce::median) continue;
        values.push_back(e);
        values.back().weights.assign(views, 0.5);
        values.back().weights[3] = 0, values.back().stride[1] = 3;
      }
  ok &= group<EG>("gradients: moments, medians", kFloating, values);

  std::vector<S> modes;
  for (const Padding padding :
       {Padding::zeros, Padding::border, Padding::reflect, Padding::circular})
    for (const Interpolation interpolation :
         {Interpolation::nearest, Interpolation::bilinear, Interpolation::bicubic}) {
      S s;
      s.padding = padding;
      s.interpolation = interpolation;
      modes.push_back(s);
    }
  ok &= group<S>("shift: paddings, interpolations", kAll, modes);
  std::vector<ShiftGradient> gradients;
  for (const S& mode : modes) gradients.push_back({mode});
  gradients.push_back({with<S>([](S& s) { s.width = 272, s.height = 3, s.skip = 1; })});
  gradients.push_back({with<S>([](S& s) { s.width = 32, s.out_skip = 1; })});
  gradients.push_back({with<S>([](S& s) { s.width = s.height = 1; })});
  gradients.push_back({with<S>([](S& s) { s.planes = 0; })});
  gradients.push_back({with<S>([](S& s) { s.offsets = many(301), s.height = 2; })});
  gradients.push_back({with<S>([](S& s) {
    s.offsets = {kNaN, 0, 1, kInf, 0.5, 2, -1, 0x1p21};
    s.where = Where::device_f64;
  })});
  ok &= group<ShiftGradient>("gradients: shift", kFloating, gradients);
  ok &= group<S>("shift: widths, alignment", kAll,
                 {
                     with<S>([](S& s) { s.width = 16; }),
                     with<S>([](S& s) { s.width = 32, s.skip = 1; }),
                     with<S>([](S& s) { s.width = 32, s.out_skip = 1; }),
                     with<S>([](S& s) { s.width = 272, s.height = 3, s.planes = 1; }),
                     with<S>([](S& s) { s.width = 259, s.height = 17, s.planes = 1; }),
                     with<S>([](S& s) {
                       s.width = 272, s.planes = 1, s.interpolation = Interpolation::bicubic;
                     }),
                     with<S>([](S& s) { s.width = s.height = 1; }),
                     with<S>([](S& s) { s.width = 1, s.height = 40; }),
                     with<S>([](S& s) { s.planes = 0; }),
                 });
  ok &= group<S>("shift: numbers of the views", kAll,
                 {
                     with<S>([](S& s) { s.where = Where::device_f32; }),
                     with<S>([](S& s) { s.where = Where::device_f64; }),
                     with<S>([](S& s) {
                       s.offsets = {kNaN, 0, 1, kInf, 0.5, 2, -1, 0x1p21};
                       s.where = Where::device_f64;
                     }),
                     with<S>([](S& s) { s.offsets = many(301), s.planes = 1, s.height = 2; }),
                     with<S>([](S& s) {
                       s.offsets = many(301), s.planes = 1, s.height = 2, s.width = 32;
                       s.where = Where::device_f32;
                     }),
                 });
  return ok;
}

}  // namespace

// --probe: only asks the device whether it works. --reduced: a quarter of the calls, for the tools
// that slow them down.
int main(int argc, char** argv) {
  try {
    const std::string option = argc > 1 ? argv[1] : "";
    reduced = option == "--reduced";
    workspace_gap = poison_gap;
    cudaDeviceProp properties;
    CHECK(cudaGetDeviceProperties(&properties, 0));
    std::printf("%s, compute capability %d.%d\n", properties.name, properties.major,
                properties.minor);
    CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    if (option == "--probe") return 0;
    const bool ok = all() && !failed;
    CHECK(cudaDeviceSynchronize());
    CHECK(cudaStreamDestroy(stream));
    std::printf("%s\n", ok ? "all calls are right" : "FAILED");
    return ok ? 0 : 1;
  } catch (const std::exception& error) {
    std::printf("FAILED: %s\n", error.what());
    return 1;
  }
}
