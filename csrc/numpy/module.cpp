// srt_ext._numpy: the kernels on NumPy arrays, without torch. srt_ext/numpy.py calls this module
// after checking the types of the arguments: arrays, strings, pairs of integers, numbers as
// float64.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../srt/cpu/dispatch.h"
#include "../srt/cpu/populate.h"
#include "../srt/validation.h"
#include "thread_pool.h"

namespace py = pybind11;

namespace srt::numpy {
namespace {

using List = std::vector<int64_t>;
using Word = std::string;

// The dtype's name, such as "float32", or "bfloat16" of packages such as ml_dtypes; ">f4" for the
// other byte order.
std::string dtype_name(const py::array& array) {
  const py::dtype dtype = array.dtype();
  return py::str(dtype.attr("isnative").cast<bool>() ? dtype.attr("name") : py::object(dtype));
}

// A view of any array, without checks of its memory.
ArrayView plain_view_of(const py::array& array) {
  const int64_t element = std::max<int64_t>(1, array.itemsize());
  ArrayView view{array.data(),
                 {array.shape(), array.shape() + array.ndim()},
                 List(static_cast<size_t>(array.ndim()), 1),
                 element,
                 dtype_name(array)};
  if (array.size() == 0) return view;  // the strides of an empty array are arbitrary
  for (size_t d = 0; d < view.strides.size(); ++d)
    view.strides[d] = array.strides(static_cast<py::ssize_t>(d)) / element;
  return view;
}

void check_byte_order(const char* op, const char* name, const py::array& array) {
  if (!array.dtype().attr("isnative").cast<bool>())
    fail(op, std::string(name) + " must be in native byte order", dtype_name(array),
         Error::Kind::type);
}

// A view of an array that the kernels read or write in place.
ArrayView view_of(const char* op, const char* name, const py::array& array) {
  ArrayView view = plain_view_of(array);
  if (array.size() == 0) return view;
  const std::string subject = name, size = std::to_string(view.element_size);
  const List bytes{array.strides(), array.strides() + array.ndim()};
  for (size_t d = 0; d < bytes.size(); ++d) {
    if (view.shape[d] > 1 && bytes[d] % view.element_size != 0)
      fail(
          op,
          subject + " must have strides that are multiples of its element size, " + size + " bytes",
          "strides of " + format_shape(bytes) + " bytes");
  }
  return view;
}

ArrayView written_view_of(const char* op, const char* name, const py::array& array) {
  if (!array.writeable()) fail(op, std::string(name) + " must be writable", "a read-only array");
  return view_of(op, name, array);
}

// Runs without the GIL. `results` are new arrays, whose pages are first faulted in by all threads.
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

py::array shift(py::array image, const py::array& offsets, const Word& padding,
                const Word& interpolation) {
  check_byte_order("shift", "image", image);
  CheckedShift call("shift", "image", plain_view_of(image), plain_view_of(offsets), padding,
                    interpolation, /*allow_uint8=*/true);
  // An image is small compared with its views, so one that is not contiguous or aligned is copied.
  const int usable = py::array::c_style | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
  if ((image.flags() & usable) != usable) image = image.attr("copy")("C");
  call.args.image = image.data();
  py::array out(image.dtype(), call.out_shape);
  call.args.out = out.mutable_data();
  run_without_gil({out}, [&] { shift_cpu(call.args, thread_pool()); });
  return out;
}

py::array windows(const py::array& image, const py::array& centers, const List& size,
                  const std::optional<py::array>& scale, const Word& padding) {
  check_byte_order("windows", "image", image);
  std::optional<ArrayView> steps;
  if (scale) steps = plain_view_of(*scale);
  CheckedWindows call(
      "windows", {view_of("windows", "image", image), plain_view_of(centers), size, steps, padding},
      /*allow_uint8=*/true);
  py::array out(image.dtype(), call.out_shape);
  call.args.out = out.mutable_data();
  run_without_gil({out}, [&] { windows_cpu(call.args, thread_pool()); });
  return out;
}

// tokens, offsets, grid, patch, weights, upsample, border, stride.
using Views =
    std::tuple<py::array, py::array, List, List, std::optional<py::array>, Word, Word, List>;

struct EnsembleCall : CheckedEnsemble {
  const py::array& input;  // tokens

  EnsembleCall(const char* op, const Views& views, Reduce reduce, bool stream = false,
               int64_t least = 1)
      : CheckedEnsemble(op, inputs(op, views), reduce, stream, least), input(std::get<0>(views)) {}

  // Channels last, as the result of torch.ops.srt.ensemble.
  py::array new_out() const {
    List strides = out_strides;
    for (int64_t& stride : strides) stride *= input.itemsize();
    return py::array(input.dtype(), out_shape, strides);
  }

  void run(const std::vector<py::array>& results = {}) const {
    run_without_gil(results, [&] { ensemble_cpu(args, thread_pool()); });
  }

 private:
  static EnsembleInputs inputs(const char* op, const Views& views) {
    const auto& [tokens, offsets, grid, patch, weights, upsample, border, stride] = views;
    check_byte_order(op, "tokens", tokens);
    std::optional<ArrayView> weight;
    if (weights) weight = plain_view_of(*weights);
    return {view_of(op, "tokens", tokens),
            plain_view_of(offsets),
            weight,
            grid,
            patch,
            stride,
            upsample,
            border};
  }
};

py::array ensemble(const Views& views, const Word& reduce, std::optional<py::array> out) {
  EnsembleCall call("ensemble", views, parse_reduce(reduce));
  if (out) {
    call.set_out(written_view_of(call.op, "out", *out));
    call.run();
    return *out;
  }
  py::array result = call.new_out();
  call.set_result(result.mutable_data());
  call.run({result});
  return result;
}

py::tuple ensemble_moments(const Views& views) {
  EnsembleCall call("ensemble_moments", views, Reduce::moments);
  py::array mean = call.new_out(), variance = call.new_out();
  call.set_result(mean.mutable_data(), variance.mutable_data());
  call.run({mean, variance});
  return py::make_tuple(mean, variance);
}

// `state`: in the order of CheckedEnsemble::state_names().
void accumulate(const Word& op, const std::vector<py::array>& state, const Views& views) {
  const Reduce reduce = op == "accumulate_mean_"      ? Reduce::mean
                        : op == "accumulate_moments_" ? Reduce::moments
                                                      : Reduce::median;
  EnsembleCall call(op.c_str(), views, reduce, /*stream=*/true);
  const std::vector<const char*> names = call.state_names();
  std::vector<ArrayView> written;
  for (size_t i = 0; i < names.size(); ++i)
    written.push_back(written_view_of(call.op, names[i], state.at(i)));
  call.set_state(written);
  call.run();
}

// Only checks a chunk of a stream, which may have no views, before the state exists.
void check_chunk(const Word& op, const Views& views) {
  EnsembleCall(op.c_str(), views, Reduce::mean, /*stream=*/true, /*least=*/0);
}

}  // namespace
}  // namespace srt::numpy

PYBIND11_MODULE(_numpy, m, py::mod_gil_not_used()) {
  using namespace srt::numpy;
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const srt::Error& error) {
      const bool type = error.kind == srt::Error::Kind::type;
      py::set_error(type ? PyExc_TypeError : PyExc_ValueError, error.text());
    }
  });
  m.def("shift", &shift);
  m.def("windows", &windows);
  m.def("ensemble", &ensemble);
  m.def("ensemble_moments", &ensemble_moments);
  m.def("accumulate", &accumulate);
  m.def("check_chunk", &check_chunk);
  m.def("set_threads", &set_threads);
  m.def("get_threads", &get_threads);
  m.def("cpu_kernels", [] { return srt::cpu::kernels().name; });
  m.def("available_cpu_kernels", [] { return srt::cpu::available_kernels(); });
  m.def("force_cpu_kernels", [](const char* name) { return srt::cpu::force_kernels(name); });
}
