// Calls srt::ensemble from C++ through torch's dispatcher. Linking srt::ops registers the op.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <optional>
#include <string_view>

namespace {

// The C++ type must match the schema; it is checked when the op is looked up.
at::Tensor ensemble(const at::Tensor& tokens,   // [V, B, N, C]
                    const at::Tensor& offsets,  // [V, 2] (dy, dx), pixels
                    at::IntArrayRef grid, at::IntArrayRef patch) {
  using Ensemble = at::Tensor(
      const at::Tensor& tokens, const at::Tensor& offsets, at::IntArrayRef grid,
      at::IntArrayRef patch, const std::optional<at::Tensor>& weights, std::string_view reduce,
      std::string_view upsample, std::string_view border, at::IntArrayRef stride);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("srt::ensemble", "").typed<Ensemble>();
  return op.call(tokens, offsets, grid, patch, std::nullopt, "mean", "bilinear", "coverage",
                 {1, 1});
}

// The same by the published method, for whole-pixel offsets: upsample every view, move it back, and
// average the views that cover each pixel.
at::Tensor published(const at::Tensor& tokens, const at::Tensor& offsets, at::IntArrayRef grid,
                     at::IntArrayRef patch) {
  const int64_t height = grid[0] * patch[0], width = grid[1] * patch[1];
  at::Tensor sum = at::zeros({tokens.size(1), tokens.size(3), height, width}, tokens.options());
  at::Tensor count = at::zeros({height, width}, tokens.options());
  for (int64_t v = 0; v < tokens.size(0); ++v) {
    const at::Tensor map =
        at::upsample_bilinear2d(tokens[v].transpose(1, 2).unflatten(2, grid), {height, width},
                                /*align_corners=*/false);
    const int64_t dy = offsets[v][0].item<int64_t>(), dx = offsets[v][1].item<int64_t>();
    const int64_t rows = height - std::abs(dy), columns = width - std::abs(dx);
    const auto crop = [&](const at::Tensor& of, int64_t y, int64_t x) {
      return of.narrow(-2, std::max<int64_t>(0, y), rows)
          .narrow(-1, std::max<int64_t>(0, x), columns);
    };
    crop(sum, -dy, -dx) += crop(map, dy, dx);
    crop(count, -dy, -dx) += 1;
  }
  return sum / count;
}

int run() {
  const int64_t grid[] = {7, 5}, patch[] = {14, 16};
  at::manual_seed(0);
  const at::Tensor tokens = at::randn({9, 2, grid[0] * grid[1], 24}, at::kDouble);
  const at::Tensor step = at::arange(-1, 2, at::kDouble) * 3;
  const at::Tensor offsets = at::cartesian_prod({step, step});  // [9, 2]

  const at::Tensor field = ensemble(tokens, offsets, grid, patch);
  const at::Tensor difference = (field - published(tokens, offsets, grid, patch)).abs().max();
  std::printf(
      "ops: field [%lld, %lld, %lld, %lld]; differs from the published method by at most %.1e\n",
      static_cast<long long>(field.size(0)), static_cast<long long>(field.size(1)),
      static_cast<long long>(field.size(2)), static_cast<long long>(field.size(3)),
      difference.item<double>());

  bool refused = false;
  try {
    const int64_t wrong[] = {7, 7};
    ensemble(tokens, offsets, wrong, patch);
  } catch (const std::exception& error) {
    refused = true;
    const std::string_view message = error.what();
    const std::string_view line = message.substr(0, message.find('\n'));
    std::printf("ops: a wrong grid raises an error: %.*s\n", static_cast<int>(line.size()),
                line.data());
  }
  return difference.item<double>() < 1e-12 && refused ? 0 : 1;
}

}  // namespace

int main() {
  try {
    return run();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "ops: %s\n", error.what());
    return 1;
  }
}
