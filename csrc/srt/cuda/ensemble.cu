// The entry point of ensemble on the device. Calls the reduction in mean.cu or per_view.cu.
#include "common.cuh"

namespace srt {
namespace cuda {
namespace {

int64_t ensemble(const Call& call) {
  const EnsembleArgs& args = call.args;
  if (args.reduce != Reduce::mean || args.total_weight) return run_per_view(call);
  return args.batch == 0 || args.channels == 0 ? 0 : run_mean(call);
}

}  // namespace
}  // namespace cuda

int64_t ensemble_cuda_workspace(const EnsembleArgs& args, const ViewArray& offsets,
                                const ViewArray& weights) {
  return cuda::ensemble({"ensemble", args, offsets, weights, nullptr, nullptr});
}

void ensemble_cuda(const char* op, const EnsembleArgs& args, const ViewArray& offsets,
                   const ViewArray& weights, void* workspace, CUstream_st* stream) {
  cuda::ensemble({op, args, offsets, weights, workspace, stream});
}

}  // namespace srt
