#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <stdexcept>

#include <nlohmann/json.hpp>

#include <gdn/models/config.h>
#include <gdn/models/model_folder.h>

namespace gdn {
namespace {

using nlohmann::json;

/// Names every field of the attention configuration once, for reading and writing.
template <typename Config, typename Visitor>
void visit_attention(Config& config, Visitor&& visit) {
  visit("layers", config.layers);
  visit("num_heads", config.num_heads);
  visit("num_kv_heads", config.num_kv_heads);
  visit("qkv_bias", config.qkv_bias);
  visit("qk_norm", config.qk_norm);
  visit("window_size", config.window_size);
  visit("rope_theta", config.rope_theta);
}

/// The same for the model's, except attn.
template <typename Config, typename Visitor>
void visit_model(Config& config, Visitor&& visit) {
  visit("attn_mode", config.attn_mode);
  visit("hidden_size", config.hidden_size);
  visit("expand_v", config.expand_v);
  visit("use_gate", config.use_gate);
  visit("use_short_conv", config.use_short_conv);
  visit("allow_neg_eigval", config.allow_neg_eigval);
  visit("conv_size", config.conv_size);
  visit("head_dim", config.head_dim);
  visit("num_heads", config.num_heads);
  visit("num_v_heads", config.num_v_heads);
  visit("max_position_embeddings", config.max_position_embeddings);
  visit("hidden_ratio", config.hidden_ratio);
  visit("intermediate_size", config.intermediate_size);
  visit("hidden_act", config.hidden_act);
  visit("num_hidden_layers", config.num_hidden_layers);
  visit("norm_eps", config.norm_eps);
  visit("use_cache", config.use_cache);
  visit("pad_token_id", config.pad_token_id);
  visit("bos_token_id", config.bos_token_id);
  visit("eos_token_id", config.eos_token_id);
  visit("tie_word_embeddings", config.tie_word_embeddings);
  visit("initializer_range", config.initializer_range);
  visit("fuse_norm", config.fuse_norm);
  visit("fuse_swiglu", config.fuse_swiglu);
  visit("fuse_cross_entropy", config.fuse_cross_entropy);
  visit("fuse_linear_cross_entropy", config.fuse_linear_cross_entropy);
  visit("vocab_size", config.vocab_size);
}

/// What transformers' base configuration writes into every config.json, old versions included, and
/// what its generation settings were when they lived there. None changes what the model computes.
const std::set<std::string, std::less<>> kPassedOver = {"_attn_implementation_autoset",
                                                        "_name_or_path",
                                                        "add_cross_attention",
                                                        "architectures",
                                                        "auto_map",
                                                        "bad_words_ids",
                                                        "begin_suppress_tokens",
                                                        "chunk_size_feed_forward",
                                                        "cross_attention_hidden_size",
                                                        "decoder_start_token_id",
                                                        "diversity_penalty",
                                                        "do_sample",
                                                        "dtype",
                                                        "early_stopping",
                                                        "encoder_no_repeat_ngram_size",
                                                        "exponential_decay_length_penalty",
                                                        "finetuning_task",
                                                        "forced_bos_token_id",
                                                        "forced_eos_token_id",
                                                        "id2label",
                                                        "is_decoder",
                                                        "is_encoder_decoder",
                                                        "label2id",
                                                        "length_penalty",
                                                        "max_length",
                                                        "min_length",
                                                        "no_repeat_ngram_size",
                                                        "num_beam_groups",
                                                        "num_beams",
                                                        "num_return_sequences",
                                                        "output_attentions",
                                                        "output_hidden_states",
                                                        "output_scores",
                                                        "prefix",
                                                        "problem_type",
                                                        "pruned_heads",
                                                        "remove_invalid_values",
                                                        "repetition_penalty",
                                                        "return_dict",
                                                        "return_dict_in_generate",
                                                        "sep_token_id",
                                                        "suppress_tokens",
                                                        "task_specific_params",
                                                        "temperature",
                                                        "tf_legacy_loss",
                                                        "tie_encoder_decoder",
                                                        "tokenizer_class",
                                                        "top_k",
                                                        "top_p",
                                                        "torch_dtype",
                                                        "torchscript",
                                                        "transformers_version",
                                                        "typical_p",
                                                        "use_bfloat16"};

/// Options of flash-linear-attention that we know only at the value that changes nothing.
const std::map<std::string, json, std::less<>> kOnlyAt = {{"attnres_block_size", nullptr},
                                                          {"model_type", "gated_deltanet"},
                                                          {"norm_first", false},
                                                          {"use_l2warp", false}};

[[noreturn]] void fail(const std::string& field, const std::string& expected,
                       const std::string& got) {
  throw std::invalid_argument(field + " must be " + expected + ", got " + got);
}

void read_value(const std::string& field, const json& value, bool& into) {
  if (!value.is_boolean()) fail(field, "true or false", value.dump());
  into = value.get<bool>();
}

void read_value(const std::string& field, const json& value, int64_t& into) {
  const bool fits = value.is_number_integer() &&
                    !(value.is_number_unsigned() && value.get<uint64_t>() > INT64_MAX);
  if (!fits) fail(field, "a 64-bit integer", value.dump());
  into = value.get<int64_t>();
}

void read_value(const std::string& field, const json& value, double& into) {
  if (!value.is_number()) fail(field, "a number", value.dump());
  into = value.get<double>();
}

void read_value(const std::string& field, const json& value, std::string& into) {
  if (!value.is_string()) fail(field, "a string", value.dump());
  into = value.get<std::string>();
}

void read_value(const std::string& field, const json& value, std::vector<int64_t>& into) {
  if (!value.is_array()) fail(field, "a list of integers", value.dump());
  into.clear();
  for (const json& item : value) read_value(field, item, into.emplace_back());
}

template <typename Value>
void read_value(const std::string& field, const json& value, std::optional<Value>& into) {
  into.reset();
  if (!value.is_null()) read_value(field, value, into.emplace());
}

template <typename Value>
json write_value(const Value& value) {
  return value;
}

template <typename Value>
json write_value(const std::optional<Value>& value) {
  return value ? json(*value) : json(nullptr);
}

AttentionConfig attention_from_json(const json& object) {
  if (!object.is_object()) fail("attn", "null, an object or a list of objects", object.dump());
  AttentionConfig config;
  std::set<std::string> known;
  visit_attention(config, [&](const char* name, auto& field) {
    known.insert(name);
    if (object.contains(name)) read_value(std::string("attn.") + name, object[name], field);
  });
  for (const auto& [key, value] : object.items()) {
    if (!known.count(key)) throw std::invalid_argument("unknown configuration key attn." + key);
  }
  for (const char* required : {"layers", "num_heads"}) {
    if (!object.contains(required)) fail(std::string("attn.") + required, "given", "nothing");
  }
  return config;
}

void check_attention(const AttentionConfig& attn, const GatedDeltaNetConfig& config,
                     std::set<int64_t>& taken) {
  for (const int64_t layer : attn.layers) {
    if (layer < 0 || layer >= config.num_hidden_layers) {
      fail("attn.layers", "from 0 to num_hidden_layers - 1", std::to_string(layer));
    }
    if (!taken.insert(layer).second) {
      fail("attn.layers", "different from each other", std::to_string(layer) + " twice");
    }
  }
  if (attn.num_heads <= 0 || config.hidden_size % attn.num_heads != 0 ||
      config.hidden_size / attn.num_heads % 2 != 0) {
    fail("attn.num_heads", "a divisor of hidden_size that leaves an even head size",
         std::to_string(attn.num_heads));
  }
  const int64_t kv_heads = attn.num_kv_heads.value_or(attn.num_heads);
  if (kv_heads <= 0 || attn.num_heads % kv_heads != 0) {
    fail("attn.num_kv_heads", "a divisor of attn.num_heads", std::to_string(kv_heads));
  }
  if (attn.window_size.value_or(1) <= 0) {
    fail("attn.window_size", "positive", std::to_string(*attn.window_size));
  }
  if (!(attn.rope_theta > 0) || !std::isfinite(attn.rope_theta)) {
    fail("attn.rope_theta", "positive and finite", std::to_string(attn.rope_theta));
  }
}

}  // namespace

int64_t GatedDeltaNetConfig::head_v_dim() const {
  return std::llround(static_cast<double>(head_dim) * expand_v);
}

int64_t GatedDeltaNetConfig::mlp_size() const {
  if (intermediate_size) return *intermediate_size;
  const auto wanted = static_cast<int64_t>(static_cast<double>(hidden_size) * hidden_ratio * 2 / 3);
  return (wanted + 255) / 256 * 256;
}

const AttentionConfig* GatedDeltaNetConfig::attention_of(int64_t layer) const {
  for (const AttentionConfig& config : attn) {
    if (std::count(config.layers.begin(), config.layers.end(), layer) != 0) return &config;
  }
  return nullptr;
}

void GatedDeltaNetConfig::validate() const {
  constexpr int64_t kMaxSize = int64_t{1} << 31;  // products of two sizes stay far from overflow
  const auto require_size = [](const char* field, int64_t value) {
    if (value <= 0 || value > kMaxSize) fail(field, "from 1 to 2^31", std::to_string(value));
  };
  const auto require_positive = [](const char* field, double value) {
    if (!(value > 0) || !std::isfinite(value)) {
      fail(field, "positive and finite", std::to_string(value));
    }
  };
  if (attn_mode != "chunk" && attn_mode != "fused_recurrent") {
    fail("attn_mode", "\"chunk\" or \"fused_recurrent\"", '"' + attn_mode + '"');
  }
  require_size("hidden_size", hidden_size);
  require_size("head_dim", head_dim);
  require_size("num_heads", num_heads);
  require_size("num_hidden_layers", num_hidden_layers);
  require_size("vocab_size", vocab_size);
  require_size("max_position_embeddings", max_position_embeddings);
  require_size("intermediate_size", intermediate_size.value_or(1));
  require_positive("expand_v", expand_v);
  require_positive("hidden_ratio", hidden_ratio);
  require_positive("norm_eps", norm_eps);
  if (static_cast<double>(hidden_size) * hidden_ratio > kMaxSize) {
    fail("hidden_ratio", "such that the MLP has at most 2^31 units", std::to_string(hidden_ratio));
  }
  if (!(initializer_range >= 0) || !std::isfinite(initializer_range)) {
    fail("initializer_range", "finite and not negative", std::to_string(initializer_range));
  }
  if (value_heads() <= 0 || value_heads() % num_heads != 0) {
    fail("num_v_heads", "a multiple of num_heads", std::to_string(value_heads()));
  }
  const double V = static_cast<double>(head_dim) * expand_v;
  if (V < 1 || V > kMaxSize || std::abs(V - std::round(V)) > 1e-5 * V) {
    fail("expand_v", "such that head_dim * expand_v is a whole number", std::to_string(expand_v));
  }
  if (conv_size < 2 || conv_size > 8) fail("conv_size", "from 2 to 8", std::to_string(conv_size));
  if (hidden_act != "swish" && hidden_act != "silu") {
    fail("hidden_act", "\"swish\" or \"silu\"", '"' + hidden_act + '"');
  }
  const auto require_token = [&](const char* field, std::optional<int64_t> token) {
    if (token && (*token < 0 || *token >= vocab_size)) {
      fail(field, "from 0 to vocab_size - 1", std::to_string(*token));
    }
  };
  require_token("pad_token_id", pad_token_id);
  require_token("bos_token_id", bos_token_id);
  require_token("eos_token_id", eos_token_id);
  if (fuse_cross_entropy && fuse_linear_cross_entropy) {
    fail("fuse_linear_cross_entropy", "false when fuse_cross_entropy is true", "true");
  }
  std::set<int64_t> taken;
  for (const AttentionConfig& config : attn) check_attention(config, *this, taken);
}

GatedDeltaNetConfig config_from_json(const json& object) {
  if (!object.is_object()) fail("configuration", "a JSON object", object.type_name());
  GatedDeltaNetConfig config;
  std::set<std::string> known = {"attn"};
  visit_model(config, [&](const char* name, auto& field) {
    known.insert(name);
    // flash-linear-attention writes null for its default ratio.
    const bool default_ratio = std::string_view(name) == "hidden_ratio";
    if (!object.contains(name) || (default_ratio && object[name].is_null())) return;
    read_value(name, object[name], field);
  });
  if (const auto attn = object.find("attn"); attn != object.end() && !attn->is_null()) {
    if (attn->is_array()) {
      for (const json& kind : *attn) config.attn.push_back(attention_from_json(kind));
    } else {
      config.attn.push_back(attention_from_json(*attn));
    }
  }
  for (const auto& [key, value] : object.items()) {
    if (const auto only = kOnlyAt.find(key); only != kOnlyAt.end()) {
      if (value != only->second) fail(key, only->second.dump(), value.dump());
    } else if (!known.count(key) && !kPassedOver.count(key)) {
      throw std::invalid_argument("unknown configuration key " + key);
    }
  }
  config.validate();
  return config;
}

json config_to_json(const GatedDeltaNetConfig& config) {
  json object = {{"model_type", "gated_deltanet"}, {"architectures", {"GatedDeltaNetForCausalLM"}}};
  const auto write_to = [](json& into) {
    return [&into](const char* name, const auto& field) { into[name] = write_value(field); };
  };
  visit_model(config, write_to(object));
  json kinds = json::array();
  for (const AttentionConfig& kind : config.attn) {
    visit_attention(kind, write_to(kinds.emplace_back(json::object())));
  }
  object["attn"] = kinds.empty() ? json(nullptr) : kinds.size() == 1 ? kinds[0] : kinds;
  return object;
}

GatedDeltaNetConfig read_config(const std::filesystem::path& file) {
  const json object = read_json(file);
  try {
    return config_from_json(object);
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(file.string() + ": " + error.what());
  }
}

}  // namespace gdn
