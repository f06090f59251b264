#include <algorithm>
#include <cerrno>
#include <fcntl.h>
#include <map>
#include <regex>
#include <set>
#include <stdexcept>
#include <system_error>
#include <unistd.h>
#include <utility>

#include <ATen/ATen.h>
#include <nlohmann/json.hpp>

#include <gdn/models/convert.h>
#include <gdn/models/model_folder.h>
#include <gdn/models/safetensors.h>
#include <gdn/models/transformers_layers.h>

namespace gdn {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

/// A folder that appears under its name once it is complete.
class NewFolder {
 public:
  explicit NewFolder(const fs::path& target) : target_(fs::absolute(target).lexically_normal()) {
    if (!target_.has_filename()) target_ = target_.parent_path();  // "out/"
    if (fs::exists(fs::symlink_status(target_))) {
      throw std::runtime_error(target.string() + ": exists, and nothing is overwritten");
    }
    fs::path name = ".";
    name += target_.filename();
    name += '.';
    name += std::to_string(::getpid());
    temporary_ = target_.parent_path() / name;
    fs::remove_all(temporary_);  // left by a killed process that had our number
    fs::create_directories(temporary_);
  }
  ~NewFolder() {
    std::error_code ignored;
    if (!temporary_.empty()) fs::remove_all(temporary_, ignored);
  }
  NewFolder(const NewFolder&) = delete;
  NewFolder& operator=(const NewFolder&) = delete;

  const fs::path& path() const { return temporary_; }
  void commit() {
    const int descriptor = ::open(temporary_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (descriptor < 0) fail("cannot be synced");
    const int status = ::syncfs(descriptor);
    ::close(descriptor);
    if (status != 0) fail("cannot be synced");
    if (::rename(temporary_.c_str(), target_.c_str()) != 0) fail("cannot be renamed into place");
    temporary_.clear();
  }

 private:
  [[noreturn]] void fail(const char* what) const {
    const std::string reason = std::generic_category().message(errno);
    throw std::runtime_error(target_.string() + ": " + what + ": " + reason);
  }

  fs::path target_, temporary_;
};

/// A copy of a folder must not be made inside it.
void check_outside(const fs::path& out, const fs::path& base) {
  const fs::path relative = fs::relative(out, base);
  if (relative.empty() || *relative.begin() != "..") {
    throw std::runtime_error(out.string() + ": must not be inside " + base.string());
  }
}

/// Our GatedDeltaNet's arguments, as Python's constructor names them.
json layers_config(const TransformersLayers& model) {
  const GatedDeltaNetOptions& options = model.options;
  return {{"model_type", kLayersModelType},
          {"layers", model.layers},
          {"hidden_size", options.hidden_size},
          {"expand_v", options.expand_v},
          {"head_dim", options.head_dim},
          {"num_heads", options.num_heads},
          {"num_v_heads", *options.num_v_heads},
          {"use_gate", options.use_gate},
          {"use_short_conv", options.use_short_conv},
          {"allow_neg_eigval", options.allow_neg_eigval},
          {"conv_size", options.conv_size},
          {"conv_bias", options.conv_bias},
          {"norm_eps", options.norm_eps}};
}

std::string our_prefix(int64_t layer) { return "model.layers." + std::to_string(layer) + ".attn."; }

/// A transformers model folder, its Gated DeltaNet layers found and checked.
class TransformersFolder {
 public:
  explicit TransformersFolder(const fs::path& folder)
      : model_(read_transformers_config(folder / kConfigFile)) {
    weights_ = read_weights(folder, listed_);
    sort_keys();
    for (const int64_t layer : model_.layers) check_layer(layer);
    for (const auto& [layer, names] : names_) {
      if (!groups_.count(layer)) {
        fail(prefixes_[layer] + *names.begin(),
             "belongs to a layer that is not linear_attention in " + std::string(kConfigFile));
      }
    }
  }

  const TransformersLayers& model() const { return model_; }
  const std::vector<TensorGroup>& groups(int64_t layer) const { return groups_.at(layer); }
  const StoredTensor& stored(int64_t layer, const std::string& name) const {
    return weights_.at(prefixes_.at(layer) + name);
  }
  size_t others() const { return weights_.size() - converted_; }

 private:
  [[noreturn]] void fail(const std::string& tensor, const std::string& problem) const {
    const auto found = weights_.find(tensor);
    const fs::path& file = found == weights_.end() ? listed_ : found->second.file;
    throw std::runtime_error(file.string() + ": tensor \"" + tensor + "\" " + problem);
  }

  void sort_keys() {
    static const std::regex pattern(R"((.*layers\.(\d{1,9})\.linear_attn\.)(.+))");
    for (const auto& [key, stored] : weights_) {
      std::smatch match;
      if (!std::regex_match(key, match, pattern)) continue;
      const int64_t layer = std::stoll(match[2]);
      const auto [known, is_new] = prefixes_.try_emplace(layer, match[1]);
      if (!is_new && known->second != match[1]) {
        fail(key, "repeats layer " + std::to_string(layer) + ", which is also " + known->second);
      }
      names_[layer].insert(match[3]);
    }
  }

  /// Every expected tensor is there and fits, and no other.
  void check_layer(int64_t layer) {
    const auto prefix = prefixes_.find(layer);
    if (prefix == prefixes_.end()) {
      throw std::runtime_error(listed_.string() + ": holds no tensor of layer " +
                               std::to_string(layer) + " (layers." + std::to_string(layer) +
                               ".linear_attn.*)");
    }
    std::set<std::string> unknown = names_[layer];
    const auto& groups = groups_[layer] = tensor_groups(model_, unknown);
    for (const TensorGroup& group : groups) {
      check_group(prefix->second, group);
      for (const std::string& name : group.theirs) unknown.erase(name);
      converted_ += group.theirs.size();
    }
    if (!unknown.empty()) fail(prefix->second + *unknown.begin(), "is unknown");
  }

  void check_group(const std::string& prefix, const TensorGroup& group) const {
    std::vector<int64_t> expected = group.ours[0].shape;
    expected[0] = 0;
    for (const LayerTensor& part : group.ours) expected[0] += part.shape[0];
    int64_t rows = 0;
    for (const std::string& name : group.theirs) {
      const auto found = weights_.find(prefix + name);
      if (found == weights_.end()) fail(prefix + name, "is missing");
      const at::Tensor& tensor = found->second.tensor;
      if (!tensor.is_floating_point() || tensor.element_size() < 2) {
        fail(prefix + name,
             std::string("must be of 16, 32 or 64-bit floating-point numbers, got ") +
                 c10::toString(tensor.scalar_type()));
      }
      const bool same_type =
          tensor.scalar_type() == weights_.at(prefix + group.theirs[0]).tensor.scalar_type();
      if (!same_type) fail(prefix + name, "must have the dtype of " + group.theirs[0]);
      const bool last = &name == &group.theirs.back();
      auto wanted = expected;
      // Of several tensors only the sum of rows is given.
      const int64_t left = std::max<int64_t>(expected[0] - rows, 0);
      wanted[0] = last || tensor.dim() == 0 ? left : std::min(tensor.size(0), left);
      if (tensor.sizes() != at::IntArrayRef(wanted)) {
        fail(prefix + name, "must have shape " + shape_text(wanted) +
                                " for this config.json, got " + shape_text(tensor.sizes()));
      }
      rows += tensor.size(0);
    }
  }

  TransformersLayers model_;
  fs::path listed_;
  std::map<std::string, StoredTensor> weights_;
  std::map<int64_t, std::string> prefixes_;         // up to and with "linear_attn."
  std::map<int64_t, std::set<std::string>> names_;  // behind it
  std::map<int64_t, std::vector<TensorGroup>> groups_;
  size_t converted_ = 0;
};

std::vector<int64_t> rows_per_block(const TensorGroup& group) {
  std::vector<int64_t> rows;
  for (const LayerTensor& part : group.ours) rows.push_back(part.shape[0] / group.groups);
  return rows;
}

Conversion conversion_of(const TransformersFolder& folder) {
  Conversion result{folder.model().model_type, folder.model().layers, 0, folder.others()};
  for (const int64_t layer : result.layers) {
    for (const TensorGroup& group : folder.groups(layer)) result.tensors += group.ours.size();
  }
  return result;
}

/// The weights of a folder of ours, which must be just those that `base` needs.
std::map<std::string, StoredTensor> read_layers(const fs::path& folder,
                                                const TransformersFolder& base) {
  const json config = read_json(folder / kConfigFile), wanted = layers_config(base.model());
  const std::string file = (folder / kConfigFile).string();
  for (const auto& [key, value] : wanted.items()) {
    if (!config.is_object() || !config.contains(key) || config[key] != value) {
      const std::string got =
          config.is_object() && config.contains(key) ? config[key].dump() : "nothing";
      throw std::runtime_error(file + ": " + key + " must be " + value.dump() +
                               ", as in the base model, got " + got);
    }
  }
  for (const auto& [key, value] : config.items()) {
    if (!wanted.contains(key)) throw std::runtime_error(file + ": unknown key " + key);
  }

  fs::path listed;
  auto weights = read_weights(folder, listed);
  std::set<std::string> known;
  for (const int64_t layer : base.model().layers) {
    for (const TensorGroup& group : base.groups(layer)) {
      for (const LayerTensor& part : group.ours) {
        const std::string name = our_prefix(layer) + part.name;
        const auto found = weights.find(name);
        const std::string problem = listed.string() + ": tensor \"" + name + "\" ";
        if (found == weights.end()) throw std::runtime_error(problem + "is missing");
        const at::Tensor& tensor = found->second.tensor;
        if (!tensor.is_floating_point()) {
          throw std::runtime_error(problem + "must be of floating-point numbers, got " +
                                   c10::toString(tensor.scalar_type()));
        }
        if (tensor.sizes() != at::IntArrayRef(part.shape)) {
          throw std::runtime_error(problem + "must have shape " + shape_text(part.shape) +
                                   ", got " + shape_text(tensor.sizes()));
        }
        known.insert(name);
      }
    }
  }
  for (const auto& [name, stored] : weights) {
    if (!known.count(name)) {
      throw std::runtime_error(stored.file.string() + ": tensor \"" + name + "\" is unknown");
    }
  }
  return weights;
}

/// Overwrites a tensor's bytes in a file of the same layout.
void patch(const fs::path& file, uint64_t offset, const at::Tensor& tensor) {
  const auto fail = [&] {
    throw std::runtime_error(file.string() +
                             ": cannot be written: " + std::generic_category().message(errno));
  };
  const int descriptor = ::open(file.c_str(), O_WRONLY | O_CLOEXEC);
  if (descriptor < 0) fail();
  const char* data = static_cast<const char*>(tensor.const_data_ptr());
  size_t left = tensor.nbytes();
  while (left > 0) {
    const ssize_t written = ::pwrite(descriptor, data, left, static_cast<off_t>(offset));
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) break;
    data += written;
    offset += static_cast<uint64_t>(written);
    left -= static_cast<size_t>(written);
  }
  const int error = errno;
  ::close(descriptor);
  errno = error;
  if (left > 0) fail();
}

}  // namespace

bool holds_layers(const fs::path& folder) {
  const json config = read_json(folder / kConfigFile);
  return config.is_object() && config.contains("model_type") &&
         config["model_type"] == kLayersModelType;
}

Conversion convert_from_transformers(const fs::path& model, const fs::path& out) {
  const TransformersFolder folder(model);
  NewFolder target(out);
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  for (const int64_t layer : folder.model().layers) {
    for (const TensorGroup& group : folder.groups(layer)) {
      std::vector<at::Tensor> theirs;
      for (const std::string& name : group.theirs) {
        theirs.push_back(folder.stored(layer, name).tensor);
      }
      const at::Tensor blocks = at::cat(theirs).unflatten(0, {group.groups, -1});
      const auto parts = blocks.split_with_sizes(rows_per_block(group), 1);
      for (size_t i = 0; i < parts.size(); ++i) {
        tensors.emplace_back(our_prefix(layer) + group.ours[i].name, parts[i].flatten(0, 1));
      }
    }
  }
  write_safetensors(target.path() / kWeightsFile, tensors);
  write_json(target.path() / kConfigFile, layers_config(folder.model()));
  target.commit();
  return conversion_of(folder);
}

Conversion convert_to_transformers(const fs::path& layers, const fs::path& base,
                                   const fs::path& out) {
  const TransformersFolder folder(base);
  const auto weights = read_layers(layers, folder);
  check_outside(out, base);
  NewFolder target(out);
  fs::copy(base, target.path(), fs::copy_options::recursive);
  for (const int64_t layer : folder.model().layers) {
    for (const TensorGroup& group : folder.groups(layer)) {
      const std::vector<int64_t> rows = rows_per_block(group);
      std::vector<at::Tensor> blocks;
      for (const LayerTensor& part : group.ours) {
        const at::Tensor& tensor = weights.at(our_prefix(layer) + part.name).tensor;
        blocks.push_back(tensor.unflatten(0, {group.groups, -1})
                             .to(folder.stored(layer, group.theirs[0]).tensor.scalar_type()));
      }
      at::Tensor rest = at::cat(blocks, 1).flatten(0, 1);
      for (const std::string& name : group.theirs) {
        const StoredTensor& old = folder.stored(layer, name);
        const int64_t count = old.tensor.size(0);
        const fs::path file = target.path() / old.file.filename();
        fs::permissions(file, fs::perms::owner_write, fs::perm_options::add);
        patch(file, old.offset, rest.narrow(0, 0, count).contiguous());
        rest = rest.narrow(0, count, rest.size(0) - count);
      }
    }
  }
  target.commit();
  return conversion_of(folder);
}

}  // namespace gdn
