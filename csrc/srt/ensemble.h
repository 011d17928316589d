// ensemble: the tokens of shifted views, moved back into the frame of the picture and aggregated,
// in one call or in chunks of views that arrive one after the other.
#pragma once
#include "types.h"

namespace srt {

// The lower median of a stream, in 8 numbers an element: the kWindow values around the median, in
// order, then the place of the median among them. See running_median.h.
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
  int64_t out_strides[4];  // in elements; no two elements share a place
  void* variance;          // as `out`; of moments only
  // Null for one call over all views. Otherwise the tokens are the next chunk of a stream: `out`
  // and `variance` are its state so far, in float32 (float64 for float64 tokens), and this is the
  // total weight of each cell, for the median the number of views: the call adds to it. Where it
  // is 0 the state is not read. The state of a median is kWindowPlanes planes as `out`,
  // `plane_stride` apart.
  double* total_weight;  // [h*Ph/sh, w*Pw/sw], dense
  int64_t plane_stride;
};

// Throws std::bad_alloc before anything is written.
void ensemble_cpu(const EnsembleArgs& args, const Parallel& parallel);

// The gradient of the tokens of a mean, [V, B, h*w, C], dense, of the dtype of tokens: 0 for views
// of weight 0. `args` is the call that it belongs to, with `out` the gradient of what that writes,
// only read, channels dense; no stream. The tokens are not read and may be null. Throws
// std::bad_alloc before anything is written.
void mean_backward_cpu(const EnsembleArgs& args, void* grad_tokens, const Parallel& parallel);

}  // namespace srt
