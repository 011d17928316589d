// The arguments of ensemble, ensemble_moments and accumulate_*, for every backend.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "common.h"

namespace srt::glue {

// Where the tokens belong: what all of these ops take.
struct ViewArguments {
  const Tensor& offsets;
  const std::vector<int64_t>&grid, &patch;
  const std::optional<Tensor>& weights;
  const std::string &upsample, &border;
  const std::vector<int64_t>& stride;
};

struct EnsembleCall : CheckedEnsemble {
  const Tensor& input;  // tokens, or the gradient of what the call writes
  std::optional<Tensor> device_offsets, device_weights;

  EnsembleCall(const char* op, const Tensor& tokens, const ViewArguments& given, Reduce reduce,
               bool stream = false, int64_t least = 1);
  // The gradient of a mean; `grad` [B, C, H', W'] belongs to its output.
  EnsembleCall(const char* op, const Tensor& grad, const ViewArguments& given);

  // A result as the schema promises it: channels_last.
  Tensor new_out() const;
  // The tokens' gradient, [V, B, N, C]: dense, to be written.
  Tensor new_grad_tokens() const;
  // `input` is the gradient that is read; the tensor returned must outlive it.
  Tensor set_gradient();

 private:
  EnsembleCall(const char* op, const Tensor& input, const ArrayView& tokens,
               const ViewArguments& given, Reduce reduce, bool stream, int64_t least);
};

}  // namespace srt::glue
