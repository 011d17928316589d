// The ops of ensemble, for a backend that runs an EnsembleCall: with the current device and stream,
// without waiting.
#pragma once
#include <tuple>

#include "ensemble.h"

namespace srt::glue {

template <void (*run)(EnsembleCall& call),
          void (*run_backward)(EnsembleCall& call, const Tensor& grad_tokens)>
struct EnsembleOps {
  using List = std::vector<int64_t>;
  using Word = std::string;
  using Weights = std::optional<Tensor>;

  static Tensor ensemble(const Tensor& tokens, const Tensor& offsets, const List& grid,
                         const List& patch, const Weights& weights, const Word& reduce,
                         const Word& upsample, const Word& border, const List& stride) {
    EnsembleCall call("ensemble", {tokens, offsets, grid, patch, weights, upsample, border, stride},
                      parse_reduce(reduce));
    const Tensor out = call.new_out();
    call.set_result(out.mutable_data_ptr());
    run(call);
    return out;
  }

  static void ensemble_out(const Tensor& tokens, const Tensor& offsets, const List& grid,
                           const List& patch, const Weights& weights, const Word& reduce,
                           const Word& upsample, const Word& border, const List& stride,
                           const Tensor& out) {
    EnsembleCall call("ensemble", {tokens, offsets, grid, patch, weights, upsample, border, stride},
                      parse_reduce(reduce));
    call.set_out(written_view_of(out));
    run(call);
  }

  static std::tuple<Tensor, Tensor> moments(const Tensor& tokens, const Tensor& offsets,
                                            const List& grid, const List& patch,
                                            const Weights& weights, const Word& upsample,
                                            const Word& border, const List& stride) {
    EnsembleCall call("ensemble_moments",
                      {tokens, offsets, grid, patch, weights, upsample, border, stride},
                      Reduce::moments);
    const Tensor mean = call.new_out(), variance = call.new_out();
    call.set_result(mean.mutable_data_ptr(), variance.mutable_data_ptr());
    run(call);
    return {mean, variance};
  }

  // The tokens are not read: their gradient stands for them.
  static Tensor mean_backward(const Tensor& grad, const Tensor& offsets, const List& grid,
                              const List& patch, const Weights& weights, const Word& upsample,
                              const Word& border, const List& stride) {
    const char* const op = "_mean_backward";
    const Tensor grad_tokens = new_grad_tokens(op, grad, offsets, grid, patch, stride);
    EnsembleCall call(op, {grad_tokens, offsets, grid, patch, weights, upsample, border, stride},
                      Reduce::mean);
    const Tensor dense = call.set_gradient(grad);
    run_backward(call, grad_tokens);
    return grad_tokens;
  }

  static void accumulate_mean(const Tensor& mean, const Tensor& weight, const Tensor& tokens,
                              const Tensor& offsets, const List& grid, const List& patch,
                              const Weights& weights, const Word& upsample, const Word& border,
                              const List& stride) {
    EnsembleCall call("accumulate_mean_",
                      {tokens, offsets, grid, patch, weights, upsample, border, stride},
                      Reduce::mean, /*stream=*/true);
    call.set_state({written_view_of(mean), written_view_of(weight)});
    run(call);
  }

  static void accumulate_moments(const Tensor& mean, const Tensor& variance, const Tensor& weight,
                                 const Tensor& tokens, const Tensor& offsets, const List& grid,
                                 const List& patch, const Weights& weights, const Word& upsample,
                                 const Word& border, const List& stride) {
    EnsembleCall call("accumulate_moments_",
                      {tokens, offsets, grid, patch, weights, upsample, border, stride},
                      Reduce::moments, /*stream=*/true);
    call.set_state({written_view_of(mean), written_view_of(variance), written_view_of(weight)});
    run(call);
  }

  static void accumulate_median(const Tensor& window, const Tensor& count, const Tensor& tokens,
                                const Tensor& offsets, const List& grid, const List& patch,
                                const Word& upsample, const Word& border, const List& stride) {
    EnsembleCall call("accumulate_median_",
                      {tokens, offsets, grid, patch, std::nullopt, upsample, border, stride},
                      Reduce::median, /*stream=*/true);
    call.set_state({written_view_of(window), written_view_of(count)});
    run(call);
  }

  // The rules alone, before anything is allocated. Of a `stream`: a chunk, which may have no views.
  static void check_views(const Word& op, const Tensor& tokens, const Tensor& offsets,
                          const List& grid, const List& patch, const Weights& weights, bool stream,
                          const Word& upsample, const Word& border, const List& stride) {
    EnsembleCall(op.c_str(), {tokens, offsets, grid, patch, weights, upsample, border, stride},
                 Reduce::mean, stream, stream ? 0 : 1);
  }
};

}  // namespace srt::glue

#define SRT_IMPLEMENT_ENSEMBLE(m, Ops)                                \
  m.impl("ensemble", TORCH_BOX(&Ops::ensemble));                      \
  m.impl("ensemble.out", TORCH_BOX(&Ops::ensemble_out));              \
  m.impl("ensemble_moments", TORCH_BOX(&Ops::moments));               \
  m.impl("_mean_backward", TORCH_BOX(&Ops::mean_backward));           \
  m.impl("accumulate_mean_", TORCH_BOX(&Ops::accumulate_mean));       \
  m.impl("accumulate_moments_", TORCH_BOX(&Ops::accumulate_moments)); \
  m.impl("accumulate_median_", TORCH_BOX(&Ops::accumulate_median));   \
  m.impl("_check_views", TORCH_BOX(&Ops::check_views))
