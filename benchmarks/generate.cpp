// Tokens a second of generation: prefill of a short prompt, then one token after another.
//
//   gdn_bench_generate [device] [dtype] [batch] [tokens] [temperature]
//
// The model has 1,567 M parameters: 24 layers of hidden size 2048, 6 heads of 256/512, random
// weights.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include <ATen/ATen.h>

#include <gdn/models/causal_lm.h>
#include <gdn/models/device.h>
#include <gdn/models/generate.h>

int main(int argc, char** argv) {
  using Clock = std::chrono::steady_clock;
  const auto argument = [&](int i, const char* otherwise) {
    return std::string(argc > i ? argv[i] : otherwise);
  };
  const gdn::DeviceChoice device = gdn::choose_device(argument(1, "auto"));
  const std::string type = argument(2, "bf16");
  const int64_t batch = std::atoll(argument(3, "1").c_str());
  const int64_t tokens = std::atoll(argument(4, "512").c_str());
  const double temperature = std::atof(argument(5, "0").c_str());
  const auto seconds_since = [](Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
  };

  gdn::GatedDeltaNetConfig config;
  config.num_hidden_layers = 24;
  auto start = Clock::now();
  gdn::GatedDeltaNetForCausalLM model(config, device.device);
  model->to(device.device, type == "bf16"   ? at::kBFloat16
                           : type == "fp16" ? at::kHalf
                                            : at::kFloat);
  std::printf("%s, %s, %.0f M parameters, made in %.1f s\n", device.device.str().c_str(),
              type.c_str(), static_cast<double>(model->parameter_count()) * 1e-6,
              seconds_since(start));

  const std::vector<std::vector<int64_t>> prompts(batch, {1, 2, 3, 4, 5, 6, 7, 8});
  for (const int64_t count : {int64_t{8}, tokens, tokens}) {
    std::vector<double> times;  // of each token, since the start
    start = Clock::now();
    gdn::generate(model, prompts, {.max_new_tokens = count, .temperature = temperature},
                  [&](int64_t row, int64_t) {
                    if (row == 0) times.push_back(seconds_since(start));
                    return true;
                  });
    const size_t first = times.size() / 4, last = times.size() - 1;
    const double step = (times[last] - times[first]) / static_cast<double>(last - first);
    std::printf(
        "batch %ld, %ld tokens: first after %.1f ms, second %.1f ms later, then %.3f ms each: %.0f "
        "tokens/s\n",
        batch, count, times[0] * 1e3, (times[1] - times[0]) * 1e3, step * 1e3,
        static_cast<double>(batch) / step);
    std::fflush(stdout);
  }
}
