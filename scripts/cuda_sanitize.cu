// Runs every CUDA kernel in every dtype, layout and alignment under compute-sanitizer, without
// starting Python and torch. Unlike under pytest, buffers end at the end of their allocation (the
// caching allocator of torch hides accesses out of bounds), and the gaps between the pieces of a
// workspace are checked. Each call runs twice, with the output filled with two different poison
// values: elements must be bitwise equal in both runs, and all other bytes must still be poison.
// The values themselves are checked by python_tests (test_kernels.py, test_cuda.py). The exit
// status is 1 if a call fails.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <iterator>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../csrc/srt/cuda/cuda.h"

namespace {

using namespace srt;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

#define CHECK(call)                                                                   \
  do {                                                                                \
    const cudaError_t status = (call);                                                \
    if (status != cudaSuccess)                                                        \
      throw std::runtime_error(std::string(#call ": ") + cudaGetErrorString(status)); \
  } while (false)

struct Type {
  DType dtype;
  const char* name;
  int64_t size;  // bytes
};
constexpr Type kTypes[] = {{DType::f32, "f32", 4},
                           {DType::f16, "f16", 2},
                           {DType::bf16, "bf16", 2},
                           {DType::f64, "f64", 8},
                           {DType::u8, "u8", 1}};
constexpr int kFloating = 4;

// Bytes that are positive numbers of moderate magnitude in every type.
std::vector<char> random_bytes(int64_t n) {
  std::mt19937 engine(1);
  std::vector<char> bytes(n);
  for (char& byte : bytes) byte = static_cast<char>(0x38 + engine() % 7);
  return bytes;
}

// ---- device -------------------------------------------------------------------------------------

cudaStream_t stream;

// A buffer that ends at the end of its allocation and starts `skip` bytes after its beginning,
// because cudaMalloc only returns aligned addresses.
class Buffer {
 public:
  explicit Buffer(int64_t bytes, int64_t skip = 0) : bytes_(bytes), skip_(skip) {
    if (bytes > 0) CHECK(cudaMalloc(&base_, bytes + skip));
  }
  explicit Buffer(const std::vector<char>& content, int64_t skip = 0)
      : Buffer(static_cast<int64_t>(content.size()), skip) {
    if (bytes_ > 0)
      CHECK(cudaMemcpyAsync(data(), content.data(), bytes_, cudaMemcpyHostToDevice, stream));
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { cudaFree(base_); }  // an error is reported by the next call, too

  char* data() const { return base_ ? static_cast<char*>(base_) + skip_ : nullptr; }
  void fill(int byte) const {
    if (bytes_ > 0) CHECK(cudaMemsetAsync(data(), byte, bytes_, stream));
  }
  std::vector<char> read() const {
    std::vector<char> content(bytes_);
    if (bytes_ > 0)
      CHECK(cudaMemcpyAsync(content.data(), data(), bytes_, cudaMemcpyDeviceToHost, stream));
    CHECK(cudaStreamSynchronize(stream));
    return content;
  }

 private:
  int64_t bytes_, skip_;
  void* base_ = nullptr;
};

// The gaps between the pieces of the workspace of a call (cuda.h), with their sizes in bytes.
std::vector<std::pair<void*, int64_t>> gaps;
constexpr char kPoison = 0x5a;

void poison_gap(void* at, int64_t bytes) {
  CHECK(cudaMemsetAsync(at, kPoison, bytes, stream));
  gaps.emplace_back(at, bytes);
}

// Synchronises with a call and checks its gaps. The workspace must still exist.
void check_gaps() {
  CHECK(cudaStreamSynchronize(stream));
  for (const auto& [at, bytes] : gaps) {
    std::vector<char> content(bytes);
    CHECK(cudaMemcpy(content.data(), at, bytes, cudaMemcpyDeviceToHost));
    if (std::count(content.begin(), content.end(), kPoison) != bytes)
      throw std::runtime_error("written between two pieces of the workspace");
  }
  gaps.clear();
}

// The location of offsets or weights.
enum class Where { host, device_f32, device_f64 };

template <class T>
std::vector<char> bytes_of(const std::vector<double>& values) {
  const std::vector<T> as(values.begin(), values.end());
  const char* const begin = reinterpret_cast<const char*>(as.data());
  return {begin, begin + as.size() * sizeof(T)};
}

struct Placed {
  Buffer device;
  ViewArray array;

  Placed(const std::vector<double>& values, Where where)
      : device(where == Where::device_f32 ? bytes_of<float>(values) : bytes_of<double>(values)),
        array{nullptr, device.data(), where == Where::device_f32 ? DType::f32 : DType::f64} {
    if (where == Where::host && !values.empty()) array = {values.data(), nullptr, DType::f64};
  }
};

// Runs a call twice with different poison values in the output. This detects elements that are not
// written, and races. `exists[i]` states whether position i of the output is an element.
template <class Run>
void check_twice(const Type& type, int64_t skip, const std::vector<bool>& exists, Run&& run) {
  const Buffer out(static_cast<int64_t>(exists.size()) * type.size, skip * type.size);
  std::vector<char> results[2];
  const char poisons[2] = {static_cast<char>(0xff), 0x5a};
  for (int i = 0; i < 2; ++i) {
    out.fill(poisons[i]);
    run(out.data());
    CHECK(cudaGetLastError());
    results[i] = out.read();
  }
  for (size_t i = 0; i < results[0].size(); ++i) {
    const char first = results[0][i], second = results[1][i];
    const bool element = exists[i / type.size];
    if (element ? first != second : first != poisons[0] || second != poisons[1])
      throw std::runtime_error(
          "byte " + std::to_string(i) +
          (element ? " differs between two runs" : " was written between the elements"));
  }
}

// ---- ensemble -----------------------------------------------------------------------------------

struct Ensemble : EnsembleArgs {
  int64_t gap = 0;                 // unused elements between tokens
  int64_t skip = 0, out_skip = 0;  // elements between an aligned address and the data
  bool padded = false, nchw = false;
  Where where = Where::host;
  std::vector<double> offset_list = {-3, -2, -3, 0, -3, 2, 0, -2, 0, 0, 0, 2, 3, -2, 3, 0, 3, 2};
  std::vector<double> weight_list;

  Ensemble() : EnsembleArgs{} {
    grid[0] = 3, grid[1] = 5, patch[0] = 4, patch[1] = 6, stride[0] = stride[1] = 1;
    batch = 2, channels = 19;
    upsample = Upsample::bilinear;
  }
  int64_t height() const { return grid[0] * patch[0] / stride[0]; }
  int64_t width() const { return grid[1] * patch[1] / stride[1]; }

  void set_layout() {
    const int64_t tokens = grid[0] * grid[1], pitch = channels + gap;
    const int64_t cell = channels + (padded ? 3 : 0), row = width() * cell + (padded ? 5 : 0);
    const int64_t of_tokens[3] = {batch * tokens * pitch, tokens * pitch, pitch};
    const int64_t last[4] = {height() * row, 1, row, cell};
    const int64_t first[4] = {channels * height() * width(), height() * width(), width(), 1};
    views = static_cast<int64_t>(offset_list.size()) / 2;
    std::copy_n(of_tokens, 3, token_strides);
    std::copy_n(nchw ? first : last, 4, out_strides);
    plane_stride = batch * out_strides[0] + 16;
  }

  // Which positions are elements of [planes, B, C, H', W'].
  std::vector<bool> elements(int64_t planes) const {
    std::vector<bool> exists;
    if (batch * channels == 0) return exists;
    exists.resize((planes - 1) * plane_stride + batch * out_strides[0]);
    for (int64_t i = 0; i < planes * batch * channels * height() * width(); ++i) {
      const int64_t x = i % width(), y = i / width() % height(), plane = i / width() / height();
      exists[plane / channels / batch * plane_stride + plane / channels % batch * out_strides[0] +
             plane % channels * out_strides[1] + y * out_strides[2] + x * out_strides[3]] = true;
    }
    return exists;
  }
};

// The kind of a call: a reduction, of one call or of a stream, or the gradient of the mean.
// `planes` is the number of planes that it writes (or, for the gradient, reads).
struct Kind {
  const char* name;
  Reduce reduce;
  int64_t planes;
  bool streams, gradient;
};
constexpr Kind kKinds[] = {{"mean", Reduce::mean, 1, false, false},
                           {"median", Reduce::median, 1, false, false},
                           {"moments", Reduce::moments, 2, false, false},
                           {"stream of a mean", Reduce::mean, 1, true, false},
                           {"stream of a median", Reduce::median, kWindowPlanes, true, false},
                           {"stream of moments", Reduce::moments, 2, true, false},
                           {"gradient of a mean", Reduce::mean, 1, false, true}};

void run(Ensemble e, const Kind& kind, const Type& type) {
  e.reduce = kind.reduce;
  e.dtype = type.dtype;
  e.set_layout();
  const Placed offsets(e.offset_list, e.where), weights(e.weight_list, e.where);
  const std::vector<bool> field = e.elements(kind.planes);
  const int64_t tokens = e.views * e.batch * e.grid[0] * e.grid[1];
  const int64_t read = kind.gradient ? static_cast<int64_t>(field.size())
                                     : std::max<int64_t>(0, tokens * (e.channels + e.gap) - e.gap);
  const Buffer input(random_bytes(read * type.size), e.skip * type.size);
  e.tokens = e.out = input.data();
  const Type& out_type = kind.streams ? kTypes[type.dtype == DType::f64 ? 3 : 0] : type;
  const std::vector<bool> written =
      kind.gradient ? std::vector<bool>(tokens * e.channels, true) : field;
  check_twice(out_type, e.out_skip, written, [&](char* out) {
    if (kind.gradient) {
      const Buffer space(mean_backward_cuda_workspace(e, offsets.array, weights.array));
      mean_backward_cuda("sanitize", e, offsets.array, weights.array, out, space.data(), stream);
      return check_gaps();
    }
    const Buffer total_weight(std::vector<char>(8 * e.height() * e.width()));
    if (kind.streams) e.total_weight = reinterpret_cast<double*>(total_weight.data());
    e.out = out;
    e.variance = out + e.plane_stride * out_type.size;
    const Buffer space(ensemble_cuda_workspace(e, offsets.array, weights.array));
    ensemble_cuda("sanitize", e, offsets.array, weights.array, space.data(), stream);
    check_gaps();
  });
}

// ---- shift --------------------------------------------------------------------------------------

struct Shift : ShiftArgs {
  int64_t skip = 0, out_skip = 0;
  Where where = Where::host;
  std::vector<double> offset_list = {0, 0, 0.25, -0.625, -3.3, 7.1, 2, -3, 2.5, 4, -40.5, 100.25};

  Shift() : ShiftArgs{} {
    planes = 3, height = 9, width = 21;
    padding = Padding::reflect, interpolation = Interpolation::bilinear;
  }
};

void run(Shift s, bool gradient, const Type& type) {
  const Placed offsets(s.offset_list, s.where);
  s.dtype = type.dtype;
  s.views = static_cast<int64_t>(s.offset_list.size()) / 2;
  const int64_t image = s.planes * s.height * s.width, views = s.views * image;
  const Buffer input(random_bytes((gradient ? views : image) * type.size), s.skip * type.size);
  s.image = s.out = input.data();
  const std::vector<bool> all(gradient ? image : views, true);
  check_twice(type, s.out_skip, all, [&](char* out) {
    const Buffer space(shift_cuda_workspace(s));
    if (gradient) {
      shift_backward_cuda(s, offsets.array, out, space.data(), stream);
    } else {
      s.out = out;
      shift_cuda(s, offsets.array, space.data(), stream);
    }
    check_gaps();
  });
}

// ---- windows ------------------------------------------------------------------------------------

struct Windows : WindowsArgs {
  int64_t skip = 0, out_skip = 0;
  bool channels_last = false;
  Where where = Where::host;
  std::vector<double> center_list = {4, 10.5, 5.25, 8.625, 3.3, 17.1, -1.5, 2.5, 8.9, 30, -70, 99};
  std::vector<double> scale_list;  // for all windows, or for each window of an image

  Windows() : WindowsArgs{} {
    batch = 2, channels = 3, height = 9, width = 21;
    size[0] = 4, size[1] = 5;
    padding = Padding::border;
  }
  void set_layout() {
    const int64_t plane = height * width;
    const int64_t first[4] = {channels * plane, plane, width, 1};
    const int64_t last[4] = {channels * plane, 1, width * channels, channels};
    std::copy_n(channels_last ? last : first, 4, image_strides);
    count = static_cast<int64_t>(center_list.size()) / 2;
    scale_of_each = scale_list.size() > 2;
  }
  // Repeats values for each image of the batch.
  std::vector<double> repeated(const std::vector<double>& values) const {
    std::vector<double> all;
    for (int64_t b = 0; b < batch; ++b) all.insert(all.end(), values.begin(), values.end());
    return all;
  }
};

enum class Of { windows, image, points };  // the output of a call

void run(Windows w, Of what, const Type& type) {
  w.dtype = type.dtype;
  w.set_layout();
  const Placed centers(w.repeated(w.center_list), w.where);
  const Placed scale(w.scale_of_each ? w.repeated(w.scale_list) : w.scale_list, w.where);
  const int64_t image = w.batch * w.channels * w.height * w.width, points = 4 * w.batch * w.count;
  const int64_t windows = w.batch * w.count * w.channels * w.size[0] * w.size[1];
  const Buffer pixels(random_bytes(image * type.size), w.skip * type.size);
  const Buffer grad(random_bytes(windows * type.size), w.skip * type.size);
  w.image = pixels.data();
  w.out = grad.data();
  const Type& out_type = what == Of::points ? kTypes[3] : type;  // float64
  const int64_t written = what == Of::windows ? windows : what == Of::image ? image : points;
  check_twice(out_type, w.out_skip, std::vector<bool>(written, true), [&](char* out) {
    if (what == Of::windows) {
      w.out = out;
      const Buffer space(windows_cuda_workspace(w, centers.array, scale.array));
      windows_cuda(w, centers.array, scale.array, space.data(), stream);
      return check_gaps();
    }
    if (what == Of::image) {
      const Buffer space(windows_backward_image_cuda_workspace(w, centers.array, scale.array));
      windows_backward_image_cuda(w, centers.array, scale.array, out, space.data(), stream);
      return check_gaps();
    }
    double* const to = reinterpret_cast<double*>(out);
    const Buffer space(windows_backward_points_cuda_workspace(w, centers.array, scale.array));
    windows_backward_points_cuda(w, centers.array, scale.array, to, to + points / 2, space.data(),
                                 stream);
    check_gaps();
  });
}

// ---- the calls ----------------------------------------------------------------------------------

const std::vector<double> kReal = {0, 0, 0.25, -0.625, -3.3, 7.1, 2.5, 2.5, -0.7, -5.9};
const std::vector<double> kRefused = {kNaN, 0, 1, kInf, 2, 2, -1, 0x1p21, 3, -1};

std::vector<double> many(int64_t views) {
  std::vector<double> offsets(2 * views);
  std::mt19937 engine(3);
  std::uniform_real_distribution<double> real(-9, 9);
  for (double& offset : offsets) offset = std::round(8 * real(engine)) / 8;
  return offsets;
}

constexpr int64_t kManyChannels = 2112;

using E = Ensemble;
using S = Shift;
using W = Windows;
constexpr void (*kEnsembles[])(E&) = {
    [](E&) {},
    [](E& e) { e.upsample = Upsample::nearest, e.border = Border::clamp; },
    [](E& e) { e.border = Border::zeros, e.offset_list = kReal; },
    [](E& e) { e.border = Border::clamp, e.offset_list = {12, 0, 0.5, -30, 0x1p20, -0x1p20}; },
    [](E& e) { e.border = Border::circular, e.offset_list = kReal; },
    [](E& e) { e.stride[0] = 4, e.stride[1] = 6, e.upsample = Upsample::nearest; },
    [](E& e) { e.stride[0] = 6, e.stride[1] = 10, e.offset_list = kReal, e.padded = true; },
    [](E& e) { e.stride[0] = 12, e.stride[1] = 30, e.border = Border::zeros; },
    [](E& e) { e.patch[0] = e.patch[1] = 1, e.stride[0] = 3, e.offset_list = kReal; },
    [](E& e) { e.grid[0] = e.grid[1] = 1, e.channels = 1, e.batch = 1; },
    [](E& e) { e.channels = 64, e.skip = 1; },
    [](E& e) { e.channels = 32, e.out_skip = 1; },
    [](E& e) { e.channels = 16, e.gap = 1; },
    [](E& e) { e.channels = 151, e.batch = 1, e.padded = true; },
    [](E& e) { e.channels = 520, e.batch = 1, e.patch[0] = 2, e.patch[1] = 3; },
    [](E& e) { e.channels = 32, e.nchw = true; },
    [](E& e) { e.offset_list = kReal, e.where = Where::device_f32; },
    [](E& e) { e.offset_list = kRefused, e.where = Where::device_f64; },
    [](E& e) { e.offset_list = many(25), e.channels = 40; },
    [](E& e) { e.offset_list = many(50), e.channels = 8, e.where = Where::device_f64; },
    // More views than fit the kernel parameters.
    [](E& e) { e.offset_list = many(301), e.batch = 1, e.channels = 9; },
    [](E& e) { e.batch = 0; },
    [](E& e) { e.channels = 0; },
    [](E& e) {
      e.offset_list = kReal, e.weight_list = {1, 0, 2.5, 1e-3, 7};
      e.where = Where::device_f32;
    },
    [](E& e) { e.offset_list = many(301), e.batch = 1, e.weight_list.assign(301, 0.5); },
    [](E& e) {
      e.offset_list = kReal, e.weight_list = {kNaN, -1, 2, 0x1p-90, kInf};
      e.where = Where::device_f64;
    },
    // 330 chunks of 32 channels: tiles that fill a GPU of 165 multiprocessors.
    [](E& e) { e.batch = 5, e.channels = kManyChannels; },
    [](E& e) { e.batch = 5, e.channels = kManyChannels, e.stride[0] = 2, e.offset_list = kReal; },
    [](E& e) { e.batch = 5, e.channels = kManyChannels, e.upsample = Upsample::nearest; },
};
constexpr void (*kShifts[])(S&) = {
    [](S& s) { s.width = 16, s.where = Where::device_f32; },
    [](S& s) { s.width = 32, s.skip = 1; },
    [](S& s) { s.width = 32, s.out_skip = 1; },
    [](S& s) { s.width = 272, s.height = 3, s.planes = 1; },
    [](S& s) { s.width = 259, s.height = 17, s.interpolation = Interpolation::bicubic; },
    [](S& s) { s.width = s.height = 1; },
    [](S& s) { s.width = 1, s.height = 40; },
    [](S& s) { s.planes = 0; },
    [](S& s) { s.offset_list = many(301), s.planes = 1, s.height = 2; },
    [](S& s) { s.offset_list = kRefused, s.where = Where::device_f64; },
};

constexpr void (*kWindows[])(W&) = {
    [](W& w) { w.padding = Padding::zeros; },
    [](W& w) { w.padding = Padding::reflect, w.scale_list = {1.5, -0.5}; },
    [](W& w) { w.padding = Padding::circular, w.where = Where::device_f32; },
    [](W& w) { w.scale_list = {1, 1, 2, 0.5, 0, 1, -1, 1, 40, 0.1, 1, 1}; },
    [](W& w) { w.center_list = kRefused, w.where = Where::device_f64; },
    [](W& w) { w.scale_list = {kNaN, 1}, w.where = Where::device_f32; },
    [](W& w) { w.size[0] = 20, w.size[1] = 17, w.channels = 18; },
    [](W& w) { w.size[0] = 1, w.size[1] = 300, w.width = 259, w.channels_last = true; },
    [](W& w) { w.size[0] = 300, w.size[1] = 1, w.width = 1; },
    // Points, with and without vectors of channels.
    [](W& w) { w.size[0] = w.size[1] = 1, w.channels = 3; },
    [](W& w) { w.size[0] = w.size[1] = 1, w.channels = 64, w.channels_last = true; },
    [](W& w) { w.size[0] = w.size[1] = 1, w.channels = 64, w.channels_last = true, w.skip = 1; },
    [](W& w) {
      w.size[0] = w.size[1] = 1, w.channels = 1058, w.channels_last = true, w.out_skip = 1;
    },
    // More windows than fit the kernel parameters, and than a block sorts at a time.
    [](W& w) { w.center_list = many(700), w.width = 300; },
    [](W& w) { w.center_list = many(700), w.size[0] = w.size[1] = 1, w.channels = 40; },
    [](W& w) { w.height = w.width = 1; },
    [](W& w) { w.center_list = {}; },
    [](W& w) { w.batch = 0; },
    [](W& w) { w.channels = 0; },
};

struct Checks {
  bool reduced;  // only one type for each call
  int calls = 0, failures = 0;

  template <class Run>
  void each_type(int types, const char* what, int number, Run&& run) {
    for (int t = 0; t < types; ++t) {
      if (reduced && t != number % types) continue;
      ++calls;
      try {
        run(kTypes[t]);
      } catch (const std::exception& error) {
        ++failures;
        gaps.clear();
        std::printf("FAILED: %s, call %d, %s: %s\n", what, number, kTypes[t].name, error.what());
      }
    }
  }

  void ensembles(const Kind& kind) {
    for (size_t i = 0; i < std::size(kEnsembles); ++i) {
      E e;
      kEnsembles[i](e);
      if (kind.reduce == Reduce::median && !e.weight_list.empty()) continue;  // no weights
      if (e.channels == kManyChannels && &kind != kKinds) continue;
      if (kind.gradient) e.nchw = false;  // requires dense channels
      each_type(kFloating, kind.name, static_cast<int>(i),
                [&](const Type& type) { run(e, kind, type); });
    }
  }

  void shifts(bool gradient) {
    constexpr int kModes = 12;  // combinations of padding and interpolation, before kShifts
    for (int i = 0; i < kModes + static_cast<int>(std::size(kShifts)); ++i) {
      S s;
      if (i < kModes) {
        s.padding = static_cast<Padding>(i / 3);
        s.interpolation = static_cast<Interpolation>(i % 3);
      } else {
        kShifts[i - kModes](s);
      }
      each_type(gradient ? kFloating : kFloating + 1, gradient ? "gradient of shift" : "shift", i,
                [&](const Type& type) { run(s, gradient, type); });
    }
  }

  void windows(Of what, const char* name) {
    for (size_t i = 0; i < std::size(kWindows); ++i) {
      W w;
      kWindows[i](w);
      each_type(what == Of::windows ? kFloating + 1 : kFloating, name, static_cast<int>(i),
                [&](const Type& type) { run(w, what, type); });
    }
  }
};

}  // namespace

// --probe only checks that the device works. --reduced runs a quarter of the calls, for slow tools.
int main(int argc, char** argv) {
  try {
    const std::string option = argc > 1 ? argv[1] : "";
    workspace_gap = poison_gap;
    cudaDeviceProp properties;
    CHECK(cudaGetDeviceProperties(&properties, 0));
    std::printf("%s, compute capability %d.%d\n", properties.name, properties.major,
                properties.minor);
    CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    if (option == "--probe") return 0;
    Checks checks{option == "--reduced"};
    for (const Kind& kind : kKinds) checks.ensembles(kind);
    checks.shifts(false);
    checks.shifts(true);
    checks.windows(Of::windows, "windows");
    checks.windows(Of::image, "gradient of windows");
    checks.windows(Of::points, "gradient of the centers and the scale of windows");
    CHECK(cudaDeviceSynchronize());
    CHECK(cudaStreamDestroy(stream));
    std::printf("%d of %d calls failed\n", checks.failures, checks.calls);
    return checks.failures == 0 ? 0 : 1;
  } catch (const std::exception& error) {
    std::printf("FAILED: %s\n", error.what());
    return 1;
  }
}
