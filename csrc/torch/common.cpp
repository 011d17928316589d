#include "common.h"

#include <algorithm>

namespace srt::glue {

std::vector<int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
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

std::vector<double> host_values(const char* op, const char* name, const Tensor& tensor) {
  const auto fail = [&](const std::string& rule, const std::string& got) {
    throw Error("srt::" + std::string(op) + ": " + name + " " + rule + "; got " + got);
  };
  if (!tensor.is_cpu()) fail("must be on the CPU or on the device of the input", "another device");
  const ScalarType dtype = tensor.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Double)
    fail("must be float32 or float64", dtype_name(dtype));
  const std::vector<int64_t> shape = shape_of(tensor);
  const void* data = tensor.const_data_ptr();
  std::vector<double> values(static_cast<size_t>(tensor.numel()));
  for (size_t i = 0; i < values.size(); ++i) {
    int64_t rest = static_cast<int64_t>(i), at = 0;
    for (size_t d = shape.size(); d-- > 0; rest /= shape[d])
      at += rest % shape[d] * tensor.stride(static_cast<int64_t>(d));
    values[i] = dtype == ScalarType::Float
                    ? static_cast<double>(static_cast<const float*>(data)[at])
                    : static_cast<const double*>(data)[at];
  }
  return values;
}

Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t d = sizes.size(); d-- > 0; step *= std::max<int64_t>(1, sizes[d])) strides[d] = step;
  return empty_strided(sizes, strides, dtype);
}

Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                     ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Parallel torch_parallel() {
  return {static_cast<int64_t>(torch::stable::get_num_threads()),
          [](int64_t n, Parallel::Body body, void* context) {
            STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, n, 1, body, context));
          }};
}

}  // namespace srt::glue
