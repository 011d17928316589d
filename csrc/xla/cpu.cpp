// The handlers for the CPU, on XLA's thread pool.
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>

#include "../srt/cpu/populate.h"
#include "handlers.h"

namespace srt::xla {
namespace {

// One parallel region: pieces [0, n) that the caller and tasks of the pool take in turn. A task may
// start after the region has ended, so it shares the ownership of this object.
class Region {
 public:
  Region(int64_t n, Parallel::Body body, void* context) : n_(n), body_(body), context_(context) {}

  void work() {
    for (int64_t i; (i = next_++) < n_;) {
      body_(i, i + 1, context_);
      const std::lock_guard<std::mutex> lock(mutex_);
      if (++done_ == n_) finished_.notify_one();
    }
  }

  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    finished_.wait(lock, [&] { return done_ == n_; });
  }

 private:
  const int64_t n_;
  const Parallel::Body body_;
  void* const context_;
  std::atomic<int64_t> next_{0};
  std::mutex mutex_;
  std::condition_variable finished_;
  int64_t done_ = 0;
};

// The pool of the call that this thread runs, because Parallel::run has no argument for it.
thread_local ffi::ThreadPool* current_pool = nullptr;

// The caller waits only for pieces that are already running, so a pool without an idle thread
// delays no call.
void run(int64_t n, Parallel::Body body, void* context) {
  const auto region = std::make_shared<Region>(n, body, context);
  const int64_t helpers = std::min(n, current_pool->num_threads()) - 1;
  try {
    for (int64_t i = 0; i < helpers; ++i) current_pool->Schedule([region] { region->work(); });
  } catch (const std::bad_alloc&) {
    // The caller processes the pieces that no task takes.
  }
  region->work();
  region->wait();
}

struct Cpu {
  Parallel parallel;
  std::vector<std::vector<double>> scratch{};

  void populate(const std::vector<ArrayView>& results) const {
    for (const ArrayView& result : results)
      fault_in(const_cast<void*>(result.data), element_count(result) * result.element_size,
               parallel);
  }

  double* doubles(const ArrayView& result) {
    if (result.dtype == "float64") return static_cast<double*>(const_cast<void*>(result.data));
    return scratch.emplace_back(element_count(result)).data();
  }
  void zero(double* weight, const ArrayView& result) const {
    std::fill_n(weight, element_count(result), 0.0);
  }
  void round(const char*, const double* from, const ArrayView& result) const {
    if (result.data == from) return;
    std::transform(from, from + element_count(result),
                   static_cast<float*>(const_cast<void*>(result.data)),
                   [](double value) { return static_cast<float>(value); });
  }
  void ensemble(const EnsembleCall& call, const std::vector<ArrayView>& results) const {
    populate(results);
    ensemble_cpu(call.checked.args, parallel);
  }
  void mean_backward(const EnsembleCall& call, const ArrayView& grad_tokens) const {
    populate({grad_tokens});
    mean_backward_cpu(call.checked.args, const_cast<void*>(grad_tokens.data), parallel);
  }
  void shift(const CheckedShift& call, const Numbers&, const ArrayView& out) const {
    populate({out});
    shift_cpu(call.args, parallel);
  }
  void shift_backward(const CheckedShift& call, const Numbers&, const ArrayView& grad_image) const {
    shift_backward_cpu(call.args, const_cast<void*>(grad_image.data), parallel);
  }
  void windows(const CheckedWindows& call, const Numbers&, const ArrayView& out) const {
    populate({out});
    windows_cpu(call.args, parallel);
  }
  void windows_backward_image(const CheckedWindows& call, const Numbers&,
                              const ArrayView& grad_image) const {
    windows_backward_image_cpu(call.args, const_cast<void*>(grad_image.data), parallel);
  }
  void windows_backward_points(const CheckedWindows& call, const Numbers&, double* centers,
                               double* scale) const {
    windows_backward_points_cpu(call.args, centers, scale, parallel);
  }
};

// Fills the results with NaN (uint8: 255).
void fill(ffi::RemainingRets results) {
  for (size_t i = 0; i < results.size(); ++i) {
    const ffi::AnyBuffer result = *results.get<ffi::AnyBuffer>(i).value();
    std::memset(result.untyped_data(), 0xff, result.size_bytes());
  }
}

template <void (*handler)(Cpu&, Call)>
ffi::Error on_pool(ffi::ThreadPool pool, ffi::RemainingArgs operands, ffi::RemainingRets results,
                   ffi::Dictionary attributes) {
  current_pool = &pool;
  Cpu backend{{std::max<int64_t>(1, pool.num_threads()), run}};
  const ffi::Error error =
      error_of([&] { handler(backend, Call("cpu", operands, results, attributes)); });
  if (error.errc() != ffi::ErrorCode::kInvalidArgument || !attributes.contains("sharded"))
    return error;
  // An error on one of several devices would stop the process: the others would wait for it.
  fill(results);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace srt::xla

using namespace srt::xla;

#define SRT_XLA_HANDLER(name)                                   \
  SRT_XLA_EXPORT XLA_FFI_Error* srt_##name(XLA_FFI_CallFrame*); \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                \
      srt_##name, (on_pool<&Handlers<Cpu>::name>),              \
      ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets().Attrs());
SRT_XLA_HANDLERS
