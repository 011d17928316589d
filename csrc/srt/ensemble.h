// ensemble: the tokens of shifted views, moved back into the frame of the picture and averaged.
#pragma once
#include "types.h"

namespace srt {

struct EnsembleArgs {
  DType dtype;         // of tokens and out: f32, f16, bf16 or f64
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
  void* out;               // [B, C, h*Ph/sh, w*Pw/sw]
  int64_t out_strides[4];  // in elements; no two elements share a place
};

// Weighted mean over the views. Throws std::bad_alloc before anything is written.
void ensemble_mean_cpu(const EnsembleArgs& args, const Parallel& parallel);

}  // namespace srt
