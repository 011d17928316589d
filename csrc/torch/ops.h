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
                      parse_reduce(reduce, weights.has_value()));
    const Tensor out = call.new_out();
    call.set_out(out);
    run(call);
    return out;
  }

  static void ensemble_out(const Tensor& tokens, const Tensor& offsets, const List& grid,
                           const List& patch, const Weights& weights, const Word& reduce,
                           const Word& upsample, const Word& border, const List& stride,
                           const Tensor& out) {
    EnsembleCall call("ensemble", {tokens, offsets, grid, patch, weights, upsample, border, stride},
                      parse_reduce(reduce, weights.has_value()));
    call.check_out(out);
    call.set_out(out);
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
    call.set_out(mean);
    call.set_variance(variance);
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
    call.set_state(mean, nullptr, weight);
    run(call);
  }

  static void accumulate_moments(const Tensor& mean, const Tensor& variance, const Tensor& weight,
                                 const Tensor& tokens, const Tensor& offsets, const List& grid,
                                 const List& patch, const Weights& weights, const Word& upsample,
                                 const Word& border, const List& stride) {
    EnsembleCall call("accumulate_moments_",
                      {tokens, offsets, grid, patch, weights, upsample, border, stride},
                      Reduce::moments, /*stream=*/true);
    call.set_state(mean, &variance, weight);
    run(call);
  }

  static void accumulate_median(const Tensor& window, const Tensor& count, const Tensor& tokens,
                                const Tensor& offsets, const List& grid, const List& patch,
                                const Word& upsample, const Word& border, const List& stride) {
    EnsembleCall call("accumulate_median_",
                      {tokens, offsets, grid, patch, std::nullopt, upsample, border, stride},
                      Reduce::median, /*stream=*/true);
    call.set_state(window, nullptr, count);
    run(call);
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
  m.impl("accumulate_median_", TORCH_BOX(&Ops::accumulate_median))
