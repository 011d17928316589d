// Conversion between stable tensors and the plain types of csrc/srt, and allocation of results.
#include "common.h"

#include <algorithm>

#include "../srt/cpu/populate.h"

namespace srt::glue {
namespace {

// The name of a dtype in NumPy.
const char* dtype_name(ScalarType dtype) {
  static constexpr struct {
    ScalarType dtype;
    const char* name;
  } kNames[] = {{ScalarType::Byte, "uint8"},
                {ScalarType::Char, "int8"},
                {ScalarType::Short, "int16"},
                {ScalarType::Int, "int32"},
                {ScalarType::Long, "int64"},
                {ScalarType::UInt16, "uint16"},
                {ScalarType::UInt32, "uint32"},
                {ScalarType::UInt64, "uint64"},
                {ScalarType::Half, "float16"},
                {ScalarType::BFloat16, "bfloat16"},
                {ScalarType::Float, "float32"},
                {ScalarType::Double, "float64"},
                {ScalarType::Bool, "bool"},
                {ScalarType::ComplexFloat, "complex64"},
                {ScalarType::ComplexDouble, "complex128"}};
  for (const auto& type : kNames)
    if (type.dtype == dtype) return type.name;
  return torch::headeronly::toString(dtype);  // Float8_e5m2, ...
}

std::string device_name(const Tensor& tensor) {
  // The ops are registered for CPU and CUDA only.
  return tensor.is_cpu() ? "cpu" : "cuda:" + std::to_string(tensor.get_device_index());
}

}  // namespace

std::vector<int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

ArrayView view_of(const Tensor& tensor) {
  const auto strides = tensor.strides();
  return {tensor.const_data_ptr(),          shape_of(tensor),
          {strides.begin(), strides.end()}, static_cast<int64_t>(tensor.element_size()),
          dtype_name(tensor.scalar_type()), device_name(tensor)};
}

ArrayView written_view_of(const Tensor& tensor) {
  ArrayView view = view_of(tensor);
  view.data = tensor.mutable_data_ptr();
  return view;
}

std::optional<Tensor> on_device(const std::optional<Tensor>& numbers) {
  if (!numbers || numbers->is_cpu()) return std::nullopt;
  return numbers->is_contiguous() ? *numbers : torch::stable::contiguous(*numbers);
}

Parallel torch_parallel() {
  return {static_cast<int64_t>(torch::stable::get_num_threads()),
          [](int64_t n, Parallel::Body body, void* context) {
            SRT_SHIM_CHECK(torch_parallel_for(0, n, 1, body, context));
          }};
}

Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t d = sizes.size(); d-- > 0; step *= std::max<int64_t>(1, sizes[d])) strides[d] = step;
  return empty_strided(sizes, strides, dtype, like);
}

Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                     ScalarType dtype, const Tensor& like) {
  int32_t device_type, device_index;
  SRT_SHIM_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  SRT_SHIM_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  SRT_SHIM_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
      device_index, &handle));
  const Tensor tensor(handle);
  if (tensor.is_cpu())
    fault_in(tensor.mutable_data_ptr(),
             tensor.numel() * static_cast<int64_t>(tensor.element_size()), torch_parallel());
  return tensor;
}

}  // namespace srt::glue
