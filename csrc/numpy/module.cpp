// srt_ext._numpy: the kernels on NumPy arrays, without torch. srt_ext/numpy.py calls it, and has
// checked the types of the arguments: arrays, words, pairs of integers, numbers as float64.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <optional>
#include <string>
#include <vector>

#include "../srt/cpu/dispatch.h"
#include "../srt/cpu/populate.h"
#include "../srt/ensemble.h"
#include "../srt/shift.h"
#include "../srt/validation.h"
#include "thread_pool.h"

namespace py = pybind11;

namespace srt::numpy {
namespace {

using List = std::vector<int64_t>;
using Word = std::string;
// Offsets and weights. A copy that only this call has: nobody can change it after the checks.
using Numbers = py::array_t<double, py::array::c_style>;
using Weights = std::optional<Numbers>;

std::string text(const char* op, const std::string& rule, const std::string& got) {
  return "srt::" + std::string(op) + ": " + rule + "; got " + got;
}
std::string dtype_name(const py::array& array) { return py::str(array.dtype()); }

List shape_of(const py::array& array) { return {array.shape(), array.shape() + array.ndim()}; }

// float32, float16, bfloat16, float64, and uint8 where `allow_uint8`, in the byte order of this
// machine. bfloat16 goes by its name: NumPy has none, ml_dtypes and others bring one.
DType element_type(const char* op, const char* name, const py::array& array, bool allow_uint8) {
  const std::string dtype = py::str(array.dtype().attr("name"));
  if (!array.dtype().attr("isnative").cast<bool>())
    throw py::type_error(text(op, std::string(name) + " must have the byte order of this machine",
                              dtype_name(array)));
  if (dtype == "float32") return DType::f32;
  if (dtype == "float16") return DType::f16;
  if (dtype == "bfloat16" && array.itemsize() == 2) return DType::bf16;
  if (dtype == "float64") return DType::f64;
  if (dtype == "uint8" && allow_uint8) return DType::u8;
  throw py::type_error(text(op,
                            std::string(name) + " must be float32, float16, bfloat16 or float64" +
                                (allow_uint8 ? ", or uint8" : ""),
                            dtype));
}

// An array that the kernels read or write in place.
ArrayView view_of(const char* op, const char* name, const py::array& array) {
  const int64_t element = array.itemsize();
  ArrayView view{array.data(), shape_of(array), List(static_cast<size_t>(array.ndim()), 1),
                 element};
  if (array.size() == 0) return view;  // NumPy gives it any strides: they lead nowhere
  List bytes{array.strides(), array.strides() + array.ndim()};
  bool whole = true;
  for (size_t d = 0; d < bytes.size(); ++d) {
    view.strides[d] = bytes[d] / element;
    whole = whole && (view.shape[d] < 2 || bytes[d] % element == 0);
  }
  const std::string subject = name, size = std::to_string(element);
  if (!whole)
    throw Error(text(op, subject + " must have strides of whole elements, " + size + " bytes each",
                     "strides of " + format_shape(bytes) + " bytes"));
  if (!(array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_))
    throw Error(text(op, subject + " must be aligned to its elements, of " + size + " bytes",
                     "address " + std::to_string(reinterpret_cast<uintptr_t>(array.data()))));
  return view;
}

// Other Python threads run meanwhile. `results` are new memory, which first gets its pages.
template <class Run>
void run_without_gil(const std::vector<py::array>& results, Run&& run) {
  struct Memory {
    void* data;
    int64_t bytes;
  };
  std::vector<Memory> memory;
  for (py::array result : results) memory.push_back({result.mutable_data(), result.nbytes()});
  const py::gil_scoped_release release;
  for (const Memory& m : memory) fault_in(m.data, m.bytes, thread_pool());
  run();
}

// ---- shift --------------------------------------------------------------------------------------

py::array shift(py::array image, const Numbers& offsets, const Word& padding,
                const Word& interpolation) {
  const char* const op = "shift";
  ShiftArgs args{};
  args.dtype = element_type(op, "image", image, /*allow_uint8=*/true);
  const List shape = shape_of(image);
  check_shift(shape, shape_of(offsets), image.itemsize());
  args.padding = parse_padding(padding);
  args.interpolation = parse_interpolation(interpolation);
  check_offsets(op, offsets.data(), offsets.size());

  // One image is small beside its views: one that is not dense, or not aligned, is copied first.
  const int usable = py::array::c_style | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
  if ((image.flags() & usable) != usable) image = image.attr("copy")("C");
  args.image = image.data();
  args.planes = shape[0] * shape[1];
  args.height = shape[2];
  args.width = shape[3];
  args.views = offsets.shape(0);
  args.offsets = offsets.data();
  py::array out(image.dtype(), List{args.views, shape[0], shape[1], shape[2], shape[3]});
  args.out = out.mutable_data();
  run_without_gil({out}, [&] { shift_cpu(args, thread_pool()); });
  return out;
}

// ---- ensemble -----------------------------------------------------------------------------------

// Which tokens, and where they belong.
struct ViewArguments {
  const py::array& tokens;
  const Numbers& offsets;
  const List &grid, &patch;
  const Weights& weights;
  const Word &upsample, &border;
  const List& stride;
};

// The arguments of one call, checked. Owns nothing.
struct EnsembleCall {
  const char* op;
  const py::array& array;  // of tokens
  ArrayView tokens;
  EnsembleArgs args{};
  List out_shape;

  // `least`: views. `stream`: the state is set by set_state.
  EnsembleCall(const char* name, const ViewArguments& given, Reduce reduce, bool stream = false,
               int64_t least = 1)
      : op(name), array(given.tokens) {
    args.reduce = reduce;
    args.dtype = element_type(op, "tokens", array, /*allow_uint8=*/false);
    const List shape = shape_of(array);
    List weights_shape;
    if (given.weights) weights_shape = shape_of(*given.weights);
    const Field field = check_ensemble(op, shape, shape_of(given.offsets), given.grid, given.patch,
                                       given.weights ? &weights_shape : nullptr, given.stride,
                                       array.itemsize(), least);
    tokens = view_of(op, "tokens", array);
    check_dense(op, tokens);
    args.upsample = parse_upsample(op, given.upsample);
    args.border = parse_border(op, given.border);
    args.offsets = given.offsets.data();
    check_offsets(op, args.offsets, given.offsets.size());
    if (given.weights) {
      args.weights = given.weights->data();
      check_weights(op, args.weights, given.weights->size(), stream);
    }
    args.tokens = tokens.data;
    args.views = shape[0];
    args.batch = shape[1];
    args.channels = shape[3];
    std::copy_n(tokens.strides.begin(), 3, args.token_strides);
    std::copy_n(field.grid, 2, args.grid);
    std::copy_n(field.patch, 2, args.patch);
    std::copy_n(field.stride, 2, args.stride);
    out_shape = {args.batch, args.channels, field.cells[0], field.cells[1]};
  }

  // As torch.ops.srt.ensemble returns it: channels last.
  py::array new_out() const {
    List strides = out_strides();
    for (int64_t& stride : strides) stride *= array.itemsize();
    return py::array(array.dtype(), out_shape, strides);
  }
  void set_new_out(py::array& out) {
    const List strides = out_strides();
    std::copy_n(strides.begin(), 4, args.out_strides);
    args.out = out.mutable_data();
  }

  // What is written in place.
  ArrayView writable(const char* name, const py::array& written) const {
    if (!written.writeable())
      throw Error(text(op, std::string(name) + " must be writable", "a read-only array"));
    return view_of(op, name, written);
  }
  void set_out(py::array& out) {
    if (!out.dtype().equal(array.dtype()))
      throw py::type_error(
          text(op, "out must have the dtype of tokens, " + dtype_name(array), dtype_name(out)));
    const ArrayView view = writable("out", out);
    check_written(op, "out", view, out_shape, tokens);
    args.out = out.mutable_data();
    std::copy_n(view.strides.begin(), 4, args.out_strides);
  }

  // See check_state. `variance` of moments only.
  void set_state(py::array& field, py::array* variance, py::array& seen) {
    const bool median = args.reduce == Reduce::median;
    const char* const name = median ? "window" : "mean";
    const char* const seen_name = median ? "count" : "weight";
    const bool f64 = args.dtype == DType::f64;
    const std::string rule = f64 ? "be float64, as tokens are" : "be float32";
    const auto place = [&](const char* what, const py::array& part, bool is_double,
                           const std::string& dtype_rule) {
      if (!part.dtype().equal(is_double ? py::dtype::of<double>() : py::dtype::of<float>()))
        throw py::type_error(text(op, std::string(what) + " must " + dtype_rule, dtype_name(part)));
      return writable(what, part);
    };
    const ArrayView field_view = place(name, field, f64, rule);
    const ArrayView seen_view = place(seen_name, seen, true, "be float64");
    std::optional<ArrayView> var;
    if (variance) var = place("var", *variance, f64, rule);
    check_state(op, field_view, var ? &*var : nullptr, seen_view, args.reduce, out_shape, tokens);
    args.out = field.mutable_data();
    const int first = median ? 1 : 0;
    std::copy_n(field_view.strides.begin() + first, 4, args.out_strides);
    if (median) args.plane_stride = field_view.strides[0];
    if (variance) args.variance = variance->mutable_data();
    args.total_weight = static_cast<double*>(seen.mutable_data());
  }

  void run(const std::vector<py::array>& results) const {
    run_without_gil(results, [&] { ensemble_cpu(args, thread_pool()); });
  }

 private:
  List out_strides() const {  // in elements
    const int64_t channels = out_shape[1], height = out_shape[2], width = out_shape[3];
    return {height * width * channels, 1, width * channels, channels};
  }
};

#define SRT_VIEWS                                                                       \
  const py::array &tokens, const Numbers &offsets, const List &grid, const List &patch, \
      const Weights &weights, const Word &upsample, const Word &border, const List &stride
#define SRT_GIVEN {tokens, offsets, grid, patch, weights, upsample, border, stride}

py::array ensemble(SRT_VIEWS, const Word& reduce, std::optional<py::array> out) {
  EnsembleCall call("ensemble", SRT_GIVEN, parse_reduce(reduce, weights.has_value()));
  if (out) {
    call.set_out(*out);
    call.run({});
    return *out;
  }
  py::array result = call.new_out();
  call.set_new_out(result);
  call.run({result});
  return result;
}

py::tuple ensemble_moments(SRT_VIEWS) {
  EnsembleCall call("ensemble_moments", SRT_GIVEN, Reduce::moments);
  py::array mean = call.new_out(), variance = call.new_out();
  call.set_new_out(mean);
  call.args.variance = variance.mutable_data();
  call.run({mean, variance});
  return py::make_tuple(mean, variance);
}

void accumulate_mean(py::array& mean, py::array& weight, SRT_VIEWS) {
  EnsembleCall call("accumulate_mean_", SRT_GIVEN, Reduce::mean, /*stream=*/true);
  call.set_state(mean, nullptr, weight);
  call.run({});
}

void accumulate_moments(py::array& mean, py::array& var, py::array& weight, SRT_VIEWS) {
  EnsembleCall call("accumulate_moments_", SRT_GIVEN, Reduce::moments, /*stream=*/true);
  call.set_state(mean, &var, weight);
  call.run({});
}

void accumulate_median(py::array& window, py::array& count, SRT_VIEWS) {
  if (weights)
    throw Error(text("accumulate_median_", "weights must be None for a median", "weights"));
  EnsembleCall call("accumulate_median_", SRT_GIVEN, Reduce::median, /*stream=*/true);
  call.set_state(window, nullptr, count);
  call.run({});
}

// Of a chunk of a stream, which may have no views, before there is a state.
void check_chunk(const Word& op, SRT_VIEWS) {
  EnsembleCall(op.c_str(), SRT_GIVEN, Reduce::mean, /*stream=*/true, /*least=*/0);
}

}  // namespace
}  // namespace srt::numpy

PYBIND11_MODULE(_numpy, m, py::mod_gil_not_used()) {
  using namespace srt::numpy;
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const srt::Error& error) {
      py::set_error(PyExc_ValueError, error.what());
    }
  });
  m.def("shift", &shift);
  m.def("ensemble", &ensemble);
  m.def("ensemble_moments", &ensemble_moments);
  m.def("accumulate_mean_", &accumulate_mean);
  m.def("accumulate_moments_", &accumulate_moments);
  m.def("accumulate_median_", &accumulate_median);
  m.def("check_chunk", &check_chunk);
  m.def("set_threads", &set_threads);
  m.def("get_threads", &get_threads);
  m.def("cpu_kernels", [] { return srt::cpu::kernels().name; });
  m.def("available_cpu_kernels", [] { return srt::cpu::available_kernels(); });
  m.def("force_cpu_kernels", [](const char* name) { return srt::cpu::force_kernels(name); });
}
