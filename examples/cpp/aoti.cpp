// Runs a model that contains SRT, compiled ahead of time by export.py, without Python. The compiled
// model calls the ops by name; linking srt::ops registers them.
#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

namespace {

// Loads a file that torch.save wrote.
c10::IValue load(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  return torch::jit::pickle_load(bytes);
}

// Runs the model of `folder`, to which export.py wrote model.pt2 and case.pt, and compares the
// result.
int run(const std::string& folder) {
  torch::inductor::AOTIModelPackageLoader model(folder + "/model.pt2");
  const c10::List<c10::IValue> saved = load(folder + "/case.pt").toList();
  const at::Tensor images = saved.get(0).toTensor();  // [B, 3, H, W]
  const at::Tensor eager = saved.get(1).toTensor();   // [B, C, H, W]
  const at::Tensor field = model.run({images}).at(0);
  const double difference = (field - eager).abs().max().item<double>();
  const double scale = eager.abs().max().item<double>();
  std::printf("aoti: field [%lld, %lld, %lld, %lld]; differs from eager by at most %.1e of %.1f\n",
              static_cast<long long>(field.size(0)), static_cast<long long>(field.size(1)),
              static_cast<long long>(field.size(2)), static_cast<long long>(field.size(3)),
              difference, scale);
  // The compiled model sums in another order, which changes the rounding in float32.
  return field.sizes() == eager.sizes() && difference <= 1e-5 * scale ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: aoti FOLDER\n");
    return 2;
  }
  try {
    return run(argv[1]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "aoti: %s\n", error.what());
    return 1;
  }
}
