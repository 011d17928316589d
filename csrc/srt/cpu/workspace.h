// Allocates the scratch memory of the workers of one call and distributes its tasks over them.
#pragma once
#if defined(__linux__)
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "../types.h"
#include "dispatch.h"

namespace srt::cpu {

constexpr int64_t kAlign = 64;
inline int64_t align_up(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// Bytes of the second-level cache for the sums of a task; the rest is left to tokens and output.
// Initialised when the library is loaded, not as a local static: if a process forks while another
// thread initialises a local static, the child waits for it forever.
inline const int64_t sums_bytes = [] {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  const int64_t cache = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (cache > 0) return cache / 4 * 3;
#endif
  return int64_t{768 * 1024};
}();

// Returns how many channels, in whole blocks, fit the cache at `bytes` per channel.
inline int64_t fitting_channels(int64_t channels, int64_t block, int64_t bytes) {
  const int64_t blocks = div_up(channels, block);
  const int64_t fit = std::clamp<int64_t>(sums_bytes / (bytes * block), 1, blocks);
  return div_up(blocks, div_up(blocks, fit)) * block;  // parts of equal size
}

// Thrown if the memory for tables or scratch cannot be allocated. In Python, torch and pybind11
// raise it as a MemoryError with this text. (If the result cannot be allocated, torch raises a
// RuntimeError.)
struct OutOfMemory : std::bad_alloc {
  const char* what() const noexcept override {
    return "srt: not enough memory for the tables of the offsets and the scratch memory of the "
           "threads; pass fewer views per call";
  }
};

// Calls call(); replaces std::bad_alloc by OutOfMemory.
template <class Call>
void with_memory(Call&& call) {
  try {
    call();
  } catch (const std::bad_alloc&) {
    throw OutOfMemory();
  }
}

// Lays out arrays one after the other, aligned.
struct Layout {
  int64_t bytes = 0;
  template <class T>
  void place(ScratchArray<T>& array, int64_t n) {
    array.offset = bytes;
    bytes += align_up(n * static_cast<int64_t>(sizeof(T)));
  }
};

// The number of workers for `work` multiply-adds. Below about 100 microseconds, a second thread
// costs more than it saves.
inline int64_t workers_for(double work, const Parallel& parallel) {
  return work < 2e6 ? 1 : parallel.threads;
}

// Splits `tasks` evenly over at most `workers` workers with `scratch_bytes` each. All memory is
// allocated here, before the parallel region, because its body must not throw.
template <class Plan>
void run_tasks(const Plan& plan, Kernel<Plan> kernel, int64_t tasks, int64_t workers,
               int64_t scratch_bytes, const Parallel& parallel) {
  struct Call {
    const Plan& plan;
    Kernel<Plan> kernel;
    int64_t tasks, workers, scratch_bytes;
    std::unique_ptr<char, decltype(&std::free)> scratch;
  };
  workers = std::max<int64_t>(1, std::min({workers, tasks, parallel.threads}));
  scratch_bytes = align_up(scratch_bytes);
  int64_t all_bytes;
  if (__builtin_mul_overflow(workers, scratch_bytes, &all_bytes)) throw std::bad_alloc();
  Call call{plan, kernel, tasks, workers, scratch_bytes, {nullptr, &std::free}};
  call.scratch.reset(
      static_cast<char*>(std::aligned_alloc(kAlign, static_cast<size_t>(all_bytes))));
  if (!call.scratch) throw std::bad_alloc();

  const auto body = [](int64_t begin, int64_t end, void* context) {
    const Call& c = *static_cast<const Call*>(context);
    for (int64_t w = begin; w < end; ++w)
      c.kernel(c.plan, c.tasks * w / c.workers, c.tasks * (w + 1) / c.workers,
               c.scratch.get() + w * c.scratch_bytes);
  };
  if (workers == 1) {
    body(0, 1, &call);
  } else {
    parallel.run(workers, body, &call);
  }
}

}  // namespace srt::cpu
