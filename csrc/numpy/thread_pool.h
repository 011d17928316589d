// A thread pool for the NumPy binding, which has no torch to provide one. Threads are started when
// they are first needed and are kept. A forked process has no threads of its parent, and starts its
// own.
#pragma once
#include <cstdint>

#include "../srt/types.h"

namespace srt::numpy {

// The number of threads that share the work of one call, including the caller: >= 1, initially 1.
void set_threads(int64_t threads);
int64_t get_threads();

// The pool as a parallel runtime. Any number of calls can use it at the same time.
Parallel thread_pool();

}  // namespace srt::numpy
