// Helpers that the bindings of all ops and backends share: views of tensors, threads, allocation.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "../srt/types.h"
#include "../srt/validation.h"

// Throws if a function of torch's C shim fails. STABLE_TORCH_ERROR_CODE_CHECK also reports the
// reason, but the headers of torch 2.10 and 2.11 do not define it. Remove this macro when neither
// version is supported.
#ifdef STABLE_TORCH_ERROR_CODE_CHECK
#define SRT_SHIM_CHECK STABLE_TORCH_ERROR_CODE_CHECK
#else
#define SRT_SHIM_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace srt::glue {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::vector<int64_t> shape_of(const Tensor& tensor);
ArrayView view_of(const Tensor& tensor);
ArrayView written_view_of(const Tensor& tensor);

// Offsets [V, 2] or weights [V] (or centers, scale) on a device, dense, float32 or float64; nothing
// for tensors on the CPU.
std::optional<Tensor> on_device(const std::optional<Tensor>& numbers);

// The parallel runtime of torch (its intra-op threads).
Parallel torch_parallel();

// A new tensor on the device of `like`, contiguous; its strides equal those of torch even if a size
// is 0. On the CPU, the pages of a large tensor are populated (srt/cpu/populate.h).
Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like);
Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                     ScalarType dtype, const Tensor& like);

}  // namespace srt::glue
