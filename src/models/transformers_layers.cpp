#include <cmath>
#include <stdexcept>

#include <nlohmann/json.hpp>

#include <gdn/models/model_folder.h>
#include <gdn/models/transformers_layers.h>

namespace gdn {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

[[noreturn]] void fail(const std::string& key, const std::string& expected, const json& got) {
  throw std::invalid_argument(key + " must be " + expected + ", got " + got.dump());
}

const json& at_key(const json& config, const std::string& key) {
  const auto found = config.find(key);
  if (found == config.end()) throw std::invalid_argument("has no key " + key);
  return *found;
}

int64_t size_at(const json& config, const std::string& key) {
  const json& value = at_key(config, key);
  if (!value.is_number_integer() || value.get<int64_t>() <= 0 || value.get<int64_t>() > INT32_MAX) {
    fail(key, "an integer from 1 to 2^31 - 1", value);
  }
  return value.get<int64_t>();
}

/// Qwen3-Next's first configurations give the attention layers' interval instead of layer_types.
std::vector<int64_t> delta_net_layers(const json& config) {
  const int64_t count = size_at(config, "num_hidden_layers");
  std::vector<int64_t> layers;
  if (!config.contains("layer_types") || config["layer_types"].is_null()) {
    const int64_t interval = size_at(config, "full_attention_interval");
    for (int64_t layer = 0; layer < count; ++layer) {
      if ((layer + 1) % interval != 0) layers.push_back(layer);
    }
    return layers;
  }
  const json& types = config["layer_types"];
  if (!types.is_array() || static_cast<int64_t>(types.size()) != count) {
    fail("layer_types", "a list of num_hidden_layers (" + std::to_string(count) + ") names", types);
  }
  for (int64_t layer = 0; layer < count; ++layer) {
    if (types[layer] == "linear_attention") {
      layers.push_back(layer);
    } else if (types[layer] != "full_attention") {
      fail("layer_types", "of \"linear_attention\" and \"full_attention\"", types[layer]);
    }
  }
  return layers;
}

TransformersLayers from_json(const json& config) {
  if (!config.is_object()) fail("the configuration", "an object", config);
  if (config.contains("text_config")) return from_json(config["text_config"]);

  TransformersLayers model;
  const json& type = at_key(config, "model_type");
  const std::set<std::string> known = {"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text",
                                       "olmo_hybrid"};
  if (!type.is_string() || known.count(type.get<std::string>()) == 0) {
    fail("model_type", "qwen3_next, qwen3_5, qwen3_5_moe (or their text models) or olmo_hybrid",
         type);
  }
  model.model_type = type.get<std::string>();
  if (at_key(config, "hidden_act") != "silu") fail("hidden_act", "\"silu\"", config["hidden_act"]);
  model.layers = delta_net_layers(config);
  if (model.layers.empty()) throw std::invalid_argument("has no layer of type linear_attention");

  GatedDeltaNetOptions& options = model.options;
  const int64_t V = size_at(config, "linear_value_head_dim");
  options.hidden_size = size_at(config, "hidden_size");
  options.head_dim = size_at(config, "linear_key_head_dim");
  options.expand_v = static_cast<double>(V) / static_cast<double>(options.head_dim);
  options.num_heads = size_at(config, "linear_num_key_heads");
  options.num_v_heads = size_at(config, "linear_num_value_heads");
  if (*options.num_v_heads % options.num_heads != 0) {
    fail("linear_num_value_heads", "a multiple of linear_num_key_heads", *options.num_v_heads);
  }
  options.conv_size = size_at(config, "linear_conv_kernel_dim");
  if (model.model_type == "olmo_hybrid") {
    const json& negative = at_key(config, "linear_allow_neg_eigval");
    if (!negative.is_boolean()) fail("linear_allow_neg_eigval", "true or false", negative);
    options.allow_neg_eigval = negative.get<bool>();
    options.norm_eps = 1e-5;  // whatever rms_norm_eps, which is of the other norms
  } else {
    const json& eps = at_key(config, "rms_norm_eps");
    if (!eps.is_number() || !(eps.get<double>() > 0)) fail("rms_norm_eps", "positive", eps);
    options.norm_eps = eps.get<double>();
  }
  return model;
}

}  // namespace

TransformersLayers read_transformers_config(const fs::path& file) {
  const json config = read_json(file);
  try {
    return from_json(config);
  } catch (const std::invalid_argument& error) {
    throw std::runtime_error(file.string() + ": " + error.what());
  }
}

std::vector<TensorGroup> tensor_groups(const TransformersLayers& model,
                                       const std::set<std::string>& stored) {
  const GatedDeltaNetOptions& options = model.options;
  const int64_t D = options.hidden_size, H = options.num_heads, HV = *options.num_v_heads;
  const int64_t keys = H * options.head_dim, W = options.conv_size;
  const int64_t V = std::llround(options.expand_v * static_cast<double>(options.head_dim));
  const int64_t values = HV * V;

  const LayerTensor q{"q_proj.weight", {keys, D}}, k{"k_proj.weight", {keys, D}},
      v{"v_proj.weight", {values, D}}, g{"g_proj.weight", {values, D}}, b{"b_proj.weight", {HV, D}},
      a{"a_proj.weight", {HV, D}}, o{"o_proj.weight", {D, values}}, norm{"o_norm.weight", {V}};
  const std::vector<LayerTensor> taps = {{"q_conv1d.weight", {keys, 1, W}},
                                         {"k_conv1d.weight", {keys, 1, W}},
                                         {"v_conv1d.weight", {values, 1, W}}};
  const TensorGroup convolution{{"conv1d.weight"}, taps};

  std::vector<TensorGroup> groups = {{{"A_log"}, {{"A_log", {HV}}}},
                                     {{"dt_bias"}, {{"dt_bias", {HV}}}}};
  const auto add = [&](TensorGroup group) { groups.push_back(std::move(group)); };
  if (model.model_type == "olmo_hybrid") {
    for (const LayerTensor& same : {q, k, v, g, b, a, o, norm}) add({{same.name}, {same}});
    // transformers saves three equal parts, whatever the sizes of q, k and v; others those sizes.
    if (stored.count("conv1d.weight") != 0) {
      add(convolution);
    } else {
      add({{"q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight"}, taps});
    }
    return groups;
  }
  if (model.model_type == "qwen3_next") {  // a block for each key head
    add({{"in_proj_qkvz.weight"}, {q, k, v, g}, H});
    add({{"in_proj_ba.weight"}, {b, a}, H});
  } else {
    add({{"in_proj_qkv.weight"}, {q, k, v}});
    add({{"in_proj_z.weight"}, {g}});
    add({{"in_proj_b.weight"}, {b}});
    add({{"in_proj_a.weight"}, {a}});
  }
  add(convolution);
  add({{"norm.weight"}, {norm}});
  add({{"out_proj.weight"}, {o}});
  return groups;
}

}  // namespace gdn
