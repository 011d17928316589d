// Calls the kernels without torch: aggregates tokens of shifted views in plain buffers, with the
// threads of the program.
#include <srt/validation.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <optional>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kThreads = 3;

// The parallel runtime that the kernels use. A program with a thread pool submits the ranges to it.
void run_on_threads(int64_t n, srt::Parallel::Body body, void* context) {
  std::vector<std::thread> threads;
  for (int64_t t = 1; t < kThreads; ++t)
    threads.emplace_back(body, n * t / kThreads, n * (t + 1) / kThreads, context);
  body(0, n / kThreads, context);
  for (std::thread& thread : threads) thread.join();
}

// The image: its brightness is linear in the position (y, x), in pixels. Bilinear upsampling
// preserves a plane, so the field of its tokens is the same plane for all offsets.
double picture(double y, double x) { return 2 + 0.03 * y - 0.05 * x; }

int run() {
  constexpr int64_t views = 4, batch = 1, channels = 8;
  const std::vector<int64_t> grid{6, 8}, patch{16, 16}, stride{1, 1};  // (y, x)
  const std::vector<double> offsets{0, 0, 2.5, -1, -3, 0.25, 1, 4};    // [V, 2] (dy, dx), pixels
  const int64_t tokens_per_view = grid[0] * grid[1];

  // [V, B, N, C]. A token of this "model" is the mean brightness of its patch, which for a plane is
  // the brightness at the centre of the patch. Channel c is c + 1 times that value.
  std::vector<float> tokens;
  for (int64_t v = 0; v < views; ++v)
    for (int64_t i = 0; i < grid[0]; ++i)
      for (int64_t j = 0; j < grid[1]; ++j)
        for (int64_t c = 0; c < channels; ++c) {
          const double y = (static_cast<double>(i) + 0.5) * static_cast<double>(patch[0]);
          const double x = (static_cast<double>(j) + 0.5) * static_cast<double>(patch[1]);
          // The content of view v is moved by its offset.
          const double value = picture(y - offsets[static_cast<size_t>(2 * v)],
                                       x - offsets[static_cast<size_t>(2 * v + 1)]);
          tokens.push_back(static_cast<float>(static_cast<double>(c + 1) * value));
        }

  // The kernels do not check their arguments. CheckedEnsemble does, and throws srt::Error.
  const srt::ArrayView token_view{
      tokens.data(),
      {views, batch, tokens_per_view, channels},
      {batch * tokens_per_view * channels, tokens_per_view * channels, channels, 1},
      sizeof(float),
      "float32"};
  const srt::ArrayView offset_view{offsets.data(), {views, 2}, {2, 1}, sizeof(double), "float64"};
  srt::CheckedEnsemble call("ensemble",
                            {token_view, offset_view, /*weights=*/std::nullopt, grid, patch, stride,
                             "bilinear", "coverage"},
                            srt::Reduce::mean);
  const int64_t height = call.out_shape[2], width = call.out_shape[3];
  std::vector<float> out(static_cast<size_t>(batch * height * width * channels));  // [B, H, W, C]
  call.set_result(out.data());
  srt::ensemble_cpu(call.args, {kThreads, &run_on_threads});

  // The border is excluded: beyond the centre of the outermost tokens, every view is constant.
  const int64_t margin = patch[0] / 2 + 4;
  double largest = 0;
  for (int64_t y = margin; y < height - margin; ++y)
    for (int64_t x = margin; x < width - margin; ++x)
      for (int64_t c = 0; c < channels; ++c) {
        const double expected = static_cast<double>(c + 1) *
                                picture(static_cast<double>(y) + 0.5, static_cast<double>(x) + 0.5);
        const size_t at = static_cast<size_t>((y * width + x) * channels + c);
        largest = std::max(largest, std::fabs(static_cast<double>(out[at]) - expected));
      }
  std::printf(
      "kernels: %lld views, field of %lld x %lld pixels; differs from the plane by at most %.1e\n",
      static_cast<long long>(views), static_cast<long long>(height), static_cast<long long>(width),
      largest);
  return largest < 1e-4 ? 0 : 1;  // float32 of values up to 40
}

}  // namespace

int main() {
  try {
    return run();
  } catch (const std::exception& error) {  // srt::Error, std::bad_alloc
    std::fprintf(stderr, "kernels: %s\n", error.what());
    return 1;
  }
}
