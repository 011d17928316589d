// The ops on the CPU.
#include "ensemble.h"
#include "shift.h"

namespace srt::glue {
namespace {

// torch's intra-op threads.
Parallel torch_parallel() {
  return {static_cast<int64_t>(torch::stable::get_num_threads()),
          [](int64_t n, Parallel::Body body, void* context) {
            STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, n, 1, body, context));
          }};
}

Tensor shift(const Tensor& image, const Tensor& offsets, const std::string& padding,
             const std::string& interpolation) {
  ShiftCall call(image, offsets, padding, interpolation);
  const Tensor out = call.new_out();
  call.args.out = out.mutable_data_ptr();
  shift_cpu(call.args, torch_parallel());
  return out;
}

Tensor ensemble(const Tensor& tokens, const Tensor& offsets, const std::vector<int64_t>& grid,
                const std::vector<int64_t>& patch, const std::optional<Tensor>& weights,
                const std::string& reduce, const std::string& upsample, const std::string& border,
                const std::vector<int64_t>& stride) {
  EnsembleCall call(tokens, offsets, grid, patch, weights, reduce, upsample, border, stride);
  const Tensor out = call.new_out(tokens);
  call.set_out(out);
  ensemble_mean_cpu(call.args, torch_parallel());
  return out;
}

void ensemble_out(const Tensor& tokens, const Tensor& offsets, const std::vector<int64_t>& grid,
                  const std::vector<int64_t>& patch, const std::optional<Tensor>& weights,
                  const std::string& reduce, const std::string& upsample, const std::string& border,
                  const std::vector<int64_t>& stride, const Tensor& out) {
  EnsembleCall call(tokens, offsets, grid, patch, weights, reduce, upsample, border, stride);
  call.check_out(out, tokens);
  call.set_out(out);
  ensemble_mean_cpu(call.args, torch_parallel());
}

}  // namespace
}  // namespace srt::glue

STABLE_TORCH_LIBRARY_IMPL(srt, CPU, m) {
  m.impl("shift", TORCH_BOX(&srt::glue::shift));
  m.impl("ensemble", TORCH_BOX(&srt::glue::ensemble));
  m.impl("ensemble.out", TORCH_BOX(&srt::glue::ensemble_out));
}
