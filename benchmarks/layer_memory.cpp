// Peak memory of one training step of one GatedDeltaNet layer, by sequence length: linear in T.
// Each length runs in a process of its own, since a peak never goes down again.

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <torch/torch.h>

#include <gdn/layers/gated_deltanet.h>

namespace {

double peak_megabytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_maxrss) / 1024.0;  // Linux counts KiB
}

void measure(int64_t tokens) {
  gdn::GatedDeltaNetOptions options;
  options.hidden_size = 512;
  options.num_heads = 4;
  options.head_dim = 64;
  options.expand_v = 2.0;
  gdn::GatedDeltaNet layer(options);
  const auto step = [&](int64_t T) {
    const at::Tensor x = torch::randn({1, T, options.hidden_size}).requires_grad_();
    layer->forward({.hidden_states = x}).square().mean().backward();
  };
  step(64);  // libraries and thread pools come into memory
  const double before = peak_megabytes();
  const auto start = std::chrono::steady_clock::now();
  step(tokens);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  const double used = peak_megabytes() - before;
  std::printf("| %ld | %.0f | %.1f | %.2f |\n", static_cast<long>(tokens), used,
              used * 1024.0 / static_cast<double>(tokens), seconds.count());
}

}  // namespace

int main() {
  std::printf(
      "One GatedDeltaNet layer, hidden 512, H = HV = 4, K 64, V 128, fp32, B 1; %d threads, "
      "torch %s\n",
      at::get_num_threads(), TORCH_VERSION);
  std::printf(
      "| T | peak memory of forward + backward, MB | KB a token | seconds |\n"
      "| --- | --- | --- | --- |\n");
  for (const int64_t tokens : {2048, 8192, 32768, 131072}) {
    std::fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
      measure(tokens);
      std::fflush(stdout);
      _exit(0);
    }
    int status = 0;
    if (child < 0 || waitpid(child, &status, 0) < 0 || status != 0) {
      std::fprintf(stderr, "T = %ld failed\n", static_cast<long>(tokens));
      return EXIT_FAILURE;
    }
  }
  return EXIT_SUCCESS;
}
