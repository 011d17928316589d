// The arguments of ensemble, ensemble_moments and accumulate_*, for every backend.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "common.h"

namespace srt::glue {

// Which tokens, and where they belong: what all of these ops take.
struct ViewArguments {
  const Tensor& tokens;
  const Tensor& offsets;
  const std::vector<int64_t>&grid, &patch;
  const std::optional<Tensor>& weights;
  const std::string &upsample, &border;
  const std::vector<int64_t>& stride;

  EnsembleInputs inputs() const;
};

struct EnsembleCall : CheckedEnsemble {
  const Tensor& input;  // tokens
  std::optional<Tensor> device_offsets, device_weights;

  EnsembleCall(const char* op, const ViewArguments& given, Reduce reduce, bool stream = false,
               int64_t least = 1);

  // A result as the schema promises it: channels_last.
  Tensor new_out() const;
  // The gradient [B, C, H', W'] of what the call writes; the tensor returned must outlive it.
  Tensor set_gradient(const Tensor& grad);
};

// The tokens' gradient [V, B, N, C] that belongs to the gradient [B, C, H', W'] of a field: dense,
// to be written.
Tensor new_grad_tokens(const char* op, const Tensor& grad, const Tensor& offsets,
                       const std::vector<int64_t>& grid, const std::vector<int64_t>& patch,
                       const std::vector<int64_t>& stride);

}  // namespace srt::glue
