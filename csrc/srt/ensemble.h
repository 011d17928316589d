// ensemble: moves the tokens [V, B, h*w, C] of V shifted views back into the pixel frame of the
// image and aggregates them over the views (mean, median, or mean and variance) into a field
// [B, C, H', W']. One call reduces all views; a stream reduces them chunk by chunk.
#pragma once
#include "types.h"

namespace srt {

// The state of a streamed lower median is 8 numbers per element: the kWindow sorted values around
// the median, then the position of the median among them. See running_median.h.
constexpr int kWindow = 7;
constexpr int kWindowPlanes = kWindow + 1;

struct EnsembleArgs {
  Reduce reduce;
  DType dtype;         // of tokens: f32, f16, bf16 or f64
  const void* tokens;  // [V, B, h*w, C], channels dense
  int64_t views, batch, channels;
  int64_t token_strides[3];  // of V, B and h*w, in elements
  const double* offsets;     // [V, 2] (dy, dx), pixels
  const double* weights;     // [V], finite and >= 0, or null for ones
  int64_t grid[2];           // (h, w), tokens
  int64_t patch[2];          // (Ph, Pw), pixels per token
  int64_t stride[2];         // (sh, sw), pixels per output cell
  Upsample upsample;
  Border border;
  void* out;               // [B, C, h*Ph/sh, w*Pw/sw]: the mean or median
  int64_t out_strides[4];  // in elements; elements must not overlap
  void* variance;          // shape and strides of `out`; for Reduce::moments only
  // Null for one call over all views. Otherwise `tokens` is the next chunk of a stream, and `out`
  // and `variance` are the state so far, in float32 (float64 for float64 tokens). `total_weight` is
  // the weight of each cell so far (for a median, the number of views); the call adds the chunk to
  // it. Where it is 0, the state is not read. The state of a median is kWindowPlanes planes of the
  // shape of `out`, `plane_stride` elements apart.
  double* total_weight;  // [h*Ph/sh, w*Pw/sw], dense
  int64_t plane_stride;
};

// Throws std::bad_alloc before anything is written.
void ensemble_cpu(const EnsembleArgs& args, const Parallel& parallel);

// The gradient of the mean with respect to the tokens. Writes grad_tokens [V, B, h*w, C], dense, in
// the dtype of the tokens; it is 0 for views of weight 0. `args` describes the forward call, not a
// stream; args.out is the gradient of the mean [B, C, H', W'], only read, with dense channels.
// args.tokens is not read and may be null. Throws std::bad_alloc before anything is written.
void mean_backward_cpu(const EnsembleArgs& args, void* grad_tokens, const Parallel& parallel);

}  // namespace srt
