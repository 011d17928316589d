// Runs the CPU kernels under sanitizers, without Python and torch (scripts/sanitize.sh). Eight
// threads call every kernel at the same time, on the thread pool of srt_ext.numpy, while a ninth
// thread changes the number of threads per call. Every result must be bitwise equal to the result
// of a serial call. Buffers end at the end of their allocation, so that an access out of bounds is
// detected. The exit status is 1 if a result differs.
//
//   cpu_sanitize [ROUNDS [SET]]    each thread runs ROUNDS rounds of all calls, for all instruction
//                                  sets or only for SET
//   cpu_sanitize --fault KIND      runs a fault that the sanitizer must report: race, overflow,
//                                  leak or undefined
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../csrc/numpy/thread_pool.h"
#include "../csrc/srt/cpu/dispatch.h"
#include "../csrc/srt/cpu/populate.h"
#include "../csrc/srt/validation.h"

namespace {

using namespace srt;
using List = std::vector<int64_t>;
using Bytes = std::vector<char>;

constexpr int kCallers = 8;
constexpr std::array<int64_t, 4> kThreadsOfACall{1, 2, 3, 8};

struct Type {
  const char* name;
  int64_t size;  // bytes
};
constexpr Type kFloating[] = {{"float32", 4}, {"float16", 2}, {"bfloat16", 2}, {"float64", 8}};
constexpr Type kUint8{"uint8", 1};

struct Call {
  std::string name;
  std::function<Bytes()> run;  // the bytes of its results
};

int64_t elements(const List& shape) {
  int64_t n = 1;
  for (const int64_t size : shape) n *= size;
  return n;
}

Bytes zeros(const List& shape, int64_t element) {
  return Bytes(static_cast<size_t>(elements(shape) * element));
}

// Bytes that are positive numbers of moderate magnitude in every type.
Bytes random_bytes(int64_t n) {
  std::mt19937 engine(1);
  Bytes bytes(static_cast<size_t>(n));
  for (char& byte : bytes) byte = static_cast<char>(0x38 + engine() % 7);
  return bytes;
}

ArrayView dense(const void* data, const List& shape, const Type& type) {
  ArrayView view{data, shape, List(shape.size(), 1), type.size, type.name};
  for (size_t d = shape.size() - 1; d > 0; --d) view.strides[d - 1] = view.strides[d] * shape[d];
  return view;
}

// ---- ensemble -----------------------------------------------------------------------------------

// Large enough that a call is divided among threads, and not a whole number of vectors.
struct Case {
  const char* name;
  List grid{7, 9}, patch{8, 8}, stride{1, 1};
  const char* upsample = "bilinear";
  const char* border = "coverage";
  bool weighted = false;
  int64_t batch = 1, channels = 35;
};
const Case kCases[] = {{"pixels"},
                       {"weighted", {7, 9}, {8, 8}, {2, 3}, "bilinear", "zeros", true, 2, 131},
                       {"nearest", {9, 7}, {8, 7}, {1, 1}, "nearest", "clamp"},
                       {"circular", {7, 9}, {8, 8}, {1, 1}, "bilinear", "circular"}};
const std::vector<double> kOffsets{0, 0, 0.25, -0.625, -3.3, 7.1, 2.5, 2.5, -0.7, -5.9, 3, -3};
const std::vector<double> kWeights{1, 0, 2.5, 1e-3, 7, 0.5};
const int64_t kViews = static_cast<int64_t>(kWeights.size());

// One checked call over the views [begin, end).
struct Ensemble {
  CheckedEnsemble call;

  Ensemble(const Case& c, const Type& type, Reduce reduce, const Bytes& tokens, bool stream,
           int64_t begin = 0, int64_t end = kViews)
      : call("sanitize", inputs(c, type, reduce, tokens, begin, end), reduce, stream) {}

 private:
  static EnsembleInputs inputs(const Case& c, const Type& type, Reduce reduce, const Bytes& tokens,
                               int64_t begin, int64_t end) {
    const List shape{end - begin, c.batch, c.grid[0] * c.grid[1], c.channels};
    const int64_t view = elements(shape) / shape[0] * type.size;
    std::optional<ArrayView> weights;
    if (c.weighted && reduce != Reduce::median)
      weights = dense(kWeights.data() + begin, {shape[0]}, kFloating[3]);
    return {dense(tokens.data() + begin * view, shape, type),
            dense(kOffsets.data() + 2 * begin, {shape[0], 2}, kFloating[3]),
            weights,
            c.grid,
            c.patch,
            c.stride,
            c.upsample,
            c.border};
  }
};

Bytes join(const std::vector<Bytes>& parts) {
  Bytes all;
  for (const Bytes& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

Bytes run_ensemble(const Case& c, const Type& type, Reduce reduce, const Bytes& tokens) {
  Ensemble e(c, type, reduce, tokens, /*stream=*/false);
  Bytes out = zeros(e.call.out_shape, type.size), variance = out;
  e.call.set_result(out.data(), variance.data());
  ensemble_cpu(e.call.args, numpy::thread_pool());
  return join({out, variance});
}

// A stream of three chunks of two views each.
Bytes run_stream(const Case& c, const Type& type, Reduce reduce, const Bytes& tokens) {
  const bool f64 = type.size == 8, median = reduce == Reduce::median;
  const Type& kept = kFloating[f64 ? 3 : 0];
  std::vector<Bytes> state;
  for (int64_t begin = 0; begin < kViews; begin += 2) {
    Ensemble e(c, type, reduce, tokens, /*stream=*/true, begin, begin + 2);
    List planes = e.call.out_shape;
    const List cells{planes[2], planes[3]};
    if (median) planes.insert(planes.begin(), kWindowPlanes);
    const size_t fields = e.call.state_names().size() - 1;
    if (state.empty()) {
      state.assign(fields, zeros(planes, kept.size));
      state.push_back(zeros(cells, 8));
    }
    std::vector<ArrayView> views;
    for (size_t i = 0; i < fields; ++i) views.push_back(dense(state[i].data(), planes, kept));
    views.push_back(dense(state.back().data(), cells, kFloating[3]));
    e.call.set_state(views);
    ensemble_cpu(e.call.args, numpy::thread_pool());
  }
  return join(state);
}

Bytes run_mean_backward(const Case& c, const Type& type, const Bytes& tokens) {
  Ensemble e(c, type, Reduce::mean, tokens, /*stream=*/false);
  Bytes grad = random_bytes(elements(e.call.out_shape) * type.size);
  Bytes grad_tokens = zeros(e.call.tokens.shape, type.size);
  e.call.set_result(grad.data());
  mean_backward_cpu(e.call.args, grad_tokens.data(), numpy::thread_pool());
  return grad_tokens;
}

void add_ensembles(std::vector<Call>& calls, const Case& c, const Type& type) {
  const int64_t n = kViews * c.batch * c.grid[0] * c.grid[1] * c.channels;
  const auto tokens = std::make_shared<const Bytes>(random_bytes(n * type.size));
  const std::string suffix = std::string(", ") + c.name + ", " + type.name;
  const std::pair<const char*, Reduce> reductions[] = {
      {"mean", Reduce::mean}, {"median", Reduce::median}, {"moments", Reduce::moments}};
  for (const auto& [name, reduce] : reductions) {
    calls.push_back({name + suffix, [&c, &type, reduce = reduce, tokens] {
                       return run_ensemble(c, type, reduce, *tokens);
                     }});
    calls.push_back({"stream of " + (name + suffix), [&c, &type, reduce = reduce, tokens] {
                       return run_stream(c, type, reduce, *tokens);
                     }});
  }
  calls.push_back({"gradient of a mean" + suffix,
                   [&c, &type, tokens] { return run_mean_backward(c, type, *tokens); }});
}

// ---- shift --------------------------------------------------------------------------------------

const List kImage{1, 3, 65, 127};

Bytes run_shift(const Type& type, const char* padding, const char* interpolation, bool gradient,
                const Bytes& image) {
  const ArrayView offsets = dense(kOffsets.data(), {kViews, 2}, kFloating[3]);
  CheckedShift call("sanitize", "image", dense(image.data(), kImage, type), offsets, padding,
                    interpolation, !gradient);
  Bytes views = zeros(call.out_shape, type.size);
  if (!gradient) {
    call.args.image = image.data();
    call.args.out = views.data();
    shift_cpu(call.args, numpy::thread_pool());
    return views;
  }
  views = random_bytes(static_cast<int64_t>(views.size()));
  call.args.out = views.data();
  Bytes grad = zeros(kImage, type.size);
  shift_backward_cpu(call.args, grad.data(), numpy::thread_pool());
  return grad;
}

void add_shifts(std::vector<Call>& calls, const Type& type) {
  const auto image = std::make_shared<const Bytes>(random_bytes(elements(kImage) * type.size));
  const std::pair<const char*, const char*> modes[] = {
      {"reflect", "bilinear"}, {"zeros", "bicubic"}, {"circular", "nearest"}};
  for (const auto& [padding, interpolation] : modes) {
    for (const bool gradient : {false, true}) {
      if (gradient && type.size == 1) continue;
      const std::string name = std::string(gradient ? "gradient of shift, " : "shift, ") + padding +
                               ", " + interpolation + ", " + type.name;
      calls.push_back({name, [=, &type, padding = padding, interpolation = interpolation] {
                         return run_shift(type, padding, interpolation, gradient, *image);
                       }});
    }
  }
}

// ---- windows ------------------------------------------------------------------------------------

enum class Of { windows, image, points };

Bytes run_windows(const Type& type, const char* padding, bool scaled, Of what, const Bytes& image) {
  const ArrayView centers = dense(kOffsets.data(), {1, kViews, 2}, kFloating[3]);
  const double steps[] = {1.5, -0.75};
  std::optional<ArrayView> scale;
  if (scaled) scale = dense(steps, {2}, kFloating[3]);
  const List size{40, 50};
  CheckedWindows call("sanitize",
                      {dense(image.data(), kImage, type), centers, size, scale, padding},
                      what == Of::windows);
  Bytes windows = zeros(call.out_shape, type.size);
  if (what != Of::windows) windows = random_bytes(static_cast<int64_t>(windows.size()));
  call.args.out = windows.data();
  if (what == Of::windows) {
    windows_cpu(call.args, numpy::thread_pool());
    return windows;
  }
  if (what == Of::image) {
    Bytes grad = zeros(kImage, type.size);
    windows_backward_image_cpu(call.args, grad.data(), numpy::thread_pool());
    return grad;
  }
  std::vector<Bytes> grads(2, zeros({kViews, 2}, 8));
  windows_backward_points_cpu(call.args, reinterpret_cast<double*>(grads[0].data()),
                              reinterpret_cast<double*>(grads[1].data()), numpy::thread_pool());
  return join(grads);
}

void add_windows(std::vector<Call>& calls, const Type& type) {
  const auto image = std::make_shared<const Bytes>(random_bytes(elements(kImage) * type.size));
  const std::pair<const char*, Of> kinds[] = {{"windows, ", Of::windows},
                                              {"gradient of windows, ", Of::image},
                                              {"gradient of their centers, ", Of::points}};
  for (const auto& [kind, what] : kinds) {
    if (what != Of::windows && type.size == 1) continue;
    for (const char* const padding : {"border", "zeros"}) {
      for (const bool scaled : {false, true}) {
        const std::string name = std::string(kind) + padding + ", " + type.name;
        calls.push_back({name, [=, &type, what = what] {
                           return run_windows(type, padding, scaled, what, *image);
                         }});
      }
    }
  }
}

// ---- page population and errors -----------------------------------------------------------------

// Populates the pages of a large new result.
Bytes run_fault_in() {
  const int64_t bytes = (int64_t{33} << 20) + 7;
  const std::unique_ptr<char, decltype(&std::free)> memory(
      static_cast<char*>(std::malloc(static_cast<size_t>(bytes))), &std::free);
  if (!memory) throw std::bad_alloc();
  fault_in(memory.get(), bytes, numpy::thread_pool());
  memory.get()[0] = memory.get()[bytes - 1] = 1;
  return {memory.get()[0], memory.get()[bytes - 1]};
}

Bytes run_refused() {
  Case wrong = kCases[0];
  wrong.stride = {3, 1};  // does not divide the image size
  const Bytes tokens(1);
  try {
    Ensemble(wrong, kFloating[0], Reduce::mean, tokens, /*stream=*/false);
  } catch (const Error& error) {
    const std::string text = error.text();
    return {text.begin(), text.end()};
  }
  return {};
}

std::vector<Call> all_calls() {
  std::vector<Call> calls{{"pages", &run_fault_in}, {"refused", &run_refused}};
  for (const Type& type : kFloating) {
    for (const Case& c : kCases) add_ensembles(calls, c, type);
    add_shifts(calls, type);
    add_windows(calls, type);
  }
  add_shifts(calls, kUint8);
  add_windows(calls, kUint8);
  return calls;
}

// ---- the threads --------------------------------------------------------------------------------

// Returns the number of results that differ from the serial ones.
int64_t run_callers(const std::vector<Call>& calls, int rounds) {
  numpy::set_threads(1);
  std::vector<Bytes> expected;
  for (const Call& call : calls) expected.push_back(call.run());

  std::atomic<int64_t> failures{0};
  std::atomic<bool> stop{false};
  const auto caller = [&](size_t first) {
    for (size_t i = 0; i < calls.size() * static_cast<size_t>(rounds); ++i) {
      const size_t at = (first + i) % calls.size();
      if (calls[at].run() == expected[at]) continue;
      ++failures;
      std::fprintf(stderr, "FAILED: %s differs from the serial result\n", calls[at].name.c_str());
    }
  };
  std::thread changer([&] {
    for (size_t i = 0; !stop; ++i) {
      numpy::set_threads(kThreadsOfACall[i % kThreadsOfACall.size()]);
      cpu::force_kernels(cpu::kernels().name);
      std::this_thread::sleep_for(std::chrono::microseconds(500));
    }
  });
  std::vector<std::thread> callers;
  for (size_t t = 0; t < kCallers; ++t) callers.emplace_back(caller, t * calls.size() / kCallers);
  for (std::thread& thread : callers) thread.join();
  stop = true;
  changer.join();
  return failures;
}

int run(int rounds, const std::string& sets) {
  const std::vector<Call> calls = all_calls();
  int64_t failures = 0;
  std::istringstream names(sets);
  for (std::string name; std::getline(names, name, ',');) {
    if (!cpu::force_kernels(name.c_str())) throw std::runtime_error("no kernels for " + name);
    failures += run_callers(calls, rounds);
    std::printf("%s: %d rounds of %zu calls on %d threads\n", name.c_str(), rounds, calls.size(),
                kCallers);
  }
  std::printf("%lld results differ\n", static_cast<long long>(failures));
  return failures == 0 ? 0 : 1;
}

// ---- deliberate faults, to check that the sanitizer reports them --------------------------------

// A thread of the pool and the caller write the same number, each in its own piece. They wait for
// each other with relaxed atomics, which do not order the writes.
void race() {
  struct Shared {
    std::atomic<int> arrived{0};
    int64_t written = 0;
  } shared;
  numpy::set_threads(2);
  const auto body = [](int64_t begin, int64_t, void* context) {
    Shared& both = *static_cast<Shared*>(context);
    both.arrived.fetch_add(1, std::memory_order_relaxed);
    while (both.arrived.load(std::memory_order_relaxed) < 2) std::this_thread::yield();
    both.written = begin;
  };
  numpy::thread_pool().run(2, body, &shared);
}

// The kernel reads one token past the end of the buffer.
void overflow() {
  const Case& c = kCases[0];
  const Bytes tokens(
      static_cast<size_t>((kViews * c.grid[0] * c.grid[1] - 1) * c.channels * kFloating[0].size));
  run_ensemble(c, kFloating[0], Reduce::mean, tokens);
}

void leak() {
  [[maybe_unused]] char* volatile memory = new char[1000];
  memory = nullptr;
}

void undefined() {
  volatile int largest = 0x7fffffff;
  largest = largest + 1;
}

int fail_on_purpose(const std::string& kind) {
  const std::pair<const char*, void (*)()> faults[] = {
      {"race", &race}, {"overflow", &overflow}, {"leak", &leak}, {"undefined", &undefined}};
  for (const auto& [name, make] : faults) {
    if (kind != name) continue;
    make();
    return 0;  // the sanitizer exits with another status
  }
  std::fprintf(stderr, "no such fault: %s\n", kind.c_str());
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (argc == 3 && std::strcmp(argv[1], "--fault") == 0) return fail_on_purpose(argv[2]);
    return run(argc > 1 ? std::atoi(argv[1]) : 1, argc > 2 ? argv[2] : cpu::available_kernels());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "FAILED: %s\n", error.what());
    return 1;
  }
}
