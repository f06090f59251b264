// The configuration: what config.json may hold, and what is rejected.
#include <fstream>

#include <nlohmann/json.hpp>

#include <gdn/models/config.h>

#include "models/tiny_models.h"

namespace gdn::testing {
namespace {

using nlohmann::json;

/// As flash-linear-attention writes it through transformers, old keys and new ones.
const char* const kForeignConfig = R"({
  "_name_or_path": "", "allow_neg_eigval": false, "architectures": ["GatedDeltaNetForCausalLM"],
  "attn": {"layers": [3, 7], "num_heads": 16, "num_kv_heads": 4, "qkv_bias": false,
           "rope_theta": 10000.0, "window_size": 2048},
  "attn_mode": "chunk", "attnres_block_size": null, "bos_token_id": 1, "chunk_size_feed_forward": 0,
  "conv_size": 4, "dtype": "bfloat16", "eos_token_id": 2, "expand_v": 2, "fuse_cross_entropy": true,
  "fuse_linear_cross_entropy": false, "fuse_norm": true, "fuse_swiglu": true, "head_dim": 256,
  "hidden_act": "swish", "hidden_ratio": 4, "hidden_size": 2048, "id2label": {"0": "LABEL_0"},
  "initializer_range": 0.02, "intermediate_size": null, "is_encoder_decoder": false,
  "label2id": {"LABEL_0": 0}, "max_position_embeddings": 8192, "model_type": "gated_deltanet",
  "norm_eps": 1e-06, "norm_first": false, "num_heads": 6, "num_hidden_layers": 21,
  "num_v_heads": null, "output_attentions": false, "output_hidden_states": false,
  "pad_token_id": null, "problem_type": null, "return_dict": true, "tie_word_embeddings": false,
  "torch_dtype": "bfloat16", "transformers_version": "5.23.0", "use_cache": true, "use_gate": true,
  "use_l2warp": false, "use_short_conv": true, "vocab_size": 32000})";

TEST(Config, ReadsForeignFile) {
  const GatedDeltaNetConfig config = config_from_json(json::parse(kForeignConfig));
  EXPECT_EQ(config.max_position_embeddings, 8192);
  EXPECT_EQ(config.head_v_dim(), 512);
  EXPECT_EQ(config.value_heads(), 6);
  EXPECT_EQ(config.mlp_size(), 5632);  // 256 * ceil(2048 * 4 * 2/3 / 256)
  EXPECT_FALSE(config.pad_token_id.has_value());
  ASSERT_EQ(config.attn.size(), 1U);
  EXPECT_EQ(config.attn[0].window_size, 2048);
  EXPECT_EQ(config.attention_of(3), &config.attn[0]);
  EXPECT_EQ(config.attention_of(4), nullptr);
}

TEST(Config, DefaultsAreTheDesigns) {
  const GatedDeltaNetConfig config = config_from_json(json::object());
  EXPECT_EQ(config_to_json(config), config_to_json(GatedDeltaNetConfig{}));
  EXPECT_EQ(config.hidden_size, 2048);
  EXPECT_EQ(config.num_hidden_layers, 21);
  EXPECT_EQ(config.vocab_size, 32000);
}

TEST(Config, RoundTrips) {
  GatedDeltaNetConfig config = hybrid_config();
  config.pad_token_id = 3;
  config.eos_token_id.reset();
  config.hidden_ratio = 3.5;
  const json written = config_to_json(config);
  EXPECT_EQ(config_to_json(config_from_json(json::parse(written.dump()))), written);
  EXPECT_TRUE(written["attn"].is_array());
  config.attn.pop_back();
  EXPECT_TRUE(config_to_json(config)["attn"].is_object());
  config.attn.clear();
  EXPECT_TRUE(config_to_json(config)["attn"].is_null());
}

struct Rejected {
  const char* change;  // merged into a valid configuration
  const char* message;
};

class RejectedConfig : public ::testing::TestWithParam<Rejected> {};

TEST_P(RejectedConfig, NamesTheField) {
  json object = config_to_json(tiny_config());
  object.merge_patch(json::parse(GetParam().change));
  EXPECT_EQ(message_of<std::invalid_argument>([&] { config_from_json(object); }),
            GetParam().message);
}

INSTANTIATE_TEST_SUITE_P(
    Fields, RejectedConfig,
    ::testing::Values(
        Rejected{R"({"hidden_sise": 1})", "unknown configuration key hidden_sise"},
        Rejected{R"({"hidden_size": "1"})", "hidden_size must be a 64-bit integer, got \"1\""},
        Rejected{R"({"hidden_size": 1.5})", "hidden_size must be a 64-bit integer, got 1.5"},
        Rejected{R"({"hidden_size": 18446744073709551615})",
                 "hidden_size must be a 64-bit integer, got 18446744073709551615"},
        Rejected{R"({"hidden_size": 0})", "hidden_size must be from 1 to 2^31, got 0"},
        Rejected{R"({"vocab_size": -5})", "vocab_size must be from 1 to 2^31, got -5"},
        Rejected{R"({"use_gate": 1})", "use_gate must be true or false, got 1"},
        Rejected{R"({"attn_mode": "fast"})",
                 "attn_mode must be \"chunk\" or \"fused_recurrent\", got \"fast\""},
        Rejected{R"({"attn_mode": 3})", "attn_mode must be a string, got 3"},
        Rejected{R"({"norm_eps": "small"})", "norm_eps must be a number, got \"small\""},
        Rejected{R"({"norm_eps": 0})", "norm_eps must be positive and finite, got 0.000000"},
        Rejected{R"({"num_v_heads": 3})", "num_v_heads must be a multiple of num_heads, got 3"},
        Rejected{R"({"expand_v": 1.01})",
                 "expand_v must be such that head_dim * expand_v is a whole number, got 1.010000"},
        Rejected{R"({"conv_size": 9})", "conv_size must be from 2 to 8, got 9"},
        Rejected{R"({"hidden_act": "powlu"})",
                 "hidden_act must be \"swish\" or \"silu\", got \"powlu\""},
        Rejected{R"({"initializer_range": -1})",
                 "initializer_range must be finite and not negative, got -1.000000"},
        Rejected{R"({"eos_token_id": 61})",
                 "eos_token_id must be from 0 to vocab_size - 1, got 61"},
        Rejected{
            R"({"fuse_linear_cross_entropy": true})",
            "fuse_linear_cross_entropy must be false when fuse_cross_entropy is true, got true"},
        Rejected{R"({"model_type": "llama"})",
                 "model_type must be \"gated_deltanet\", got \"llama\""},
        Rejected{R"({"use_l2warp": true})", "use_l2warp must be false, got true"},
        Rejected{R"({"attnres_block_size": 4})", "attnres_block_size must be null, got 4"},
        Rejected{R"({"quantization_config": {}})", "unknown configuration key quantization_config"},
        Rejected{R"({"attn": 3})", "attn must be null, an object or a list of objects, got 3"},
        Rejected{R"({"attn": {"num_heads": 2}})", "attn.layers must be given, got nothing"},
        Rejected{R"({"attn": {"layers": [0]}})", "attn.num_heads must be given, got nothing"},
        Rejected{R"({"attn": {"layers": [2], "num_heads": 2}})",
                 "attn.layers must be from 0 to num_hidden_layers - 1, got 2"},
        Rejected{R"({"attn": [{"layers": [0], "num_heads": 2}, {"layers": [0], "num_heads": 2}]})",
                 "attn.layers must be different from each other, got 0 twice"},
        Rejected{R"({"attn": {"layers": [0], "num_heads": 5}})",
                 "attn.num_heads must be a divisor of hidden_size that leaves an even head size, "
                 "got 5"},
        Rejected{R"({"attn": {"layers": [0], "num_heads": 11}})",
                 "attn.num_heads must be a divisor of hidden_size that leaves an even head size, "
                 "got 11"},
        Rejected{R"({"attn": {"layers": [0], "num_heads": 16}})",
                 "attn.num_heads must be a divisor of hidden_size that leaves an even head size, "
                 "got 16"},
        Rejected{R"({"attn": {"layers": [0], "num_heads": 4, "num_kv_heads": 3}})",
                 "attn.num_kv_heads must be a divisor of attn.num_heads, got 3"},
        Rejected{R"({"attn": {"layers": [0], "num_heads": 2, "window_size": 0}})",
                 "attn.window_size must be positive, got 0"},
        Rejected{R"({"attn": {"layers": [0], "num_heads": 2, "rope_theta": -1.0}})",
                 "attn.rope_theta must be positive and finite, got -1.000000"},
        Rejected{R"({"attn": {"layers": [0], "num_heads": 2, "windows": 4}})",
                 "unknown configuration key attn.windows"}));

TEST(Config, FileErrorsNameTheFile) {
  const TestFolder folder;
  const auto file = folder / "config.json";
  EXPECT_EQ(message_of<std::runtime_error>([&] { read_config(file); }),
            file.string() + ": cannot be read");
  std::ofstream(file) << "{\"hidden_size\": ";
  EXPECT_NE(message_of<std::runtime_error>([&] { read_config(file); }).find(": not JSON"),
            std::string::npos);
  std::ofstream(file) << "[]";
  EXPECT_EQ(message_of<std::invalid_argument>([&] { read_config(file); }),
            file.string() + ": configuration must be a JSON object, got array");
}

}  // namespace
}  // namespace gdn::testing
