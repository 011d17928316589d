#include "common.h"

#include <algorithm>

#include "../srt/cpu/populate.h"

namespace srt::glue {

std::vector<int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

ArrayView view_of(const Tensor& tensor) {
  const auto strides = tensor.strides();
  return {tensor.const_data_ptr(),
          shape_of(tensor),
          {strides.begin(), strides.end()},
          static_cast<int64_t>(tensor.element_size())};
}

std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default:
      return "another dtype";
  }
}

DType element_type(const char* op, const char* name, const Tensor& tensor, bool allow_uint8) {
  const ScalarType dtype = tensor.scalar_type();
  switch (dtype) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::Byte:
      if (allow_uint8) return DType::u8;
      break;
    default:
      break;
  }
  throw Error("srt::" + std::string(op) + ": " + name +
              " must be float32, float16, bfloat16 or float64" + (allow_uint8 ? ", or uint8" : "") +
              "; got " + dtype_name(dtype));
}

bool same_device(const Tensor& a, const Tensor& b) {
  int32_t types[2];
  SRT_SHIM_CHECK(aoti_torch_get_device_type(a.get(), &types[0]));
  SRT_SHIM_CHECK(aoti_torch_get_device_type(b.get(), &types[1]));
  return types[0] == types[1] && (a.is_cpu() || a.get_device_index() == b.get_device_index());
}

Numbers view_numbers(const char* op, const char* name, const Tensor& tensor, const Tensor& input) {
  const auto fail = [&](const std::string& rule, const std::string& got) {
    throw Error("srt::" + std::string(op) + ": " + name + " " + rule + "; got " + got);
  };
  if (!tensor.is_cpu() && !same_device(tensor, input))
    fail("must be on the CPU or on the device of the input", "another device");
  const ScalarType dtype = tensor.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Double)
    fail("must be float32 or float64", dtype_name(dtype));
  Numbers numbers;
  if (!tensor.is_cpu()) {
    numbers.device = tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
    return numbers;
  }
  const std::vector<int64_t> shape = shape_of(tensor);
  const void* data = tensor.const_data_ptr();
  numbers.host.resize(static_cast<size_t>(tensor.numel()));
  for (size_t i = 0; i < numbers.host.size(); ++i) {
    int64_t rest = static_cast<int64_t>(i), at = 0;
    for (size_t d = shape.size(); d-- > 0; rest /= shape[d])
      at += rest % shape[d] * tensor.stride(static_cast<int64_t>(d));
    numbers.host[i] = dtype == ScalarType::Float
                          ? static_cast<double>(static_cast<const float*>(data)[at])
                          : static_cast<const double*>(data)[at];
  }
  return numbers;
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
