// Populates the pages of a newly allocated result in bulk. Faulting them in one by one, as they are
// first written, takes longer than the arithmetic of a call.
#pragma once
#include <cstdint>

#include "../types.h"

namespace srt {

// Faults in the pages of newly allocated CPU memory, with all threads. Does nothing for small
// sizes.
void fault_in(void* data, int64_t bytes, const Parallel& parallel);

}  // namespace srt
