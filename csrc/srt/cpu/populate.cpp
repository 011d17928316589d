// Populates pages with madvise(MADV_POPULATE_WRITE) on Linux; does nothing on other systems.
#include "populate.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

namespace srt {
namespace {

// The smallest size that is populated. malloc recycles smaller blocks, whose pages are already
// there (in glibc, the maximum of M_MMAP_THRESHOLD).
constexpr int64_t kFreshBytes = int64_t{32} << 20;
// MADV_POPULATE_WRITE (Linux 5.14) allocates pages in bulk, without a page fault for each. Older
// Linux kernels return an error, and pages are then allocated on first access.
constexpr int kPopulateWrite = 23;
// Bytes that a thread populates per call.
constexpr int64_t kPart = int64_t{2} << 20;
// Not a local static: if a process forks while another thread initialises a local static, the child
// waits for it forever.
const int64_t page = sysconf(_SC_PAGESIZE);

}  // namespace

void fault_in(void* data, int64_t bytes, const Parallel& parallel) {
  if (bytes < kFreshBytes) return;
  struct Range {
    char *begin, *end;
  };
  char* const start = static_cast<char*>(data);
  Range range{reinterpret_cast<char*>(reinterpret_cast<intptr_t>(data) / page * page),
              start + bytes / page * page};
  const int64_t size = range.end - range.begin;
  const auto populate = [](int64_t i, int64_t stop, void* context) {
    const Range& whole = *static_cast<const Range*>(context);
    for (; i < stop; ++i) {
      char* const from = whole.begin + i * kPart;
      madvise(from, static_cast<size_t>(std::min<int64_t>(kPart, whole.end - from)),
              kPopulateWrite);
    }
  };
  parallel.run(div_up(size, kPart), populate, &range);
}

}  // namespace srt
#else
namespace srt {
void fault_in(void*, int64_t, const Parallel&) {}
}  // namespace srt
#endif
