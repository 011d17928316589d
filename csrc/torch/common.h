// What the glue of every op needs from a stable tensor.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <string>
#include <vector>

#include "../srt/check.h"
#include "../srt/types.h"

namespace srt::glue {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::vector<int64_t> shape_of(const Tensor& tensor);

// "float32" and the like, for messages.
std::string dtype_name(ScalarType dtype);

// float32, float16, bfloat16, float64, and uint8 where `allow_uint8`.
DType element_type(const char* op, const char* name, const Tensor& tensor, bool allow_uint8);

// A CPU tensor of float32 or float64, any strides, as doubles in C order. The shape is checked by
// the caller, after this returns.
std::vector<double> host_values(const char* op, const char* name, const Tensor& tensor);

// Dense in the order of its dimensions, as torch lays it out where a size is 0, too.
Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype);
Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                     ScalarType dtype);

// torch's intra-op threads.
Parallel torch_parallel();

}  // namespace srt::glue
