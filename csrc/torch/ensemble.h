// The arguments of ensemble, ensemble_moments and accumulate_*, checked; for every backend.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "../srt/ensemble.h"
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
};

// Owns what `args` points to, except tokens and what is written. args.offsets and args.weights are
// null where the numbers lie on the device.
struct EnsembleCall {
  const char* op;
  const Tensor& tokens;
  Numbers offsets;
  std::optional<Numbers> weights;
  EnsembleArgs args{};
  std::vector<int64_t> out_shape;

  // `stream`: the state is set by set_state.
  EnsembleCall(const char* op, const ViewArguments& given, Reduce reduce, bool stream = false);

  // A result as the schema promises it: channels_last.
  Tensor new_out() const;
  // Refuses what ensemble.out cannot write to.
  void check_out(const Tensor& out) const;
  void set_out(const Tensor& out);
  void set_variance(const Tensor& variance);
  // The gradient [B, C, H', W'] of what the call writes; the tensor returned must outlive it.
  Tensor set_gradient(const Tensor& grad);
  // The state of a stream: mean [B, C, H', W'] and, for moments, var of the same strides, or for a
  // median window [kWindowPlanes, B, C, H', W']; seen [H', W'].
  void set_state(const Tensor& field, const Tensor* variance, const Tensor& seen);

 private:
  void check_placed(const char* name, const Tensor& tensor, ScalarType dtype,
                    const std::string& dtype_rule) const;
};

// The tokens' gradient [V, B, N, C] that belongs to the gradient [B, C, H', W'] of a field: dense,
// to be written.
Tensor new_grad_tokens(const char* op, const Tensor& grad, const Tensor& offsets,
                       const std::vector<int64_t>& grid, const std::vector<int64_t>& patch,
                       const std::vector<int64_t>& stride);

}  // namespace srt::glue
