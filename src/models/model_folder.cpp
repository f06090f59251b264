#include <fstream>
#include <set>
#include <sstream>
#include <stdexcept>

#include <nlohmann/json.hpp>

#include <gdn/models/atomic_file.h>
#include <gdn/models/model_folder.h>
#include <gdn/models/safetensors.h>

namespace gdn {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

void add_file(const fs::path& file, std::map<std::string, StoredTensor>& weights) {
  const SafetensorsFile stored(file);
  for (const std::string& name : stored.names()) {
    StoredTensor tensor{stored.tensor(name), file, stored.offset(name)};
    if (!weights.try_emplace(name, std::move(tensor)).second) {
      throw std::runtime_error(file.string() + ": holds tensor \"" + name +
                               "\", as another shard does");
    }
  }
}

}  // namespace

json read_json(const fs::path& file) {
  std::ifstream stream(file);
  if (!stream) throw std::runtime_error(file.string() + ": cannot be read");
  try {
    return json::parse(stream);
  } catch (const json::exception& error) {
    throw std::runtime_error(file.string() + ": not JSON: " + error.what());
  }
}

void write_json(const fs::path& file, const json& value) {
  AtomicFile target(file);
  target.write(value.dump(2) + "\n");
  target.commit();
}

std::string shape_text(at::IntArrayRef shape) {
  std::ostringstream text;
  text << shape;
  return text.str();
}

std::map<std::string, StoredTensor> read_weights(const fs::path& folder, fs::path& listed) {
  std::map<std::string, StoredTensor> weights;
  listed = folder / kWeightsFile;
  if (fs::exists(listed)) {
    add_file(listed, weights);
    return weights;
  }
  if (!fs::exists(folder / kIndexFile)) {
    throw std::runtime_error(folder.string() + ": holds neither " + kWeightsFile + " nor " +
                             kIndexFile);
  }
  listed = folder / kIndexFile;
  const json index = read_json(listed);
  if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object()) {
    throw std::runtime_error(listed.string() + ": has no object weight_map");
  }
  std::set<std::string> shards;
  for (const auto& [key, shard] : index["weight_map"].items()) {
    const bool plain = shard.is_string() &&
                       fs::path(shard.get<std::string>()).filename() == shard.get<std::string>();
    if (!plain) {
      throw std::runtime_error(listed.string() + ": weight_map must give \"" + key +
                               "\" a file of this folder, got " + shard.dump());
    }
    shards.insert(shard.get<std::string>());
  }
  for (const std::string& shard : shards) add_file(folder / shard, weights);
  for (const auto& [key, shard] : index["weight_map"].items()) {
    const auto found = weights.find(key);
    if (found == weights.end() || found->second.file.filename() != shard.get<std::string>()) {
      throw std::runtime_error((folder / shard.get<std::string>()).string() +
                               ": holds no tensor \"" + key + "\", as " + kIndexFile + " says");
    }
  }
  return weights;
}

}  // namespace gdn
