// The CUDA kernels under compute-sanitizer, for what pytest cannot do there: buffers end where
// their allocation ends (torch's caching allocator hides an access out of bounds), the gaps between
// the pieces of a workspace are watched, and every kernel runs in every dtype, layout and alignment
// without the start of Python and torch. Each call runs twice, on two poisons: the results must be
// the same to the last bit where there is an element, and the poison elsewhere. Whether they are
// right is for python_tests/test_cuda.py. Exit status 1 if any call fails.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
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

// Bytes of positive numbers of moderate size, in every type.
std::vector<char> random_bytes(int64_t n) {
  std::mt19937 engine(1);
  std::vector<char> bytes(n);
  for (char& byte : bytes) byte = static_cast<char>(0x38 + engine() % 7);
  return bytes;
}

// ---- device -------------------------------------------------------------------------------------

cudaStream_t stream;

// Ends where its allocation ends, and starts `skip` bytes into it: cudaMalloc alone gives only
// aligned addresses.
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
  ~Buffer() { cudaFree(base_); }  // what fails, fails again in the next call

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

// What lies between the pieces of the workspace of a call (cuda.h).
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
void check_gaps() {
  CHECK(cudaStreamSynchronize(stream));
  for (const Gap& gap : gaps) {
    std::vector<char> content(gap.bytes);
    CHECK(cudaMemcpy(content.data(), gap.at, gap.bytes, cudaMemcpyDeviceToHost));
    if (std::count(content.begin(), content.end(), kPoison) != gap.bytes)
      throw std::runtime_error("written between two pieces of the workspace");
  }
  gaps.clear();
}

// Offsets or weights, on the host or on the device.
enum class Where { host, device_f32, device_f64 };

template <class T>
std::vector<char> bytes_of(const std::vector<double>& values) {
  const std::vector<T> as(values.begin(), values.end());
  const char* const begin = reinterpret_cast<const char*>(as.data());
  return {begin, begin + as.size() * sizeof(T)};
}

struct Placed {
  Buffer device;
  ViewArray array{};

  Placed(const std::vector<double>& values, Where where)
      : device(where == Where::host         ? std::vector<char>{}
               : where == Where::device_f32 ? bytes_of<float>(values)
                                            : bytes_of<double>(values)) {
    if (values.empty()) return;
    if (where == Where::host) {
      array.host = values.data();
    } else {
      array = {nullptr, device.data(), where == Where::device_f32 ? DType::f32 : DType::f64};
    }
  }
};

// An element that is not written differs between two poisons, and so does a race.
// `exists[i]`: whether there is an element number i.
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
    const bool right =
        exists[i / type.size] ? first == second : first == poisons[0] && second == poisons[1];
    if (!right)
      throw std::runtime_error("byte " + std::to_string(i) +
                               (exists[i / type.size] ? " differs between two runs"
                                                      : " was written between the elements"));
  }
}

// ---- ensemble -----------------------------------------------------------------------------------

struct Ensemble {
  int64_t grid[2] = {3, 5}, patch[2] = {4, 6}, stride[2] = {1, 1};
  int64_t batch = 2, channels = 19;
  int64_t gap = 0;                 // elements between the channels of one token and of the next
  int64_t skip = 0, out_skip = 0;  // elements from an aligned address to the first
  bool padded = false, nchw = false;
  Upsample upsample = Upsample::bilinear;
  Border border = Border::coverage;
  Where where = Where::host;
  std::vector<double> offsets = {-3, -2, -3, 0, -3, 2, 0, -2, 0, 0, 0, 2, 3, -2, 3, 0, 3, 2};
  std::vector<double> weights;
};

EnsembleArgs arguments(const Ensemble& e, const Type& type, Reduce reduce) {
  const int64_t tokens = e.grid[0] * e.grid[1], pitch = e.channels + e.gap;
  const int64_t height = e.grid[0] * e.patch[0] / e.stride[0];
  const int64_t width = e.grid[1] * e.patch[1] / e.stride[1];
  EnsembleArgs args{};
  args.reduce = reduce;
  args.dtype = type.dtype;
  args.views = static_cast<int64_t>(e.offsets.size()) / 2;
  args.batch = e.batch;
  args.channels = e.channels;
  const int64_t token_strides[3] = {e.batch * tokens * pitch, tokens * pitch, pitch};
  std::copy_n(token_strides, 3, args.token_strides);
  std::copy_n(e.grid, 2, args.grid);
  std::copy_n(e.patch, 2, args.patch);
  std::copy_n(e.stride, 2, args.stride);
  args.upsample = e.upsample;
  args.border = e.border;
  const int64_t cell = e.channels + (e.padded ? 3 : 0), row = width * cell + (e.padded ? 5 : 0);
  const int64_t last[4] = {height * row, 1, row, cell};
  const int64_t first[4] = {e.channels * height * width, height * width, width, 1};
  std::copy_n(e.nchw ? first : last, 4, args.out_strides);
  args.plane_stride = e.batch * args.out_strides[0] + 16;
  return args;
}

// What is called: a reduction, as a stream or not, or the gradient of the mean.
struct Kind {
  const char* name;
  Reduce reduce;
  bool streams, gradient;
};
constexpr Kind kKinds[] = {{"mean", Reduce::mean, false, false},
                           {"median", Reduce::median, false, false},
                           {"moments", Reduce::moments, false, false},
                           {"stream of a mean", Reduce::mean, true, false},
                           {"stream of a median", Reduce::median, true, false},
                           {"stream of moments", Reduce::moments, true, false},
                           {"gradient of a mean", Reduce::mean, false, true}};

// The elements of [planes, B, C, H', W'].
std::vector<bool> elements_of(const EnsembleArgs& args, int64_t planes) {
  const int64_t height = args.grid[0] * args.patch[0] / args.stride[0];
  const int64_t width = args.grid[1] * args.patch[1] / args.stride[1];
  const int64_t* const strides = args.out_strides;
  std::vector<bool> exists;
  if (args.batch * args.channels == 0) return exists;
  exists.resize((planes - 1) * args.plane_stride + args.batch * strides[0]);
  for (int64_t p = 0; p < planes; ++p)
    for (int64_t b = 0; b < args.batch; ++b)
      for (int64_t c = 0; c < args.channels; ++c)
        for (int64_t y = 0; y < height; ++y)
          for (int64_t x = 0; x < width; ++x)
            exists[p * args.plane_stride + b * strides[0] + c * strides[1] + y * strides[2] +
                   x * strides[3]] = true;
  return exists;
}

void run(const Ensemble& e, const Kind& kind, const Type& type) {
  EnsembleArgs args = arguments(e, type, kind.reduce);
  const Placed offsets(e.offsets, e.where), weights(e.weights, e.where);
  const int64_t planes = kind.reduce == Reduce::moments                  ? 2
                         : kind.reduce == Reduce::median && kind.streams ? kWindowPlanes
                                                                         : 1;
  const std::vector<bool> field = elements_of(args, planes);
  if (kind.gradient) {
    const Buffer grad(random_bytes(static_cast<int64_t>(field.size()) * type.size),
                      e.skip * type.size);
    args.out = grad.data();
    const std::vector<bool> tokens(args.views * e.batch * e.grid[0] * e.grid[1] * e.channels, true);
    check_twice(type, e.out_skip, tokens, [&](char* out) {
      const Buffer space(mean_backward_cuda_workspace(args, offsets.array, weights.array));
      mean_backward_cuda("sanitize", args, offsets.array, weights.array, out, space.data(), stream);
      check_gaps();
    });
    return;
  }
  const int64_t tokens = std::max<int64_t>(0, args.views * args.token_strides[0] - e.gap);
  const Buffer device_tokens(random_bytes(tokens * type.size), e.skip * type.size);
  args.tokens = device_tokens.data();
  const Type& out_type = kind.streams ? kTypes[type.dtype == DType::f64 ? 3 : 0] : type;
  const std::vector<char> zeros(8 * e.grid[0] * e.patch[0] * e.grid[1] * e.patch[1] /
                                (e.stride[0] * e.stride[1]));
  check_twice(out_type, e.out_skip, field, [&](char* out) {
    const Buffer total_weight(zeros);
    if (kind.streams) args.total_weight = reinterpret_cast<double*>(total_weight.data());
    args.out = out;
    args.variance = out + args.plane_stride * out_type.size;
    const Buffer space(ensemble_cuda_workspace(args, offsets.array, weights.array));
    ensemble_cuda("sanitize", args, offsets.array, weights.array, space.data(), stream);
    check_gaps();
  });
}

// ---- shift --------------------------------------------------------------------------------------

struct Shift {
  int64_t planes = 3, height = 9, width = 21;
  int64_t skip = 0, out_skip = 0;
  Padding padding = Padding::reflect;
  Interpolation interpolation = Interpolation::bilinear;
  Where where = Where::host;
  std::vector<double> offsets = {0, 0, 0.25, -0.625, -3.3, 7.1, 2, -3, 2.5, 4, -40.5, 100.25};
};

void run(const Shift& s, bool gradient, const Type& type) {
  const Placed offsets(s.offsets, s.where);
  ShiftArgs args{};
  args.dtype = type.dtype;
  args.planes = s.planes;
  args.height = s.height;
  args.width = s.width;
  args.views = static_cast<int64_t>(s.offsets.size()) / 2;
  args.padding = s.padding;
  args.interpolation = s.interpolation;
  const int64_t image = s.planes * s.height * s.width, views = args.views * image;
  const Buffer input(random_bytes((gradient ? views : image) * type.size), s.skip * type.size);
  args.image = input.data();
  args.out = input.data();
  const std::vector<bool> all(gradient ? image : views, true);
  check_twice(type, s.out_skip, all, [&](char* out) {
    const Buffer space(shift_cuda_workspace(args));
    if (gradient) {
      shift_backward_cuda(args, offsets.array, out, space.data(), stream);
    } else {
      args.out = out;
      shift_cuda(args, offsets.array, space.data(), stream);
    }
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

using E = Ensemble;
using S = Shift;
constexpr void (*kEnsembles[])(E&) = {
    [](E&) {},
    [](E& e) { e.upsample = Upsample::nearest, e.border = Border::clamp; },
    [](E& e) { e.border = Border::zeros, e.offsets = kReal; },
    [](E& e) { e.border = Border::clamp, e.offsets = {12, 0, 0.5, -30, 0x1p20, -0x1p20}; },
    [](E& e) { e.stride[0] = 4, e.stride[1] = 6, e.upsample = Upsample::nearest; },
    [](E& e) { e.stride[0] = 6, e.stride[1] = 10, e.offsets = kReal, e.padded = true; },
    [](E& e) { e.stride[0] = 12, e.stride[1] = 30, e.border = Border::zeros; },
    [](E& e) { e.patch[0] = e.patch[1] = 1, e.stride[0] = 3, e.offsets = kReal; },
    [](E& e) { e.grid[0] = e.grid[1] = 1, e.channels = 1, e.batch = 1; },
    [](E& e) { e.channels = 64, e.skip = 1; },
    [](E& e) { e.channels = 32, e.out_skip = 1; },
    [](E& e) { e.channels = 16, e.gap = 1; },
    [](E& e) { e.channels = 151, e.batch = 1, e.padded = true; },
    [](E& e) { e.channels = 520, e.batch = 1, e.patch[0] = 2, e.patch[1] = 3; },
    [](E& e) { e.channels = 32, e.nchw = true; },
    [](E& e) { e.offsets = kReal, e.where = Where::device_f32; },
    [](E& e) { e.offsets = kRefused, e.where = Where::device_f64; },
    [](E& e) { e.offsets = many(25), e.channels = 40; },
    [](E& e) { e.offsets = many(50), e.channels = 8, e.where = Where::device_f64; },
    // More than the parameters of a kernel hold.
    [](E& e) { e.offsets = many(301), e.batch = 1, e.channels = 9; },
    [](E& e) { e.batch = 0; },
    [](E& e) { e.channels = 0; },
};
// Not of a median, which takes no weights.
constexpr void (*kWeighted[])(E&) = {
    [](E& e) { e.offsets = kReal, e.weights = {1, 0, 2.5, 1e-3, 7}, e.where = Where::device_f32; },
    [](E& e) { e.offsets = many(301), e.batch = 1, e.weights.assign(301, 0.5); },
    [](E& e) {
      e.offsets = kReal, e.weights = {kNaN, -1, 2, 0x1p-90, kInf}, e.where = Where::device_f64;
    },
};
// 330 tiles of 16 rows, 32 cells and 32 float32 channels, or as many of their like: enough for the
// mean's kernels with large tiles on a GPU of 165 processors.
constexpr void (*kLarge[])(E&) = {
    [](E& e) { e.batch = 5, e.channels = 2112; },
    [](E& e) { e.batch = 5, e.channels = 2112, e.stride[0] = 2, e.offsets = kReal; },
    [](E& e) { e.batch = 5, e.channels = 2112, e.upsample = Upsample::nearest; },
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
    [](S& s) { s.offsets = many(301), s.planes = 1, s.height = 2; },
    [](S& s) { s.offsets = kRefused, s.where = Where::device_f64; },
};

struct Checks {
  bool reduced;  // of the types one for each call
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

  template <size_t N>
  void ensembles(const Kind& kind, int first, void (*const (&changes)[N])(E&)) {
    for (size_t i = 0; i < N; ++i) {
      E e;
      changes[i](e);
      if (kind.gradient) e.nchw = false;  // channels are dense
      each_type(kFloating, kind.name, first + static_cast<int>(i),
                [&](const Type& type) { run(e, kind, type); });
    }
  }

  void shifts(bool gradient) {
    std::vector<S> cases;
    for (int mode = 0; mode < 12; ++mode) {
      cases.emplace_back();
      cases.back().padding = static_cast<Padding>(mode / 3);
      cases.back().interpolation = static_cast<Interpolation>(mode % 3);
    }
    for (const auto change : kShifts) change(cases.emplace_back());
    for (size_t i = 0; i < cases.size(); ++i)
      each_type(gradient ? kFloating : kFloating + 1, gradient ? "gradient of shift" : "shift",
                static_cast<int>(i), [&](const Type& type) { run(cases[i], gradient, type); });
  }

  void all() {
    for (const Kind& kind : kKinds) {
      ensembles(kind, 0, kEnsembles);
      if (kind.reduce != Reduce::median) ensembles(kind, 100, kWeighted);
    }
    ensembles(kKinds[0], 200, kLarge);
    shifts(false);
    shifts(true);
  }
};

}  // namespace

// --probe: only asks the device whether it works. --reduced: a quarter of the calls, for the tools
// that slow them down.
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
    checks.all();
    CHECK(cudaDeviceSynchronize());
    CHECK(cudaStreamDestroy(stream));
    std::printf("%d of %d calls failed\n", checks.failures, checks.calls);
    return checks.failures == 0 ? 0 : 1;
  } catch (const std::exception& error) {
    std::printf("FAILED: %s\n", error.what());
    return 1;
  }
}
