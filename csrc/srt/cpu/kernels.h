// The inner loops, one set for each instruction set, and the choice between them.
#pragma once
#include <cstdint>

#include "../axis.h"
#include "../shift.h"
#include "../types.h"

namespace srt::cpu {

// The weighted mean of all views. A task is one image, one band of output rows and one chunk of
// channels. Views are sorted by dx; those that share a dx form a group, because the rows of a group
// can be summed before the horizontal filter is applied, once for all of them.
template <class Acc>
struct MeanPlan {
  struct View {
    int64_t index;  // in tokens
    int64_t dy;     // its row of the y table
    Acc weight;     // > 0
  };
  struct Scratch {    // byte offsets into a worker's scratch
    int64_t sums;     // Acc [groups, tokens_x, chunk]: the combined rows of each group
    int64_t rows;     // the token rows that one group combines
    int64_t filters;  // the groups that reach this output row
    int64_t count;    // double [columns]
    int64_t inverse;  // Acc [columns]
    int64_t bytes;    // in all
  };
  const void* tokens;        // [V, B, h*w, C]
  int64_t token_strides[3];  // of V, B and h*w, in elements
  int64_t batch, channels;
  int64_t rows, columns;  // output cells, H' and W'
  int64_t tokens_x;       // w
  AxisTable<Acc> y;       // [distinct dy, rows]
  AxisTable<Acc> x;       // [groups, columns]
  int64_t groups;
  const int64_t* group_begin;  // [groups + 1], into views
  const View* views;           // the views of weight > 0
  int64_t band;                // output rows of a task
  int64_t chunk;               // channels of a task, whole blocks
  Scratch scratch;
  void* out;               // [B, C, H', W']
  int64_t out_strides[4];  // in elements
};

// What the scratch of a MeanPlan holds.
template <class Acc>
struct TokenRow {
  const void* tokens;  // [w, C]
  Acc weight;
};
template <class Acc>
struct GroupFilter {
  const int32_t* first;  // [columns]
  const int32_t* taps;   // [columns]
  const Acc* weight;     // [columns, max_taps]
  const Acc* sums;       // [tokens_x, chunk]
};

struct ShiftPlan {
  struct View {
    ShiftTaps y, x;
    // Line positions that need no padding: there source_x[m] is x.first + m.
    int64_t inner_begin, inner_end;
  };
  const void* image;  // [planes, height, width]
  int64_t planes, height, width;
  const View* views;        // [V]
  const int64_t* source_y;  // [V, height + 3] source row at y.first + m, -1 for zeros
  const int64_t* source_x;  // [V, width + 3]
  void* out;                // [V, planes, height, width]
};

// Runs tasks [begin, end). Scratch is the worker's own, 64-byte aligned.
template <class Plan>
using Kernel = void (*)(const Plan& plan, int64_t begin, int64_t end, void* scratch);

struct Kernels {
  const char* name;
  int64_t block_bytes;  // of the sums that stay in registers
  Kernel<MeanPlan<float>> mean_f32, mean_f16, mean_bf16;
  Kernel<MeanPlan<double>> mean_f64;
  // A task is an output row, counted over views and planes; scratch: Acc [width + 3 + 64].
  Kernel<ShiftPlan> shift_f32, shift_f16, shift_bf16, shift_f64, shift_u8;
};

extern const Kernels baseline;
#if defined(__x86_64__)
extern const Kernels avx2;
extern const Kernels avx512;
#endif

// The set in use: the widest one that this processor runs, unless another was forced.
const Kernels& kernels();
// Forces a set by name; "auto" returns to the widest. False if this machine has no such set.
bool force_kernels(const char* name);
// The names that force_kernels takes here, narrowest first, separated by commas.
const char* available_kernels();

}  // namespace srt::cpu
