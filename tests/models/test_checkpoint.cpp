// Model folders: saved and loaded, sharded, tied, foreign, broken.
#include <fstream>

#include <nlohmann/json.hpp>

#include <gdn/models/checkpoint.h>
#include <gdn/models/generate.h>
#include <gdn/models/safetensors.h>
#include <gdn/ops/common/int8_weight.h>

#include "models/tiny_models.h"

namespace gdn::testing {
namespace {

namespace fs = std::filesystem;

void expect_same_model(GatedDeltaNetForCausalLM& got, GatedDeltaNetForCausalLM& expected) {
  const auto a = got->named_parameters(), b = expected->named_parameters();
  ASSERT_EQ(a.keys(), b.keys());
  for (const auto& named : b) {
    EXPECT_EQ(a[named.key()].scalar_type(), named.value().scalar_type()) << named.key();
    EXPECT_TRUE(torch::equal(a[named.key()], named.value())) << named.key();
  }
  got->eval();
  const at::Tensor ids = random_ids(expected->config(), 2, 10);
  EXPECT_TRUE(torch::equal(got->forward({.input_ids = ids}).logits,
                           expected->forward({.input_ids = ids}).logits));
}

std::vector<std::string> files(const fs::path& folder) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(folder)) names.push_back(entry.path().filename());
  std::sort(names.begin(), names.end());
  return names;
}

nlohmann::json read_json(const fs::path& file) {
  return nlohmann::json::parse(std::ifstream(file));
}

/// Changes the tensors of a folder's model.safetensors.
template <typename Change>
void edit_weights(const fs::path& folder, Change&& change) {
  std::map<std::string, at::Tensor> tensors;
  {
    const SafetensorsFile file(folder / "model.safetensors");
    for (const std::string& name : file.names()) tensors[name] = file.tensor(name).clone();
  }
  change(tensors);
  write_safetensors(folder / "model.safetensors", {tensors.begin(), tensors.end()});
}

TEST(Checkpoint, RoundTripIsBitEqual) {
  for (const bool tied : {false, true}) {
    const TestFolder folder;
    GatedDeltaNetConfig config = hybrid_config();
    config.tie_word_embeddings = tied;
    GatedDeltaNetForCausalLM model = make_model(config);
    save_pretrained(model, folder / "new" / "deep");
    EXPECT_EQ(files(folder / "new" / "deep"),
              (std::vector<std::string>{"config.json", "model.safetensors"}));
    EXPECT_EQ(
        SafetensorsFile(folder / "new" / "deep" / "model.safetensors").contains("lm_head.weight"),
        !tied);
    GatedDeltaNetForCausalLM loaded = load_pretrained(folder / "new" / "deep");
    expect_same_model(loaded, model);
    EXPECT_EQ(read_json(folder / "new" / "deep" / "config.json")["dtype"], "float32");
  }
}

TEST(Checkpoint, ShardsWithAnIndex) {
  const TestFolder folder;
  GatedDeltaNetForCausalLM model = make_model(hybrid_config());
  save_pretrained(model, folder.path(), 20'000);
  const auto names = files(folder.path());
  ASSERT_GT(names.size(), 4U);
  EXPECT_EQ(names[1].substr(0, 16), "model-00001-of-0");
  const auto index = read_json(folder / "model.safetensors.index.json");
  EXPECT_EQ(index["metadata"]["total_size"], model->parameter_count() * 4);
  EXPECT_EQ(index["weight_map"].size(), model->named_parameters().size());
  GatedDeltaNetForCausalLM loaded = load_pretrained(folder.path());
  expect_same_model(loaded, model);
}

TEST(Checkpoint, SavingAgainLeavesNothingOfTheOldOne) {
  const TestFolder folder;
  GatedDeltaNetForCausalLM model = make_model(tiny_config());
  std::set<std::string> before;
  for (const int64_t shard : {20'000L, 20'000L, 30'000L, kMaxShardBytes, 20'000L}) {
    {
      const torch::NoGradGuard no_grad;
      for (const at::Tensor& parameter : model->parameters()) parameter.add_(0.01);
    }
    save_pretrained(model, folder.path(), shard);
    GatedDeltaNetForCausalLM loaded = load_pretrained(folder.path());
    expect_same_model(loaded, model);
    const bool single = shard == kMaxShardBytes;
    EXPECT_EQ(fs::exists(folder / "model.safetensors"), single);
    EXPECT_EQ(fs::exists(folder / "model.safetensors.index.json"), !single);
    std::set<std::string> listed = {"config.json"};
    if (single) {
      listed.insert("model.safetensors");
    } else {
      listed.insert("model.safetensors.index.json");
      const auto index = read_json(folder / "model.safetensors.index.json");
      std::set<std::string> shards;
      for (const auto& [key, file] : index["weight_map"].items()) shards.insert(file);
      // The old index speaks of the old files until the new one takes its place.
      for (const std::string& name : shards) EXPECT_FALSE(before.count(name)) << name;
      listed.insert(shards.begin(), shards.end());
      before = shards;
    }
    EXPECT_EQ(files(folder.path()), std::vector<std::string>(listed.begin(), listed.end()));
  }
}

TEST(Checkpoint, DtypeIsTheFilesOrTheCallers) {
  const TestFolder folder;
  GatedDeltaNetForCausalLM model = make_model(tiny_config());
  save_pretrained(model, folder / "wide");
  model->to(torch::kBFloat16);
  save_pretrained(model, folder / "narrow");
  EXPECT_EQ(read_json(folder / "narrow" / "config.json")["dtype"], "bfloat16");
  GatedDeltaNetForCausalLM kept = load_pretrained(folder / "narrow");
  expect_same_model(kept, model);
  GatedDeltaNetForCausalLM cast = load_pretrained(folder / "wide", torch::kCPU, torch::kBFloat16);
  expect_same_model(cast, model);
  EXPECT_EQ(cast->named_parameters()["model.layers.0.attn.A_log"].scalar_type(), torch::kFloat);
}

TEST(Checkpoint, MatricesBecomeInt8AsTheyAreLoaded) {
  const torch::NoGradGuard no_grad;
  for (const bool tied : {false, true}) {
    const TestFolder folder;
    GatedDeltaNetConfig config = hybrid_config();
    config.tie_word_embeddings = tied;
    GatedDeltaNetForCausalLM model = make_model(config);
    save_pretrained(model, folder.path());
    GatedDeltaNetForCausalLM rounded =
        load_pretrained(folder.path(), torch::kCPU, torch::kFloat, /*int8_scale_size=*/32);
    rounded->eval();
    // A model with the rounded weights in fp32 computes the same.
    auto wide = model->named_parameters();
    const auto narrow = rounded->named_parameters(), scales = rounded->named_buffers();
    int64_t matrices = 0;
    for (const auto& named : narrow) {
      if (named.value().scalar_type() != torch::kChar) {
        EXPECT_TRUE(named.key().ends_with("norm.weight") || named.value().dim() != 2)
            << named.key();
        continue;
      }
      ++matrices;
      const std::string module = named.key().substr(0, named.key().size() - 7);  // ".weight"
      wide[named.key()].copy_(from_int8({named.value(), scales[module + ".scales"]}, at::kFloat));
    }
    EXPECT_EQ(matrices, 10 + 2 * 7 + (tied ? 1 : 2));  // a layer of ours, two of attention
    EXPECT_LT(rounded->nbytes(), model->nbytes() / 2);
    for (const int64_t T : {1, 5, 40}) {
      const at::Tensor ids = random_ids(config, 2, T);
      const auto got = rounded->forward({.input_ids = ids, .labels = ids});
      const auto want = model->forward({.input_ids = ids, .labels = ids});
      expect_close(got.loss, want.loss);
      expect_close(rounded->forward({.input_ids = ids}).logits,
                   model->forward({.input_ids = ids}).logits);
    }
    EXPECT_EQ(generate(rounded, {{1, 2}, {3}}, {.max_new_tokens = 9, .temperature = 0}),
              generate(model, {{1, 2}, {3}}, {.max_new_tokens = 9, .temperature = 0}));
    EXPECT_NE(message_of<std::runtime_error>([&] {
                save_pretrained(rounded, folder.path());
              }).find("is int8"),
              std::string::npos);
  }
  EXPECT_EQ(message_of<std::invalid_argument>(
                [] { load_pretrained("none", torch::Device("cuda:0"), torch::kFloat, 32); }),
            "weights of int8 must be on a CPU, got cuda:0");
}

/// flash-linear-attention names the same keys; its bf16 checkpoints hold bf16 gates, and some
/// writers repeat tied embeddings.
TEST(Checkpoint, LoadsForeignFolders) {
  const TestFolder folder;
  GatedDeltaNetConfig config = tiny_config();
  config.tie_word_embeddings = true;
  GatedDeltaNetForCausalLM model = make_model(config);
  save_pretrained(model, folder.path());
  edit_weights(folder.path(), [](auto& tensors) {
    tensors["lm_head.weight"] = tensors["model.embeddings.weight"];
    for (auto& [name, tensor] : tensors) tensor = tensor.to(torch::kBFloat16);
  });
  auto json = read_json(folder / "config.json");
  json.update({{"use_l2warp", false},
               {"torch_dtype", "bfloat16"},
               {"norm_first", false},
               {"attnres_block_size", nullptr},
               {"transformers_version", "4.48.0"},
               {"hidden_ratio", nullptr},
               {"id2label", {{"0", "LABEL_0"}}}});
  std::ofstream(folder / "config.json") << json;
  GatedDeltaNetForCausalLM loaded = load_pretrained(folder.path());
  const auto parameters = loaded->named_parameters();
  EXPECT_EQ(parameters["model.embeddings.weight"].scalar_type(), torch::kBFloat16);
  EXPECT_EQ(parameters["model.layers.1.attn.dt_bias"].scalar_type(), torch::kFloat);
  EXPECT_TRUE(torch::equal(
      parameters["model.layers.1.mlp.up_proj.weight"],
      model->named_parameters()["model.layers.1.mlp.up_proj.weight"].to(torch::kBFloat16)));
}

TEST(Checkpoint, MistakesNameFileAndKey) {
  const TestFolder folder;
  GatedDeltaNetForCausalLM model = make_model(tiny_config());
  const auto weights = (folder / "model.safetensors").string();
  const auto message_after = [&](auto change) {
    save_pretrained(model, folder.path());
    edit_weights(folder.path(), change);
    return message_of<std::runtime_error>([&] { load_pretrained(folder.path()); });
  };
  using Tensors = std::map<std::string, at::Tensor>&;
  EXPECT_EQ(message_after([](Tensors t) { t.erase("model.norm.weight"); }),
            weights + ": tensor \"model.norm.weight\" is missing");
  EXPECT_EQ(message_after([](Tensors t) { t["model.layers.9.x"] = torch::ones({1}); }),
            weights + ": tensor \"model.layers.9.x\" is not part of this model");
  EXPECT_EQ(message_after([](Tensors t) { t["model.norm.weight"] = torch::ones({47}); }),
            weights +
                ": tensor \"model.norm.weight\" must have shape [48] for this config.json, "
                "got [47]");
  EXPECT_EQ(
      message_after([](Tensors t) { t["model.norm.weight"] = torch::ones({48}, torch::kInt); }),
      weights + ": tensor \"model.norm.weight\" must be of floating-point numbers, got Int");
  fs::remove(weights);
  EXPECT_EQ(message_of<std::runtime_error>([&] { load_pretrained(folder.path()); }),
            folder.path().string() +
                ": holds neither model.safetensors nor model.safetensors.index.json");
  EXPECT_EQ(message_of<std::runtime_error>([&] { load_pretrained(folder / "none"); }),
            (folder / "none" / "config.json").string() + ": cannot be read");
}

TEST(Checkpoint, HostileIndexes) {
  const TestFolder folder;
  GatedDeltaNetForCausalLM model = make_model(tiny_config());
  save_pretrained(model, folder.path(), 20'000);
  const auto path = folder / "model.safetensors.index.json";
  const auto good = read_json(path);
  const auto message_with = [&](const std::string& text) {
    std::ofstream(path) << text;
    return message_of<std::runtime_error>([&] { load_pretrained(folder.path()); });
  };
  const auto changed = [&](const nlohmann::json& file) {
    auto index = good;
    index["weight_map"]["model.norm.weight"] = file;
    return index.dump();
  };
  const std::string name = path.string();
  EXPECT_NE(message_with("{").find(name + ": not JSON"), std::string::npos);
  EXPECT_EQ(message_with("{}"), name + ": has no object weight_map");
  EXPECT_EQ(message_with(changed("../x.safetensors")),
            name +
                ": weight_map must give \"model.norm.weight\" a file of this folder, got "
                "\"../x.safetensors\"");
  EXPECT_NE(message_with(changed(3)).find("a file of this folder, got 3"), std::string::npos);
  EXPECT_NE(message_with(changed("absent.safetensors")).find("absent.safetensors: cannot be read"),
            std::string::npos);
  EXPECT_NE(
      message_with(changed(good["weight_map"]["model.embeddings.weight"]))
          .find("holds no tensor \"model.norm.weight\", as model.safetensors.index.json says"),
      std::string::npos);
}

}  // namespace
}  // namespace gdn::testing
