// What states in bf16 and weights in int8 cost: a model reads a text token by token, as in
// decoding, with states in fp32 and in bf16, and with weights in int8 that share a scale by 32, by
// 128, and by row.
//
//   gdn_state_drift MODEL TEXT [tokens]
//
// MODEL: a folder that `gdn train` wrote. Prints nats a token and, over the last tenth of them, the
// difference of the logits relative to those with states and weights in fp32.
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include <ATen/ATen.h>

#include <gdn/models/causal_lm.h>
#include <gdn/models/checkpoint.h>
#include <gdn/training/tokenizer.h>

namespace {

struct Reading {
  double nats = 0;        // a token
  at::Tensor last_tenth;  // logits [tokens / 10, vocabulary]
};

Reading read(gdn::GatedDeltaNetForCausalLM& model, const std::vector<int64_t>& tokens,
             at::ScalarType state_dtype) {
  gdn::Cache cache;
  cache.state_dtype = state_dtype;
  const auto count = static_cast<int64_t>(tokens.size()) - 1;
  Reading result;
  std::vector<at::Tensor> kept;
  for (int64_t i = 0; i < count; ++i) {
    const at::Tensor ids = at::full({1, 1}, tokens[i], at::kLong);
    const at::Tensor logits =
        model->forward({.input_ids = ids, .cache = &cache}).logits.flatten().to(at::kFloat);
    result.nats -= logits.log_softmax(0)[tokens[i + 1]].item<double>() / static_cast<double>(count);
    if (i >= count - count / 10) kept.push_back(logits);
  }
  result.last_tenth = at::stack(kept);
  return result;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: gdn_state_drift MODEL TEXT [tokens]\n");
    return 2;
  }
  const at::NoGradGuard no_grad;
  const auto tokenizer = gdn::load_tokenizer(argv[1]);
  std::ifstream file(argv[2], std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  std::vector<int64_t> tokens = tokenizer->encode_prompt(text);
  const size_t most = argc > 3 ? std::stoul(argv[3]) : 20'000;
  tokens.resize(std::min(tokens.size(), most + 1));
  auto model = gdn::load_pretrained(argv[1], at::kCPU, at::kFloat);
  model->eval();
  const Reading wide = read(model, tokens, at::kFloat);
  std::printf("%zu tokens: fp32 %.5f nats a token\n", tokens.size() - 1, wide.nats);
  const auto report = [&](const char* name, const Reading& reading) {
    const double drift =
        ((reading.last_tenth - wide.last_tenth).norm() / wide.last_tenth.norm()).item<double>();
    std::printf("%s: %.5f, %+.5f; logits differ by %.2e\n", name, reading.nats,
                reading.nats - wide.nats, drift);
  };
  report("bf16 states", read(model, tokens, at::kBFloat16));
  for (const auto& [name, group] :
       {std::pair("int8 by 32", 32), {"int8 by 128", 128}, {"int8 by row", 0}}) {
    auto rounded = gdn::load_pretrained(argv[1], at::kCPU, at::kFloat, group);
    rounded->eval();
    report(name, read(rounded, tokens, at::kFloat));
  }
}
