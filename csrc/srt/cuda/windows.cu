// windows on the device: images [B, C, H, W] and centers [B, N, 2] to windows [B, N, C, Ph, Pw],
// sampled bilinearly. A block computes a tile of samples of one or several windows. The taps of the
// tile along each axis are computed once, in float64, and kept in shared memory. Each thread then
// samples one position for one channel after the other, reading four pixels per output element. A
// window of one sample (a point) uses several threads per sample and vectors of channels instead.
// Centers and scale are read on the device, so the call does not synchronise.
#include "windows.cuh"

namespace srt::cuda {
namespace {

constexpr int kResident = 4;  // resident blocks per multiprocessor
constexpr int kPacks = 16;    // of channels, per thread

// The work of a call, divided into parts. A block computes one part: some windows, a tile of their
// samples and a chunk of channels.
struct Parts {
  Teams teams;
  int64_t groups;    // groups of windows
  int32_t tiles[2];  // tiles of samples along y and x
  int64_t chunks;    // chunks of channels
  bool keep_in_l2;   // of `out`, see store()
  ImagePlan image;
  void* out;

  Parts(const WindowsArgs& args, int64_t windows, int64_t packs, bool keep_in_l2)
      : teams(args, packs), keep_in_l2(keep_in_l2), image(image_plan(args)), out(args.out) {
    groups = div_up(windows, teams.windows);
    for (int axis = 0; axis < 2; ++axis)
      tiles[axis] = static_cast<int32_t>(div_up(args.size[axis], teams.tile[axis]));
    chunks = div_up(packs, chunk());
  }
  SRT_HD int64_t chunk() const { return int64_t{kPacks} * teams.lanes; }
  SRT_HD int64_t number() const { return groups * tiles[0] * tiles[1] * chunks; }
};

// Computes the channels of one sample, kPack channels at a time: the packs begin, begin + lanes,
// ...
template <class T, int kPack, class Acc>
__device__ void make_sample(const Parts& parts, const SampleTaps<Acc>& y, const SampleTaps<Acc>& x,
                            int32_t image, int64_t begin, int64_t end, T* out, int64_t area) {
  const Corners<T> corners(parts.image, image, y, x,
                           [&](int i, int j) { return (y.weight[i] != 0) & (x.weight[j] != 0); });
  const bool copies = y.weight[1] == 0 && x.weight[1] == 0;  // bit for bit
  Acc weight[2][2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) weight[i][j] = y.weight[i] * x.weight[j];
  }
#pragma unroll(kPack == 1 ? 2 : 1)
  for (int64_t pack = begin; pack < end; pack += parts.teams.lanes) {
    const int64_t channel = pack * kPack;
    Pack<T, kPack> value[2][2];  // all loads are issued before the first is used
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) value[i][j] = corners.template value<kPack>(i, j, channel);
    }
    if (!copies) {
      Pack<Acc, kPack> sum{};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const Pack<Acc, kPack> read = to_acc(value[i][j]);
#pragma unroll
          for (int e = 0; e < kPack; ++e) sum.at[e] += weight[i][j] * read.at[e];
        }
      }
#pragma unroll
      for (int e = 0; e < kPack; ++e) value[0][0].at[e] = from_acc<T>(sum.at[e]);
    }
    auto* const to = reinterpret_cast<Pack<T, kPack>*>(out + channel * area);
    store(to, value[0][0], parts.keep_in_l2);
  }
}

template <class T, int kPack>
__global__ void __launch_bounds__(kThreads, kResident)
    windows_kernel(const __grid_constant__ WindowsPlan plan, const __grid_constant__ Parts parts,
                   const __grid_constant__ InlineArrays parameters) {
  using Acc = typename AccumulatorOf<T>::type;
  __shared__ TapTable<Acc> table;
  const Teams& teams = parts.teams;
  const Member member(teams);
  SRT_FOR_BLOCK(part, parts.number()) {
    int64_t rest = part;
    const int64_t begin = take_digit(rest, parts.chunks) * parts.chunk();
    const int32_t x0 = take_digit(rest, parts.tiles[1]) * teams.tile[1];
    const int32_t y0 = take_digit(rest, parts.tiles[0]) * teams.tile[0];
    const int32_t first = static_cast<int32_t>(rest) * teams.windows;
    table.fill(plan, parameters, teams, first, y0, x0);
    __syncthreads();
    const int32_t window = first + member.window;
    const int32_t y = y0 + member.sample[0], x = x0 + member.sample[1];
    if (member.window < teams.windows && window < plan.windows && y < plan.size[0] &&
        x < plan.size[1]) {
      T* const out = static_cast<T*>(parts.out) + window * plan.channels * plan.area() +
                     int64_t{y} * plan.size[1] + x;
      make_sample<T, kPack>(parts, table.of(teams, member, 0), table.of(teams, member, 1),
                            window / plan.count, begin + member.lane,
                            min(begin + parts.chunk(), teams.packs), out, plan.area());
    }
    __syncthreads();  // before the taps of the next part overwrite these
  }
}

}  // namespace
}  // namespace srt::cuda

namespace srt {

int64_t windows_cuda_workspace(const WindowsArgs& args, const ViewArray& centers,
                               const ViewArray& scale) {
  using namespace cuda;
  Workspace space(nullptr);
  InlineArrays parameters;
  WindowsCall{"windows", args, centers, scale}.plan(space, /*run=*/false, nullptr, parameters);
  return space.bytes();
}

void windows_cuda(const WindowsArgs& args, const ViewArray& centers, const ViewArray& scale,
                  void* workspace, CUstream_st* stream) {
  using namespace cuda;
  const WindowsCall call{"windows", args, centers, scale};
  if (call.windows() == 0 || args.channels == 0) return;
  Workspace space(workspace);
  InlineArrays parameters;
  const WindowsPlan plan = call.plan(space, /*run=*/true, stream, parameters);
  dispatch_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int64_t kSize = sizeof(T);
    const auto run = [&](auto kernel, int64_t packs) {
      const int64_t image = args.batch * args.channels * args.height * args.width;
      const int64_t out = call.windows() * args.channels * plan.area();
      const Parts parts(args, call.windows(), packs, fits_l2(call.op, kSize * image, kSize * out));
      launch(call.op, kernel, parts.number(), stream, plan, parts, parameters);
    };
    if (has_vectors<T>(args)) {
      run(windows_kernel<T, kVectorOf<T>>, args.channels / kVectorOf<T>);
    } else {
      run(windows_kernel<T, 1>, args.channels);
    }
  });
}

}  // namespace srt
