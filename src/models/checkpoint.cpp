#include <algorithm>
#include <cstdio>
#include <map>
#include <regex>
#include <set>
#include <stdexcept>

#include <ATen/ATen.h>
#include <nlohmann/json.hpp>

#include <gdn/models/checkpoint.h>
#include <gdn/models/model_folder.h>
#include <gdn/models/safetensors.h>

namespace gdn {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

constexpr const char* kHeadKey = "lm_head.weight";

bool is_shard_name(const std::string& name) {
  static const std::regex pattern(R"(model(-v\d+)?-\d{5}-of-\d{5}\.safetensors)");
  return std::regex_match(name, pattern);
}

/// "model-00001-of-00003.safetensors"; a version keeps the shards of an earlier save untouched.
std::string shard_name(int version, size_t index, size_t count) {
  const std::string infix = version == 0 ? "" : "-v" + std::to_string(version);
  char numbers[32];
  std::snprintf(numbers, sizeof numbers, "-%05zu-of-%05zu", index + 1, count);
  return "model" + infix + numbers + ".safetensors";
}

std::vector<NamedTensors> split_into_shards(const NamedTensors& tensors, int64_t max_bytes) {
  std::vector<NamedTensors> shards(1);
  int64_t bytes = 0;
  for (const auto& named : tensors) {
    const auto size = static_cast<int64_t>(named.second.nbytes());
    if (!shards.back().empty() && bytes + size > max_bytes) {
      shards.emplace_back();
      bytes = 0;
    }
    shards.back().push_back(named);
    bytes += size;
  }
  return shards;
}

/// Removes shards of earlier saves, of which no index speaks any more.
void remove_shards_except(const fs::path& folder, const std::set<std::string>& kept) {
  std::vector<fs::path> stale;
  for (const auto& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    if (is_shard_name(name) && !kept.count(name)) stale.push_back(entry.path());
  }
  for (const fs::path& file : stale) fs::remove(file);
}

/// The renaming of the index is the moment at which the new weights take the place of the old.
void save_shards(const fs::path& folder, const std::vector<NamedTensors>& shards) {
  int version = 0;
  const auto taken = [&] {
    for (size_t i = 0; i < shards.size(); ++i) {
      if (fs::exists(folder / shard_name(version, i, shards.size()))) return true;
    }
    return false;
  };
  while (taken()) ++version;

  json index = {{"metadata", {{"total_size", int64_t{0}}}}, {"weight_map", json::object()}};
  int64_t bytes = 0;
  std::set<std::string> names;
  for (size_t i = 0; i < shards.size(); ++i) {
    const std::string name = shard_name(version, i, shards.size());
    write_safetensors(folder / name, shards[i]);
    names.insert(name);
    for (const auto& [key, tensor] : shards[i]) {
      index["weight_map"][key] = name;
      bytes += static_cast<int64_t>(tensor.nbytes());
    }
  }
  index["metadata"]["total_size"] = bytes;
  write_json(folder / kIndexFile, index);
  fs::remove(folder / kWeightsFile);
  remove_shards_except(folder, names);
}

/// A_log and dt_bias: gates lose too much in 16 bits.
bool stays_wide(const std::string& key) {
  return key.ends_with(".A_log") || key.ends_with(".dt_bias");
}

}  // namespace

void save_pretrained(GatedDeltaNetForCausalLM& model, const fs::path& folder,
                     int64_t max_shard_bytes) {
  std::error_code error;
  fs::create_directories(folder, error);
  if (error) throw std::runtime_error(folder.string() + ": cannot be made: " + error.message());

  NamedTensors tensors;
  for (const auto& named : model->named_parameters()) {
    if (!named.value().is_floating_point()) {
      throw std::runtime_error(folder.string() + ": \"" + named.key() +
                               "\" is int8, which model folders do not hold");
    }
    tensors.emplace_back(named.key(), named.value());
  }
  json config = config_to_json(model->config());
  config["dtype"] = c10::getDtypeNames(tensors.front().second.scalar_type()).first;
  write_json(folder / kConfigFile, config);

  const std::vector<NamedTensors> shards = split_into_shards(tensors, max_shard_bytes);
  if (shards.size() > 1) return save_shards(folder, shards);
  write_safetensors(folder / kWeightsFile, tensors);
  fs::remove(folder / kIndexFile);
  remove_shards_except(folder, {});
}

GatedDeltaNetForCausalLM load_pretrained(const fs::path& folder, c10::Device device,
                                         std::optional<c10::ScalarType> dtype,
                                         std::optional<int64_t> int8_scale_size) {
  if (int8_scale_size && !device.is_cpu()) {
    throw std::invalid_argument("weights of int8 must be on a CPU, got " + device.str());
  }
  const GatedDeltaNetConfig config = read_config(folder / kConfigFile);
  fs::path listed;
  std::map<std::string, StoredTensor> weights = read_weights(folder, listed);
  if (config.tie_word_embeddings) weights.erase(kHeadKey);  // some writers repeat the embeddings

  GatedDeltaNetForCausalLM model(config, c10::kCPU, /*initialize=*/false);
  const auto round = int8_scale_size ? model->int8_rounding(*int8_scale_size) : nullptr;
  for (auto& named : model->named_parameters()) {
    const std::string& key = named.key();
    const auto found = weights.find(key);
    if (found == weights.end()) {
      throw std::runtime_error(listed.string() + ": tensor \"" + key + "\" is missing");
    }
    const at::Tensor& stored = found->second.tensor;
    const fs::path& file = found->second.file;
    if (stored.sizes() != named.value().sizes()) {
      throw std::runtime_error(file.string() + ": tensor \"" + key + "\" must have shape " +
                               shape_text(named.value().sizes()) + " for this config.json, got " +
                               shape_text(stored.sizes()));
    }
    if (!stored.is_floating_point()) {
      throw std::runtime_error(file.string() + ": tensor \"" + key +
                               "\" must be of floating-point numbers, got " +
                               c10::toString(stored.scalar_type()));
    }
    auto type = dtype.value_or(stored.scalar_type());
    if (stays_wide(key)) type = at::promote_types(type, at::kFloat);
    named.value().set_data(stored.to(device, type, /*non_blocking=*/false, /*copy=*/true));
    weights.erase(found);
    if (round) round(key);
  }
  if (!weights.empty()) {
    throw std::runtime_error(weights.begin()->second.file.string() + ": tensor \"" +
                             weights.begin()->first + "\" is not part of this model");
  }
  return model;
}

}  // namespace gdn
