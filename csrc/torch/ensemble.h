// The arguments of ensemble, ensemble_moments and accumulate_*, for every backend.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "common.h"

namespace srt::glue {

// The arguments that all these ops share, except the tokens.
struct ViewArguments {
  const Tensor& offsets;
  const std::vector<int64_t>&grid, &patch;
  const std::optional<Tensor>& weights;
  const std::string &upsample, &border;
  const std::vector<int64_t>& stride;
};

// Describes the tokens [V, B, N, C] of the mean whose gradient is `grad` [B, C, H', W']. The view
// has no memory, because the tokens are not read.
ArrayView tokens_of(const char* op, const Tensor& grad, const ViewArguments& given);

struct EnsembleCall : CheckedEnsemble {
  const Tensor& input;  // the tokens, or the gradient of the result
  std::optional<Tensor> device_offsets, device_weights;

  EnsembleCall(const char* op, const Tensor& input, const ArrayView& tokens,
               const ViewArguments& given, Reduce reduce, bool stream = false, int64_t least = 1);

  // A new result [B, C, H', W'] in channels_last, as the schema guarantees.
  Tensor new_out() const;
  // Sets args.out to the gradient in `input`, copied if its channels are not dense. The returned
  // tensor owns the memory and must outlive the call.
  Tensor set_gradient();
};

}  // namespace srt::glue
