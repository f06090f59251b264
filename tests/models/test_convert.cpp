// Gated DeltaNet layers of transformers' model folders: converted, converted back, refused.
// tests/compat converts folders that transformers itself writes.
#include <array>
#include <fstream>
#include <map>

#include <nlohmann/json.hpp>

#include <gdn/models/convert.h>
#include <gdn/models/safetensors.h>

#include "models/tiny_models.h"

namespace gdn::testing {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using Tensors = std::map<std::string, at::Tensor>;

constexpr int64_t D = 12, H = 2, HV = 4, K = 4, V = 3, W = 4;
constexpr int64_t R = HV / H;  // value heads of a key head
constexpr int64_t kQkv = 2 * H * K + HV * V;

json tiny_model_config(const std::string& model_type) {
  return {{"model_type", model_type},
          {"hidden_act", "silu"},
          {"hidden_size", D},
          {"num_hidden_layers", 3},
          {"layer_types", {"linear_attention", "full_attention", "linear_attention"}},
          {"linear_num_key_heads", H},
          {"linear_num_value_heads", HV},
          {"linear_key_head_dim", K},
          {"linear_value_head_dim", V},
          {"linear_conv_kernel_dim", W},
          {"linear_allow_neg_eigval", true},
          {"rms_norm_eps", 1e-6}};
}

/// Shapes by name behind "linear_attn.", as transformers' classes have them.
std::map<std::string, std::vector<int64_t>> layer_shapes(const std::string& model_type) {
  std::map<std::string, std::vector<int64_t>> shapes = {{"A_log", {HV}}, {"dt_bias", {HV}}};
  if (model_type == "olmo_hybrid") {
    for (const char* name : {"q_proj.weight", "k_proj.weight"}) shapes[name] = {H * K, D};
    for (const char* name : {"v_proj.weight", "g_proj.weight"}) shapes[name] = {HV * V, D};
    for (const char* name : {"a_proj.weight", "b_proj.weight"}) shapes[name] = {HV, D};
    // Three equal parts, as far as they go: what transformers' save_pretrained writes.
    shapes["q_conv1d.weight"] = shapes["k_conv1d.weight"] = {(kQkv + 2) / 3, 1, W};
    shapes["v_conv1d.weight"] = {kQkv - 2 * ((kQkv + 2) / 3), 1, W};
    shapes["o_norm.weight"] = {V};
    shapes["o_proj.weight"] = {D, HV * V};
    return shapes;
  }
  if (model_type == "qwen3_next") {
    shapes["in_proj_qkvz.weight"] = {kQkv + HV * V, D};
    shapes["in_proj_ba.weight"] = {2 * HV, D};
  } else {
    shapes["in_proj_qkv.weight"] = {kQkv, D};
    shapes["in_proj_z.weight"] = {HV * V, D};
    shapes["in_proj_a.weight"] = shapes["in_proj_b.weight"] = {HV, D};
  }
  shapes["conv1d.weight"] = {kQkv, 1, W};
  shapes["norm.weight"] = {V};
  shapes["out_proj.weight"] = {D, HV * V};
  return shapes;
}

Tensors tiny_model(const std::string& model_type, const std::string& prefix = "model.") {
  torch::manual_seed(3);
  Tensors tensors = {{"lm_head.weight", torch::randn({7, D})}};
  for (const int layer : {0, 2}) {
    const std::string start = prefix + "layers." + std::to_string(layer) + ".";
    for (const auto& [name, shape] : layer_shapes(model_type)) {
      tensors[start + "linear_attn." + name] = torch::randn(shape).to(torch::kBFloat16);
    }
    tensors[start + "input_layernorm.weight"] = torch::randn({D});
  }
  return tensors;
}

void write_text(const fs::path& file, const std::string& text) { std::ofstream(file) << text; }

std::string read_bytes(const fs::path& file) {
  std::ifstream stream(file, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), {}};
}

void write_model(const fs::path& folder, const json& config, const Tensors& tensors) {
  fs::create_directories(folder);
  write_text(folder / "config.json", config.dump());
  write_safetensors(folder / "model.safetensors", {tensors.begin(), tensors.end()});
}

Tensors read_model(const fs::path& folder) {
  const SafetensorsFile file(folder / "model.safetensors");
  Tensors tensors;
  for (const std::string& name : file.names()) tensors[name] = file.tensor(name).clone();
  return tensors;
}

/// The relative paths of all files, with their contents.
std::map<std::string, std::string> contents(const fs::path& folder) {
  std::map<std::string, std::string> result;
  for (const auto& entry : fs::recursive_directory_iterator(folder)) {
    if (entry.is_regular_file()) {
      result[fs::relative(entry.path(), folder).string()] = read_bytes(entry.path());
    }
  }
  return result;
}

TEST(Convert, Qwen3NextsRowsGoToTheirProjections) {
  const TestFolder folder;
  const Tensors theirs = tiny_model("qwen3_next");
  write_model(folder / "model", tiny_model_config("qwen3_next"), theirs);
  const Conversion done = convert_from_transformers(folder / "model", folder / "ours");
  EXPECT_EQ(done.model_type, "qwen3_next");
  EXPECT_EQ(done.layers, (std::vector<int64_t>{0, 2}));
  EXPECT_EQ(done.tensors, 26U);
  EXPECT_EQ(done.others, 3U);

  const Tensors ours = read_model(folder / "ours");
  EXPECT_EQ(ours.size(), 26U);
  const std::string from = "model.layers.2.linear_attn.", to = "model.layers.2.attn.";
  const auto expect_row = [&](const char* name, int64_t row, const char* their_name,
                              int64_t their_row) {
    EXPECT_TRUE(torch::equal(ours.at(to + name)[row], theirs.at(from + their_name)[their_row]))
        << name << " row " << row;
  };
  for (int64_t h = 0; h < H; ++h) {
    const int64_t block = h * 2 * (K + R * V);
    for (int64_t i = 0; i < K; ++i) {
      expect_row("q_proj.weight", h * K + i, "in_proj_qkvz.weight", block + i);
      expect_row("k_proj.weight", h * K + i, "in_proj_qkvz.weight", block + K + i);
    }
    for (int64_t i = 0; i < R * V; ++i) {
      expect_row("v_proj.weight", h * R * V + i, "in_proj_qkvz.weight", block + 2 * K + i);
      expect_row("g_proj.weight", h * R * V + i, "in_proj_qkvz.weight", block + 2 * K + R * V + i);
    }
    for (int64_t i = 0; i < R; ++i) {
      expect_row("b_proj.weight", h * R + i, "in_proj_ba.weight", h * 2 * R + i);
      expect_row("a_proj.weight", h * R + i, "in_proj_ba.weight", h * 2 * R + R + i);
    }
  }
  for (int64_t i = 0; i < HV * V; ++i) {
    expect_row("v_conv1d.weight", i, "conv1d.weight", 2 * H * K + i);
  }
  EXPECT_TRUE(torch::equal(ours.at(to + "o_proj.weight"), theirs.at(from + "out_proj.weight")));
  EXPECT_TRUE(torch::equal(ours.at(to + "o_norm.weight"), theirs.at(from + "norm.weight")));
}

TEST(Convert, ConfigurationIsOurLayers) {
  const TestFolder folder;
  write_model(folder / "model", tiny_model_config("olmo_hybrid"), tiny_model("olmo_hybrid"));
  convert_from_transformers(folder / "model", folder / "ours");
  const json config = json::parse(std::ifstream(folder / "ours" / "config.json"));
  EXPECT_EQ(config["model_type"], "gated_deltanet_layers");
  EXPECT_EQ(config["layers"], json({0, 2}));
  EXPECT_EQ(config["expand_v"], 0.75);
  EXPECT_EQ(config["num_v_heads"], HV);
  EXPECT_EQ(config["allow_neg_eigval"], true);
  EXPECT_EQ(config["norm_eps"], 1e-5);  // OLMo-Hybrid's, whatever rms_norm_eps
  EXPECT_TRUE(holds_layers(folder / "ours"));
  EXPECT_FALSE(holds_layers(folder / "model"));

  const Tensors ours = read_model(folder / "ours"), theirs = read_model(folder / "model");
  const auto all = [](const Tensors& tensors, const std::string& prefix) {
    return torch::cat({tensors.at(prefix + "q_conv1d.weight"),
                       tensors.at(prefix + "k_conv1d.weight"),
                       tensors.at(prefix + "v_conv1d.weight")});
  };
  EXPECT_EQ(ours.at("model.layers.0.attn.q_conv1d.weight").size(0), H * K);
  EXPECT_TRUE(
      torch::equal(all(ours, "model.layers.0.attn."), all(theirs, "model.layers.0.linear_attn.")));
}

TEST(Convert, ThereAndBackIsTheSameBytes) {
  for (const std::string type : {"qwen3_next", "qwen3_5_text", "qwen3_5_moe", "olmo_hybrid"}) {
    const TestFolder folder;
    json config = tiny_model_config(type);
    Tensors tensors = tiny_model(type);
    if (type == "qwen3_5_moe") {  // with images: the text model's configuration is inside
      config["model_type"] = "qwen3_5_moe_text";
      config = {{"model_type", type}, {"text_config", config}};
      tensors = tiny_model(type, "model.language_model.");
    }
    write_model(folder / "model", config, tensors);
    write_text(folder / "model" / "tokenizer.json", "{}");
    fs::create_directories(folder / "model" / "extra");
    write_text(folder / "model" / "extra" / "notes", "kept");

    convert_from_transformers(folder / "model", folder / "ours");
    convert_to_transformers(folder / "ours", folder / "model", folder / "deep" / "back");
    EXPECT_EQ(contents(folder / "deep" / "back"), contents(folder / "model")) << type;
    convert_from_transformers(folder / "deep" / "back", folder / "again");
    EXPECT_EQ(contents(folder / "again"), contents(folder / "ours")) << type;
  }
}

TEST(Convert, TrainedLayersTakeTheirPlaceInAShardedBase) {
  const TestFolder folder;
  Tensors theirs = tiny_model("qwen3_5_text");
  fs::create_directories(folder / "base");
  write_text(folder / "base" / "config.json", tiny_model_config("qwen3_5_text").dump());
  std::array<std::vector<std::pair<std::string, at::Tensor>>, 2> shards;
  json index = {{"metadata", json::object()}, {"weight_map", json::object()}};
  for (const auto& [name, tensor] : theirs) {
    const size_t shard = name.size() % 2;
    shards[shard].emplace_back(name, tensor);
    index["weight_map"][name] = shard == 0 ? "a.safetensors" : "b.safetensors";
  }
  write_safetensors(folder / "base" / "a.safetensors", shards[0]);
  write_safetensors(folder / "base" / "b.safetensors", shards[1]);
  write_text(folder / "base" / "model.safetensors.index.json", index.dump());

  convert_from_transformers(folder / "base", folder / "ours");
  Tensors ours = read_model(folder / "ours");
  for (auto& [name, tensor] : ours) tensor = tensor.to(torch::kFloat) + 0.125;  // fp32, as trained
  write_safetensors(folder / "ours" / "model.safetensors", {ours.begin(), ours.end()});
  convert_to_transformers(folder / "ours", folder / "base", folder / "back");

  const SafetensorsFile a(folder / "back" / "a.safetensors"), b(folder / "back" / "b.safetensors");
  for (const auto& [name, before] : theirs) {
    const at::Tensor after = (name.size() % 2 == 0 ? a : b).tensor(name);
    const bool converted = name.find(".linear_attn.") != std::string::npos;
    const at::Tensor expected =
        converted ? (before.to(torch::kFloat) + 0.125).to(before.scalar_type()) : before;
    EXPECT_TRUE(torch::equal(after, expected)) << name;
  }
}

TEST(Convert, FirstQwen3NextConfigurationsGiveAnInterval) {
  const TestFolder folder;
  json config = tiny_model_config("qwen3_next");
  config.erase("layer_types");
  config["full_attention_interval"] = 2;
  write_model(folder / "model", config, tiny_model("qwen3_next"));
  EXPECT_EQ(convert_from_transformers(folder / "model", folder / "ours").layers,
            (std::vector<int64_t>{0, 2}));
}

/// What converting fails with after a change to a good Qwen3-Next model. Nothing may be left.
template <typename Change>
std::string message_after(Change&& change) {
  const TestFolder folder;
  json config = tiny_model_config("qwen3_next");
  Tensors tensors = tiny_model("qwen3_next");
  change(config, tensors);
  write_model(folder / "model", config, tensors);
  const std::string message = message_of<std::runtime_error>(
      [&] { convert_from_transformers(folder / "model", folder / "ours"); });
  EXPECT_EQ(std::distance(fs::directory_iterator(folder.path()), {}), 1) << "something is left";
  return message;
}

void expect_named(const std::string& message, std::initializer_list<std::string> parts) {
  for (const std::string& part : parts) {
    EXPECT_NE(message.find(part), std::string::npos) << '"' << part << "\" in: " << message;
  }
}

TEST(Convert, ErrorsNameTheTensor) {
  const std::string prefix = "model.layers.2.linear_attn.";
  expect_named(message_after([&](json&, Tensors& t) { t.erase(prefix + "norm.weight"); }),
               {"model.safetensors", prefix + "norm.weight", "missing"});
  expect_named(message_after([&](json&, Tensors& t) { t[prefix + "conv1d.bias"] = at::zeros(4); }),
               {prefix + "conv1d.bias", "unknown"});
  expect_named(message_after([&](json&, Tensors& t) {
                 t[prefix + "in_proj_ba.weight"] = at::zeros({2 * HV, D + 1});
               }),
               {prefix + "in_proj_ba.weight", "[8, 12]", "[8, 13]"});
  expect_named(message_after([&](json&, Tensors& t) {
                 auto& tensor = t[prefix + "in_proj_qkvz.weight"];
                 tensor = tensor.to(at::kFloat8_e4m3fn);
               }),
               {prefix + "in_proj_qkvz.weight", "floating-point", "Float8_e4m3fn"});
  expect_named(message_after([&](json&, Tensors& t) {
                 for (const auto& [name, shape] : layer_shapes("qwen3_next")) {
                   t.erase(prefix + name);
                 }
               }),
               {"layer 2"});
  expect_named(message_after([&](json&, Tensors& t) {
                 t["model.layers.1.linear_attn.A_log"] = at::zeros(HV);
               }),
               {"model.layers.1.linear_attn.A_log", "not linear_attention"});
  expect_named(message_after([&](json&, Tensors& t) {
                 t["draft.layers.2.linear_attn.A_log"] = at::zeros(HV);
               }),
               {"draft.layers.2", "layer 2"});
}

TEST(Convert, ErrorsNameTheKey) {
  const auto with = [](const std::string& key, const json& value) {
    return message_after([&](json& config, Tensors&) { config[key] = value; });
  };
  expect_named(with("model_type", "llama"), {"config.json", "model_type", "llama"});
  expect_named(with("hidden_act", "gelu"), {"hidden_act", "gelu"});
  expect_named(with("linear_num_value_heads", 3), {"linear_num_value_heads", "3"});
  expect_named(with("linear_key_head_dim", "big"), {"linear_key_head_dim", "big"});
  expect_named(with("layer_types", {"linear_attention"}), {"layer_types"});
  expect_named(with("layer_types", {"linear_attention", "sliding_attention", "full_attention"}),
               {"layer_types", "sliding_attention"});
  expect_named(message_after([](json& config, Tensors&) { config.erase("rms_norm_eps"); }),
               {"rms_norm_eps"});
}

TEST(Convert, BackNeedsTheSameModel) {
  const TestFolder folder;
  write_model(folder / "model", tiny_model_config("qwen3_next"), tiny_model("qwen3_next"));
  convert_from_transformers(folder / "model", folder / "ours");
  const auto message = [&](const fs::path& out) {
    return message_of<std::runtime_error>(
        [&] { convert_to_transformers(folder / "ours", folder / "model", out); });
  };
  expect_named(message(folder / "model"), {"inside"});
  expect_named(message(folder / "model" / "new"), {"inside"});
  expect_named(message(folder / "ours"), {"exists"});

  const json good = json::parse(std::ifstream(folder / "ours" / "config.json"));
  json other = good;
  other["norm_eps"] = 1e-5;
  write_text(folder / "ours" / "config.json", other.dump());
  expect_named(message(folder / "back"), {"config.json", "norm_eps", "1e-06", "1e-05"});
  other = good;
  other["flavour"] = 1;
  write_text(folder / "ours" / "config.json", other.dump());
  expect_named(message(folder / "back"), {"flavour"});
  write_text(folder / "ours" / "config.json", good.dump());

  const Tensors ours = read_model(folder / "ours");
  const auto rewrite = [&](auto&& change) {
    Tensors changed = ours;
    change(changed);
    write_safetensors(folder / "ours" / "model.safetensors", {changed.begin(), changed.end()});
    return message(folder / "back");
  };
  const std::string name = "model.layers.0.attn.b_proj.weight";
  expect_named(rewrite([&](Tensors& t) { t.erase(name); }), {name, "missing"});
  expect_named(rewrite([&](Tensors& t) {
                 t[name] = at::zeros({2, 2});
               }),
               {name, "[4, 12]", "[2, 2]"});
  expect_named(rewrite([&](Tensors& t) { t["more"] = at::zeros(2); }), {"more", "unknown"});
  EXPECT_FALSE(fs::exists(folder / "back"));
}

}  // namespace
}  // namespace gdn::testing
