#include <nlohmann/json.hpp>

#include <gdn/models/causal_lm.h>
#include <gdn/training/options.h>
#include <gdn/training/presets.h>
#include <gdn/training/tokenizer.h>

#include "support.h"

namespace gdn {
namespace {

using nlohmann::json;
using testing::message_of;
using testing::TestFolder;

TEST(TrainOptions, ComeBackFromJson) {
  // A value other than the default in every field, whatever fields there are.
  TrainOptions options;
  int64_t next = 7;
  const auto change = [&](const char*, auto& field, const char*) {
    using Field = std::decay_t<decltype(field)>;
    if constexpr (std::is_same_v<Field, bool>) {
      field = !field;
    } else if constexpr (std::is_same_v<Field, std::string>) {
      field = "text " + std::to_string(++next);
    } else if constexpr (std::is_same_v<Field, std::vector<std::string>>) {
      field = {"a", "b"};
    } else {
      field = ++next;
    }
  };
  for_each_option(options, change);
  const json written = train_options_to_json(options);
  EXPECT_EQ(train_options_to_json(train_options_from_json(written)), written);
  const json defaults = train_options_to_json({});
  EXPECT_EQ(written.size(), defaults.size());
  for (const auto& [key, value] : written.items()) EXPECT_NE(value, defaults.at(key)) << key;
}

TEST(TrainOptions, KeepWhatJsonLeavesOpen) {
  TrainOptions defaults;
  defaults.steps = 5;
  defaults.layers = 3;
  const TrainOptions options =
      train_options_from_json({{"seq_len", 77}, {"layers", nullptr}}, defaults);
  EXPECT_EQ(options.steps, 5);
  EXPECT_EQ(options.seq_len, 77);
  EXPECT_FALSE(options.layers.has_value());
}

TEST(TrainOptions, NameWhatIsWrong) {
  const auto message = [](const json& value) {
    return message_of<std::invalid_argument>([&] { train_options_from_json(value); });
  };
  EXPECT_EQ(message({{"sequence", 1}}), "unknown training option 'sequence'");
  EXPECT_EQ(message({{"steps", "many"}}), "steps must be an integer, got \"many\"");
  EXPECT_EQ(message({{"steps", 1.5}}), "steps must be an integer, got 1.5");
  EXPECT_EQ(message({{"seed", -1}}), "seed must be an integer that is not negative, got -1");
  EXPECT_EQ(message({{"data", "a"}}), "data must be a list of strings, got \"a\"");
  EXPECT_EQ(message({{"resume", 1}}), "resume must be true or false, got 1");
  EXPECT_EQ(message(json::array()), "training options must be an object, got []");

  const auto invalid = [](auto change) {
    TrainOptions options;
    options.data = {"a"};
    options.out = "b";
    options.validate();
    change(options);
    return message_of<std::invalid_argument>([&] { options.validate(); });
  };
  EXPECT_EQ(invalid([](auto& o) { o.steps = 0; }), "steps must be at least 1, got 0");
  EXPECT_EQ(invalid([](auto& o) { o.lr = 0; }), "lr must be above 0, got 0.0");
  EXPECT_EQ(invalid([](auto& o) { o.dtype = "fp8"; }),
            "dtype must be fp32, bf16 or bf16-weights, got \"fp8\"");
  EXPECT_EQ(invalid([](auto& o) { o.data.clear(); }),
            "data must be at least one file or folder, got []");
}

TEST(TrainOptions, AreRecordedByARun) {
  const TestFolder folder;
  TrainOptions options;
  options.steps = 77;
  folder.write(kTrainOptionsFile, train_options_to_json(options).dump());
  EXPECT_EQ(recorded_train_options(folder / "").steps, 77);
  const auto message = [&] {
    return message_of<std::runtime_error>([&] { recorded_train_options(folder / ""); });
  };
  folder.write(kTrainOptionsFile, "{");
  EXPECT_NE(message().find(kTrainOptionsFile), std::string::npos);
  std::filesystem::remove(folder / kTrainOptionsFile);
  EXPECT_NE(message().find("holds no run to resume"), std::string::npos);
}

TEST(ModelConfig, TakesPresetFlagsAndTokenizer) {
  TrainOptions options;
  options.preset = "125M";
  options.layers = 3;
  const auto tokenizer = make_tokenizer("byte");
  const GatedDeltaNetConfig config = model_config(options, *tokenizer);
  EXPECT_EQ(config.hidden_size, 768);
  EXPECT_EQ(config.num_hidden_layers, 3);
  EXPECT_EQ(config.vocab_size, 257);
  EXPECT_EQ(config.bos_token_id, 256);
  EXPECT_EQ(config.eos_token_id, 256);
}

TEST(ModelConfig, TakesAFileAndRejectsATooSmallVocabulary) {
  const TestFolder folder;
  TrainOptions options;
  options.config = folder.write("config.json", R"({"hidden_size": 96, "vocab_size": 300})");
  options.head_dim = 32;
  const auto tokenizer = make_tokenizer("byte");
  const GatedDeltaNetConfig config = model_config(options, *tokenizer);
  EXPECT_EQ(config.hidden_size, 96);
  EXPECT_EQ(config.head_dim, 32);
  EXPECT_EQ(config.vocab_size, 300);
  folder.write("config.json", R"({"vocab_size": 200})");
  EXPECT_EQ(message_of<std::invalid_argument>([&] { model_config(options, *tokenizer); }),
            "vocab_size must be at least the tokenizer's 257, got 200");
}

/// Parameters by the shapes of the design's section 5.
int64_t count_parameters(const GatedDeltaNetConfig& config) {
  const int64_t D = config.hidden_size, H = config.num_heads, K = config.head_dim;
  const int64_t HV = config.value_heads(), V = config.head_v_dim();
  const int64_t projections = 2 * D * H * K + 3 * D * HV * V + 2 * D * HV;  // q k, v g o, a b
  const int64_t convolutions = config.conv_size * (2 * H * K + HV * V);
  const int64_t mixer = projections + convolutions + 2 * HV + V;  // A_log, dt_bias, o_norm
  const int64_t layer = mixer + 3 * D * config.mlp_size() + 2 * D;
  const int64_t embeddings = config.vocab_size * D * (config.tie_word_embeddings ? 1 : 2);
  return embeddings + config.num_hidden_layers * layer + D;
}

TEST(Presets, HaveTheSizesOfTheTable) {
  const std::map<std::string_view, double> millions = {
      {"tiny-byte", 4.0}, {"30M", 28.1}, {"125M", 123.9}, {"400M", 424.6}, {"1.3B", 1387}};
  EXPECT_EQ(preset_names().size(), millions.size());
  for (const std::string_view name : preset_names()) {
    GatedDeltaNetConfig config = preset_config(name);
    config.vocab_size = name == "tiny-byte" ? 257 : 32000;
    config.validate();
    const auto parameters = static_cast<double>(count_parameters(config));
    EXPECT_NEAR(parameters / 1e6, millions.at(name), 0.0005 * parameters / 1e6 + 0.05) << name;
  }
}

TEST(Presets, AreCountedAsTheModelCounts) {
  GatedDeltaNetConfig config = preset_config("tiny-byte");
  config.vocab_size = 257;
  EXPECT_EQ(GatedDeltaNetForCausalLM(config)->parameter_count(), count_parameters(config));
  config.tie_word_embeddings = false;
  EXPECT_EQ(GatedDeltaNetForCausalLM(config)->parameter_count(), count_parameters(config));
}

TEST(Presets, AreListedWhenTheNameIsUnknown) {
  EXPECT_EQ(message_of<std::invalid_argument>([] { preset_config("7B"); }),
            "preset must be one of tiny-byte, 30M, 125M, 400M, 1.3B, got '7B'");
}

}  // namespace
}  // namespace gdn
