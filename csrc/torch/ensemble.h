// The arguments of ensemble and ensemble.out, checked; for every backend.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "../srt/ensemble.h"
#include "common.h"

namespace srt::glue {

// Owns what `args` points to, except tokens and out. args.offsets and args.weights are null where
// the numbers lie on the device.
struct EnsembleCall {
  Numbers offsets;
  std::optional<Numbers> weights;
  EnsembleArgs args{};
  std::vector<int64_t> out_shape;

  EnsembleCall(const Tensor& tokens, const Tensor& offsets, const std::vector<int64_t>& grid,
               const std::vector<int64_t>& patch, const std::optional<Tensor>& weights,
               const std::string& reduce, const std::string& upsample, const std::string& border,
               const std::vector<int64_t>& stride);

  // The result as the schema promises it: channels_last.
  Tensor new_out(const Tensor& tokens) const;
  // Refuses what ensemble.out cannot write to.
  void check_out(const Tensor& out, const Tensor& tokens) const;
  void set_out(const Tensor& out);
};

}  // namespace srt::glue
