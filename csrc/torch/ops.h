// The implementation of every op over a Backend, which runs the checked calls (cpu.cpp, cuda.cpp).
// An op checks its arguments, allocates the result and calls the backend.
#pragma once
#include <tuple>

#include "ensemble.h"
#include "shift.h"
#include "windows.h"

namespace srt::glue {

// The parameters that the schemas of ensemble share (schemas.cpp), and an EnsembleCall from them.
#define SRT_TOKENS const Tensor &tokens, const Tensor &offsets, const List &grid, const List &patch
#define SRT_WEIGHTS const std::optional<Tensor>& weights
#define SRT_MODES const Word &upsample, const Word &border, const List &stride
#define SRT_CALL(op, weights, ...)               \
  EnsembleCall call(op, tokens, view_of(tokens), \
                    {offsets, grid, patch, weights, upsample, border, stride}, __VA_ARGS__)

template <class Backend>
struct Ops {
  using List = std::vector<int64_t>;
  using Word = std::string;

  static Tensor shift(const Tensor& image, const Tensor& offsets, const Word& padding,
                      const Word& interpolation) {
    ShiftCall call(image, offsets, padding, interpolation, /*backward=*/false);
    const Tensor out = call.new_result();
    call.args.out = out.mutable_data_ptr();
    Backend::shift(call);
    return out;
  }

  static Tensor shift_backward(const Tensor& grad, const Tensor& offsets, const Word& padding,
                               const Word& interpolation) {
    ShiftCall call(grad, offsets, padding, interpolation, /*backward=*/true);
    const Tensor grad_image = call.new_result();
    Backend::shift_backward(call, grad_image.mutable_data_ptr());
    return grad_image;
  }

  static Tensor windows(const Tensor& image, const Tensor& centers, const List& size,
                        const std::optional<Tensor>& scale, const Word& padding) {
    WindowsCall call("windows", image, view_of(image), size, {centers, scale, padding},
                     /*allow_uint8=*/true);
    const Tensor out = empty(call.out_shape, image.scalar_type(), image);
    call.args.out = out.mutable_data_ptr();
    Backend::windows(call);
    return out;
  }

  static Tensor windows_backward_image(const Tensor& grad, const Tensor& centers,
                                       const List& pixels, const std::optional<Tensor>& scale,
                                       const Word& padding) {
    const char* const op = "_windows_backward_image";
    const List size = window_size(op, grad);
    WindowsCall call(op, grad, image_of(op, grad, pixels), size, {centers, scale, padding},
                     /*allow_uint8=*/false);
    const Tensor dense = call.set_gradient(grad);
    return Backend::windows_backward_image(call);
  }

  static std::tuple<Tensor, Tensor> windows_backward_points(const Tensor& grad, const Tensor& image,
                                                            const Tensor& centers,
                                                            const std::optional<Tensor>& scale,
                                                            const Word& padding) {
    const char* const op = "_windows_backward_points";
    const List size = window_size(op, grad);
    WindowsCall call(op, image, view_of(image), size, {centers, scale, padding},
                     /*allow_uint8=*/false);
    const Tensor dense = call.set_gradient(grad);
    const List shape = shape_of(centers);
    const Tensor grad_centers = empty(shape, ScalarType::Double, image);
    const Tensor grad_scale = empty(shape, ScalarType::Double, image);
    Backend::windows_backward_points(call, static_cast<double*>(grad_centers.mutable_data_ptr()),
                                     static_cast<double*>(grad_scale.mutable_data_ptr()));
    return {grad_centers, grad_scale};
  }

  static Tensor ensemble(SRT_TOKENS, SRT_WEIGHTS, const Word& reduce, SRT_MODES) {
    SRT_CALL("ensemble", weights, parse_reduce(reduce));
    const Tensor out = call.new_out();
    call.set_result(out.mutable_data_ptr());
    Backend::ensemble(call);
    return out;
  }

  static void ensemble_out(SRT_TOKENS, SRT_WEIGHTS, const Word& reduce, SRT_MODES,
                           const Tensor& out) {
    SRT_CALL("ensemble", weights, parse_reduce(reduce));
    call.set_out(written_view_of(out));
    Backend::ensemble(call);
  }

  static std::tuple<Tensor, Tensor> moments(SRT_TOKENS, SRT_WEIGHTS, SRT_MODES) {
    SRT_CALL("ensemble_moments", weights, Reduce::moments);
    const Tensor mean = call.new_out(), variance = call.new_out();
    call.set_result(mean.mutable_data_ptr(), variance.mutable_data_ptr());
    Backend::ensemble(call);
    return {mean, variance};
  }

  static Tensor mean_backward(const Tensor& grad, const Tensor& offsets, const List& grid,
                              const List& patch, SRT_WEIGHTS, SRT_MODES) {
    const char* const op = "_mean_backward";
    const ViewArguments given{offsets, grid, patch, weights, upsample, border, stride};
    EnsembleCall call(op, grad, tokens_of(op, grad, given), given, Reduce::mean);
    const Tensor dense = call.set_gradient();
    const Tensor grad_tokens = empty(call.tokens.shape, grad.scalar_type(), grad);
    Backend::mean_backward(call, grad_tokens.mutable_data_ptr());
    return grad_tokens;
  }

  static void accumulate_mean(const Tensor& mean, const Tensor& weight, SRT_TOKENS, SRT_WEIGHTS,
                              SRT_MODES) {
    SRT_CALL("accumulate_mean_", weights, Reduce::mean, /*stream=*/true);
    call.set_state({written_view_of(mean), written_view_of(weight)});
    Backend::ensemble(call);
  }

  static void accumulate_moments(const Tensor& mean, const Tensor& variance, const Tensor& weight,
                                 SRT_TOKENS, SRT_WEIGHTS, SRT_MODES) {
    SRT_CALL("accumulate_moments_", weights, Reduce::moments, /*stream=*/true);
    call.set_state({written_view_of(mean), written_view_of(variance), written_view_of(weight)});
    Backend::ensemble(call);
  }

  static void accumulate_median(const Tensor& window, const Tensor& count, SRT_TOKENS, SRT_MODES) {
    SRT_CALL("accumulate_median_", std::nullopt, Reduce::median, /*stream=*/true);
    call.set_state({written_view_of(window), written_view_of(count)});
    Backend::ensemble(call);
  }

  // Only checks the arguments, without allocating anything. With `stream`, for a chunk of a stream,
  // which may have no views.
  static void check_views(const Word& op, SRT_TOKENS, SRT_WEIGHTS, const Word& reduce, bool stream,
                          SRT_MODES) {
    SRT_CALL(op.c_str(), weights, parse_reduce(reduce), stream, stream ? 0 : 1);
  }
};

#undef SRT_TOKENS
#undef SRT_WEIGHTS
#undef SRT_MODES
#undef SRT_CALL

}  // namespace srt::glue

#define SRT_IMPLEMENT_OPS(m, Ops)                                               \
  m.impl("shift", TORCH_BOX(&Ops::shift));                                      \
  m.impl("_shift_backward", TORCH_BOX(&Ops::shift_backward));                   \
  m.impl("windows", TORCH_BOX(&Ops::windows));                                  \
  m.impl("_windows_backward_image", TORCH_BOX(&Ops::windows_backward_image));   \
  m.impl("_windows_backward_points", TORCH_BOX(&Ops::windows_backward_points)); \
  m.impl("ensemble", TORCH_BOX(&Ops::ensemble));                                \
  m.impl("ensemble.out", TORCH_BOX(&Ops::ensemble_out));                        \
  m.impl("ensemble_moments", TORCH_BOX(&Ops::moments));                         \
  m.impl("_mean_backward", TORCH_BOX(&Ops::mean_backward));                     \
  m.impl("accumulate_mean_", TORCH_BOX(&Ops::accumulate_mean));                 \
  m.impl("accumulate_moments_", TORCH_BOX(&Ops::accumulate_moments));           \
  m.impl("accumulate_median_", TORCH_BOX(&Ops::accumulate_median));             \
  m.impl("_check_views", TORCH_BOX(&Ops::check_views))
