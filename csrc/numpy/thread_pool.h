// Threads of our own, where there is no torch to bring some: started when they are first needed and
// kept. A process that was forked has none of its parent's threads, and starts its own.
#pragma once
#include <cstdint>

#include "../srt/types.h"

namespace srt::numpy {

// How many threads share the work of one call, that of the caller among them: >= 1, at first 1.
void set_threads(int64_t threads);
int64_t get_threads();

// For any number of calls at the same time.
Parallel thread_pool();

}  // namespace srt::numpy
