// The decoding step of few operators against the model's forward.
#include <set>

#include <gdn/models/decode_step.h>

#include "models/tiny_models.h"

namespace gdn::testing {
namespace {

constexpr int64_t kB = 3, kPrompt = 9;

GatedDeltaNetConfig without_gate() {
  GatedDeltaNetConfig config = tiny_config();
  config.use_gate = false;
  config.allow_neg_eigval = true;
  config.tie_word_embeddings = true;
  return config;
}

class DecodeSteps : public ::testing::TestWithParam<bool> {
 protected:
  Cache prefilled(const at::Tensor& ids) {
    const torch::NoGradGuard no_grad;
    Cache cache;
    model_->forward({.input_ids = ids, .cache = &cache});
    return cache;
  }
  /// Logits [B, vocab] of the last token, computed without a cache.
  at::Tensor uncached(const at::Tensor& ids) {
    const torch::NoGradGuard no_grad;
    return model_->forward({.input_ids = ids, .logits_to_keep = 1}).logits.select(1, 0);
  }

  GatedDeltaNetForCausalLM model_ = make_model(GetParam() ? without_gate() : tiny_config());
  const at::Tensor ids_ = random_ids(model_->config(), kB, kPrompt + 3);
  const at::Tensor prompt_ = ids_.narrow(1, 0, kPrompt);
};

TEST_P(DecodeSteps, EqualTheForwardWithoutCache) {
  DecodeStep step(model_, prefilled(prompt_));
  for (int64_t t = kPrompt; t < ids_.size(1); ++t) {
    expect_close(step.forward(ids_.select(1, t)), uncached(ids_.narrow(1, 0, t + 1)));
  }
}

TEST_P(DecodeSteps, SelectedRowsGoOn) {
  DecodeStep step(model_, prefilled(prompt_));
  step.forward(ids_.select(1, kPrompt));
  const at::Tensor index = torch::tensor({2, 0});
  step.select_rows(index);
  const at::Tensor kept = ids_.index_select(0, index);
  expect_close(step.forward(kept.select(1, kPrompt + 1)), uncached(kept.narrow(1, 0, kPrompt + 2)));
}

TEST_P(DecodeSteps, JoinTheWeightsWithoutChangingThemOrTheMemory) {
  std::vector<at::Tensor> before;
  for (const at::Tensor& parameter : model_->parameters()) before.push_back(parameter.clone());
  const DecodeStep first(model_, prefilled(prompt_));
  std::vector<const void*> places;
  size_t i = 0;
  int64_t bytes = 0;
  std::set<const void*> storages;
  for (const at::Tensor& parameter : model_->parameters()) {
    EXPECT_TRUE(at::equal(parameter, before[i++]));
    EXPECT_TRUE(parameter.is_contiguous());
    places.push_back(parameter.const_data_ptr());
    if (storages.insert(parameter.storage().data()).second) {
      bytes += static_cast<int64_t>(parameter.storage().nbytes());
    }
  }
  EXPECT_EQ(bytes, model_->parameter_count() * static_cast<int64_t>(sizeof(float)));
  const DecodeStep second(model_, prefilled(prompt_));  // finds them joined
  i = 0;
  for (const at::Tensor& parameter : model_->parameters()) {
    EXPECT_EQ(parameter.const_data_ptr(), places[i++]);
  }
}

INSTANTIATE_TEST_SUITE_P(GateAndWithout, DecodeSteps, ::testing::Bool());

/// The forward computes with the rounded weights too: what is left are sums in another order.
TEST_P(DecodeSteps, EqualTheForwardInInt8) {
  const auto round = model_->int8_rounding(32);
  for (const auto& key : model_->named_parameters().keys()) round(key);
  DecodeStep step(model_, prefilled(prompt_));
  const at::Tensor* joined = model_->named_buffers().find("model.layers.0.attn.k_proj.scales");
  ASSERT_NE(joined, nullptr);
  for (int64_t t = kPrompt; t < ids_.size(1); ++t) {
    expect_close(step.forward(ids_.select(1, t)), uncached(ids_.narrow(1, 0, t + 1)));
  }
}

TEST(DecodeStepsOf, ModelsWithOtherLayersAreRefused) {
  EXPECT_EQ(DecodeStep::why_not(tiny_config()), "");
  EXPECT_EQ(DecodeStep::why_not(hybrid_config()), "layer 1 is attention, whose cache grows");
  GatedDeltaNetConfig config = tiny_config();
  config.use_short_conv = false;
  EXPECT_EQ(DecodeStep::why_not(config), "its layers have no short convolution");
}

}  // namespace
}  // namespace gdn::testing
