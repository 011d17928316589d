// What the glue of every op and backend needs from a stable tensor.
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

// Throws if a function of torch's C shim fails. STABLE_TORCH_ERROR_CODE_CHECK also says why; the
// headers of torch 2.10 and 2.11 do not have it. Remove this when neither is supported.
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

// Offsets or weights that lie on a device, made dense there: float32 or float64, [V, 2] or [V].
std::optional<Tensor> on_device(const std::optional<Tensor>& numbers);

// torch's intra-op threads.
Parallel torch_parallel();

// On the device of `like`; dense in the order of its dimensions, as torch lays it out where a size
// is 0, too. On the CPU a large one has its pages (srt/cpu/populate.h).
Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like);
Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                     ScalarType dtype, const Tensor& like);

}  // namespace srt::glue
