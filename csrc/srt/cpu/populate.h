// The pages of a fresh result: to fault them in one by one takes longer than all of the arithmetic.
#pragma once
#include <cstdint>

#include "../types.h"

namespace srt {

// Memory on the CPU that was just allocated gets its pages, by all threads.
void fault_in(void* data, int64_t bytes, const Parallel& parallel);

}  // namespace srt
