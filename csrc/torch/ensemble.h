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

// The tokens [V, B, N, C] that a gradient `grad` [B, C, H', W'] of their mean belongs to. There is
// no memory: they are not read.
ArrayView tokens_of(const char* op, const Tensor& grad, const ViewArguments& given);

struct EnsembleCall : CheckedEnsemble {
  const Tensor& input;  // tokens, or the gradient of what the call writes
  std::optional<Tensor> device_offsets, device_weights;

  EnsembleCall(const char* op, const Tensor& input, const ArrayView& tokens,
               const ViewArguments& given, Reduce reduce, bool stream = false, int64_t least = 1);

  // A result as the schema promises it: channels_last.
  Tensor new_out() const;
  // `input` is the gradient that is read; the tensor returned must outlive it.
  Tensor set_gradient();
};

}  // namespace srt::glue
