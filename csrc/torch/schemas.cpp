// The schemas of namespace srt, and the private ops that report and force the CPU instruction set.
#include "../srt/cpu/dispatch.h"
#include "common.h"

namespace srt::glue {
namespace {

std::string cpu_kernels() { return cpu::kernels().name; }
std::string available_cpu_kernels() { return cpu::available_kernels(); }
void force_cpu_kernels(const std::string& name) {
  if (!cpu::force_kernels(name.c_str()))
    throw Error("srt::_force_cpu_kernels: name must be 'auto' or one of " +
                std::string(cpu::available_kernels()) + "; got '" + name + "'");
}

}  // namespace
}  // namespace srt::glue

#define SRT_VIEWS "Tensor tokens, Tensor offsets, int[2] grid, int[2] patch"
#define SRT_MODES "str upsample=\"bilinear\", str border=\"coverage\", int[2] stride=1"

// The public schemas are stable: they are extended only by keyword arguments with defaults, other
// than tensors.
STABLE_TORCH_LIBRARY(srt, m) {
  m.def(
      "shift(Tensor image, Tensor offsets, *, str padding=\"reflect\", "
      "str interpolation=\"bilinear\") -> Tensor");
  m.def(
      "windows(Tensor image, Tensor centers, int[2] size, Tensor? scale=None, *, "
      "str padding=\"border\") -> Tensor");
  m.def("ensemble(" SRT_VIEWS ", Tensor? weights=None, *, str reduce=\"mean\", " SRT_MODES
        ") -> Tensor");
  m.def("ensemble.out(" SRT_VIEWS ", Tensor? weights=None, *, str reduce=\"mean\", " SRT_MODES
        ", Tensor(a!) out) -> ()");
  m.def("ensemble_moments(" SRT_VIEWS ", Tensor? weights=None, *, " SRT_MODES
        ") "
        "-> (Tensor mean, Tensor var)");
  // Updates of a stream; srt_ext/streaming.py allocates the state.
  m.def("accumulate_mean_(Tensor(a!) mean, Tensor(b!) weight, " SRT_VIEWS
        ", Tensor? weights=None, *, " SRT_MODES ") -> ()");
  m.def("accumulate_moments_(Tensor(a!) mean, Tensor(b!) var, Tensor(c!) weight, " SRT_VIEWS
        ", Tensor? weights=None, *, " SRT_MODES ") -> ()");
  m.def("accumulate_median_(Tensor(a!) window, Tensor(b!) count, " SRT_VIEWS ", *, " SRT_MODES
        ") -> ()");
  // Gradients, called by srt_ext/_autograd.py.
  m.def(
      "_shift_backward(Tensor grad, Tensor offsets, *, str padding, str interpolation) -> Tensor");
  m.def(
      "_windows_backward_image(Tensor grad, Tensor centers, int[2] pixels, Tensor? scale, *, "
      "str padding) -> Tensor");
  m.def(
      "_windows_backward_points(Tensor grad, Tensor image, Tensor centers, Tensor? scale, *, "
      "str padding) -> (Tensor, Tensor)");
  m.def(
      "_mean_backward(Tensor grad, Tensor offsets, int[2] grid, int[2] patch, Tensor? weights, *, "
      "str upsample, str border, int[2] stride) -> Tensor");
  // Called by srt_ext/streaming.py and srt_ext/dlpack.py.
  m.def("_check_views(str op, " SRT_VIEWS
        ", Tensor? weights=None, *, str reduce, bool stream, " SRT_MODES ") -> ()");
  m.def("_cpu_kernels() -> str");
  m.def("_available_cpu_kernels() -> str");
  m.def("_force_cpu_kernels(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(srt, CompositeExplicitAutograd, m) {
  m.impl("_cpu_kernels", TORCH_BOX(&srt::glue::cpu_kernels));
  m.impl("_available_cpu_kernels", TORCH_BOX(&srt::glue::available_cpu_kernels));
  m.impl("_force_cpu_kernels", TORCH_BOX(&srt::glue::force_cpu_kernels));
}
