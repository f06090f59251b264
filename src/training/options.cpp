#include <stdexcept>

#include <nlohmann/json.hpp>

#include <gdn/training/files.h>
#include <gdn/training/options.h>
#include <gdn/training/presets.h>
#include <gdn/training/tokenizer.h>

namespace gdn {
namespace {

using nlohmann::json;

template <typename Value>
void require(bool holds, const char* name, const char* expected, const Value& got) {
  if (holds) return;
  throw std::invalid_argument(std::string(name) + " must be " + expected + ", got " +
                              json(got).dump());
}

template <typename Value>
json to_json_value(const std::optional<Value>& value) {
  return value ? json(*value) : json(nullptr);
}
template <typename Value>
json to_json_value(const Value& value) {
  return json(value);
}

void from_json_value(const char* name, const json& value, std::string& field) {
  require(value.is_string(), name, "a string", value);
  field = value.get<std::string>();
}

void from_json_value(const char* name, const json& value, bool& field) {
  require(value.is_boolean(), name, "true or false", value);
  field = value.get<bool>();
}

void from_json_value(const char* name, const json& value, double& field) {
  require(value.is_number(), name, "a number", value);
  field = value.get<double>();
}

void from_json_value(const char* name, const json& value, int64_t& field) {
  require(value.is_number_integer(), name, "an integer", value);
  field = value.get<int64_t>();
}

void from_json_value(const char* name, const json& value, uint64_t& field) {
  require(value.is_number_unsigned(), name, "an integer that is not negative", value);
  field = value.get<uint64_t>();
}

void from_json_value(const char* name, const json& value, std::vector<std::string>& field) {
  require(value.is_array(), name, "a list of strings", value);
  field.resize(value.size());
  for (size_t i = 0; i < value.size(); ++i) from_json_value(name, value[i], field[i]);
}

template <typename Value>
void from_json_value(const char* name, const json& value, std::optional<Value>& field) {
  if (value.is_null()) {
    field.reset();
  } else {
    from_json_value(name, value, field.emplace());
  }
}

}  // namespace

void TrainOptions::validate() const {
  require(!data.empty(), "data", "at least one file or folder", data);
  require(!out.empty(), "out", "a folder", out);
  require(preset.empty() || config.empty(), "preset", "absent when config is given", preset);
  require(steps >= 1, "steps", "at least 1", steps);
  require(batch_size >= 1, "batch_size", "at least 1", batch_size);
  require(seq_len >= 2, "seq_len", "at least 2", seq_len);
  require(grad_accumulation >= 1, "grad_accumulation", "at least 1", grad_accumulation);
  require(lr > 0, "lr", "above 0", lr);
  require(warmup >= 0, "warmup", "at least 0", warmup);
  require(min_lr_ratio >= 0 && min_lr_ratio <= 1, "min_lr_ratio", "from 0 to 1", min_lr_ratio);
  require(weight_decay >= 0, "weight_decay", "at least 0", weight_decay);
  require(beta1 >= 0 && beta1 < 1, "beta1", "from 0 to below 1", beta1);
  require(beta2 >= 0 && beta2 < 1, "beta2", "from 0 to below 1", beta2);
  require(max_grad_norm >= 0, "max_grad_norm", "at least 0", max_grad_norm);
  require(log_every >= 1, "log_every", "at least 1", log_every);
  require(eval_every >= 0, "eval_every", "at least 0", eval_every);
  require(eval_tokens >= 0, "eval_tokens", "at least 0", eval_tokens);
  require(save_every >= 0, "save_every", "at least 0", save_every);
  require(keep_checkpoints >= 0, "keep_checkpoints", "at least 0", keep_checkpoints);
  require(dtype == "fp32" || dtype == "bf16" || dtype == "bf16-weights", "dtype",
          "fp32, bf16 or bf16-weights", dtype);
  require(threads >= 0, "threads", "at least 0", threads);
}

json train_options_to_json(const TrainOptions& options) {
  json result = json::object();
  for_each_option(options, [&](const char* name, const auto& field, const char*) {
    result[name] = to_json_value(field);
  });
  return result;
}

TrainOptions train_options_from_json(const json& object, const TrainOptions& defaults) {
  require(object.is_object(), "training options", "an object", object);
  TrainOptions options = defaults;
  json rest = object;
  for_each_option(options, [&](const char* name, auto& field, const char*) {
    if (!object.contains(name)) return;
    from_json_value(name, object[name], field);
    rest.erase(name);
  });
  if (!rest.empty()) {
    throw std::invalid_argument("unknown training option '" + rest.begin().key() + "'");
  }
  return options;
}

TrainOptions recorded_train_options(const std::filesystem::path& out) {
  const std::filesystem::path file = out / kTrainOptionsFile;
  if (!std::filesystem::exists(file)) {
    throw std::runtime_error(out.string() + ": holds no run to resume (no " + kTrainOptionsFile +
                             ")");
  }
  try {
    return train_options_from_json(json::parse(read_text(file)));
  } catch (const std::exception& error) {
    throw std::runtime_error(file.string() + ": " + error.what());
  }
}

GatedDeltaNetConfig model_config(const TrainOptions& options, const Tokenizer& tokenizer) {
  GatedDeltaNetConfig config;
  if (!options.config.empty()) {
    config = read_config(options.config);
    require(config.vocab_size >= tokenizer.vocab_size(), "vocab_size",
            ("at least the tokenizer's " + std::to_string(tokenizer.vocab_size())).c_str(),
            config.vocab_size);
  } else {
    config = preset_config(options.preset.empty() ? "tiny-byte" : options.preset);
    config.vocab_size = tokenizer.vocab_size();
    // From here on the logits weigh more than recomputing them block by block costs.
    constexpr int64_t kLargeVocabulary = 8192;
    config.fuse_linear_cross_entropy = config.vocab_size >= kLargeVocabulary;
    config.fuse_cross_entropy = !config.fuse_linear_cross_entropy;
  }
  config.bos_token_id = tokenizer.bos_id();
  config.eos_token_id = tokenizer.eos_id();
  config.hidden_size = options.hidden_size.value_or(config.hidden_size);
  config.num_hidden_layers = options.layers.value_or(config.num_hidden_layers);
  config.num_heads = options.heads.value_or(config.num_heads);
  config.head_dim = options.head_dim.value_or(config.head_dim);
  config.expand_v = options.expand_v.value_or(config.expand_v);
  config.validate();
  return config;
}

}  // namespace gdn
