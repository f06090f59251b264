// Tokens a second of generation: prefill of a short prompt, then one token after another.
//
//   gdn_bench_generate [device] [dtype] [batch] [tokens] [temperature] [layers] [group]
//
// The model has 1,567 M parameters: 24 layers of hidden size 2048, 6 heads of 256/512, random
// weights. dtype: fp32, bf16, fp16, or on a CPU int8 (weights, with a scale for `group` of them and
// fp32 between). On a CPU also the ceiling: how fast memory is read, over a step's weights.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <gdn/models/causal_lm.h>
#include <gdn/models/device.h>
#include <gdn/models/generate.h>

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// Bytes a second that torch's threads read, the best of some passes over 1 GiB.
double read_rate() {
  const at::Tensor numbers = at::ones({int64_t{1} << 27}, at::kLong);
  const auto* data = numbers.const_data_ptr<int64_t>();
  double best = 0;
  for (int pass = 0; pass < 5; ++pass) {
    const auto start = Clock::now();
    std::atomic<int64_t> all = 0;
    at::parallel_for(0, numbers.numel(), 1 << 16, [&](int64_t begin, int64_t end) {
      int64_t sum = 0;
      for (int64_t i = begin; i < end; ++i) sum += data[i];
      all += sum;
    });
    if (all == numbers.numel()) {
      best = std::max(best, static_cast<double>(numbers.nbytes()) / seconds_since(start));
    }
  }
  return best;
}

}  // namespace

int main(int argc, char** argv) {
  const auto argument = [&](int i, const char* otherwise) {
    return std::string(argc > i ? argv[i] : otherwise);
  };
  const gdn::DeviceChoice device = gdn::choose_device(argument(1, "auto"));
  const std::string type = argument(2, "bf16");
  const int64_t batch = std::atoll(argument(3, "1").c_str());
  const int64_t tokens = std::atoll(argument(4, "512").c_str());
  const double temperature = std::atof(argument(5, "0").c_str());

  gdn::GatedDeltaNetConfig config;
  config.num_hidden_layers = std::atoll(argument(6, "24").c_str());
  auto start = Clock::now();
  gdn::GatedDeltaNetForCausalLM model(config, device.device);
  model->to(device.device, type == "bf16"   ? at::kBFloat16
                           : type == "fp16" ? at::kHalf
                                            : at::kFloat);
  if (type == "int8") {
    const auto round = model->int8_rounding(std::atoll(argument(7, "128").c_str()));
    for (const std::string& key : model->named_parameters().keys()) round(key);
  }
  std::printf("%s, %s, %.0f M parameters, made in %.1f s\n", device.device.str().c_str(),
              type.c_str(), static_cast<double>(model->parameter_count()) * 1e-6,
              seconds_since(start));
  if (device.device.is_cpu()) {
    const gdn::Matrix embeddings = model->embedding_matrix();  // of which a step reads a row
    const auto bytes = static_cast<double>(model->nbytes()) -
                       static_cast<double>(embeddings.weight.nbytes() +
                                           (embeddings.scales ? embeddings.scales->nbytes() : 0));
    const double rate = read_rate();
    std::printf("%.0f MB of weights a step, read at %.2f GB/s in %.1f ms\n", bytes * 1e-6,
                rate * 1e-9, bytes / rate * 1e3);
  }

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
