// Configuration of a Gated DeltaNet language model: the fields and defaults of `config.json`.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

namespace gdn {

/// Hybrid models: which layers are attention, and of what kind.
struct AttentionConfig {
  std::vector<int64_t> layers = {};  ///< layer indices that hold attention instead of GDN
  int64_t num_heads = 0;             ///< query heads; required
  std::optional<int64_t> num_kv_heads = std::nullopt;  ///< num_heads when absent
  bool qkv_bias = false;
  bool qk_norm = false;  ///< RMSNorm over each head of q and k
  std::optional<int64_t> window_size =
      std::nullopt;  ///< sliding window in tokens; full attention when absent
  double rope_theta = 10000.0;
};

/// Field names are the keys of config.json.
struct GatedDeltaNetConfig {
  std::string attn_mode = "chunk";  ///< "chunk" or "fused_recurrent"
  int64_t hidden_size = 2048;
  double expand_v = 2.0;  ///< V / K
  bool use_gate = true;
  bool use_short_conv = true;
  bool allow_neg_eigval = false;
  int64_t conv_size = 4;
  int64_t head_dim = 256;                             ///< K
  int64_t num_heads = 6;                              ///< H
  std::optional<int64_t> num_v_heads = std::nullopt;  ///< HV; num_heads when absent
  int64_t max_position_embeddings = 2048;
  double hidden_ratio = 4.0;
  std::optional<int64_t> intermediate_size;
  std::string hidden_act = "swish";
  int64_t num_hidden_layers = 21;
  double norm_eps = 1e-6;
  /// One for each kind of attention; in config.json null, an object, or a list of objects.
  std::vector<AttentionConfig> attn;
  bool use_cache = true;
  std::optional<int64_t> pad_token_id;
  std::optional<int64_t> bos_token_id = 1;
  std::optional<int64_t> eos_token_id = 2;
  bool tie_word_embeddings = false;
  double initializer_range = 0.02;
  bool fuse_norm = true;
  bool fuse_swiglu = true;
  bool fuse_cross_entropy = true;
  bool fuse_linear_cross_entropy = false;  ///< excludes fuse_cross_entropy, as in fla
  int64_t vocab_size = 32000;

  int64_t value_heads() const { return num_v_heads.value_or(num_heads); }  ///< HV
  int64_t head_v_dim() const;                                              ///< V
  /// 256 * ceil(hidden_size * hidden_ratio * 2/3 / 256) unless intermediate_size is set.
  int64_t mlp_size() const;
  /// The attention of a layer, or null for Gated DeltaNet.
  const AttentionConfig* attention_of(int64_t layer) const;

  /// Throws std::invalid_argument that names the first field that cannot be, what is expected, and
  /// its value.
  void validate() const;
};

/// Reads config.json's object and validates it. Fields of transformers' base configuration (such as
/// architectures, torch_dtype, transformers_version) and of flash-linear-attention's are known and
/// passed over where they do not change the model; any other unknown key is an error that names it.
GatedDeltaNetConfig config_from_json(const nlohmann::json& json);
nlohmann::json config_to_json(const GatedDeltaNetConfig& config);

GatedDeltaNetConfig read_config(const std::filesystem::path& file);

}  // namespace gdn
