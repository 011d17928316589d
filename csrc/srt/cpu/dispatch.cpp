// Detects the instruction sets of this processor when the library is loaded and selects the widest.
#include "dispatch.h"

#include <atomic>
#include <cstring>

namespace srt::cpu {
namespace {

struct Available {
  const Kernels* sets[3];
  int count;
  char names[64];
};

Available detect() {
  Available a{{&baseline}, 1, {}};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  if (has_avx2) a.sets[a.count++] = &avx2;
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    a.sets[a.count++] = &avx512;
#endif
  for (int i = 0; i < a.count; ++i) {
    if (i) std::strcat(a.names, ",");
    std::strcat(a.names, a.sets[i]->name);
  }
  return a;
}

const Available available = detect();
std::atomic<const Kernels*> chosen{available.sets[available.count - 1]};

}  // namespace

const Kernels& kernels() { return *chosen.load(std::memory_order_relaxed); }

bool force_kernels(const char* name) {
  if (std::strcmp(name, "auto") == 0) {
    chosen = available.sets[available.count - 1];
    return true;
  }
  for (int i = 0; i < available.count; ++i) {
    if (std::strcmp(name, available.sets[i]->name) == 0) {
      chosen = available.sets[i];
      return true;
    }
  }
  return false;
}

const char* available_kernels() { return available.names; }

}  // namespace srt::cpu
