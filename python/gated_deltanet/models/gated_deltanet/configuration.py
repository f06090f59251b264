"""Configuration of a Gated DeltaNet language model: the fields and defaults of `config.json`."""

import math
from typing import Any, ClassVar, NoReturn

from transformers import GenerationConfig, PreTrainedConfig

_ATTENTION_DEFAULTS = {
    "num_kv_heads": None,
    "qkv_bias": False,
    "qk_norm": False,
    "window_size": None,
    "rope_theta": 10000.0,
}
# Options of flash-linear-attention that we know only at the value that changes nothing.
_ONLY_AT = {"attnres_block_size": None, "norm_first": False, "use_l2warp": False}
# What transformers' base configuration takes besides its fields, or wrote in earlier versions.
_BASE_KEYS = frozenset(
    {
        "_attn_implementation_autoset",
        "_commit_hash",
        "_name_or_path",
        "add_cross_attention",
        "attn_implementation",
        "auto_map",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "experts_implementation",
        "finetuning_task",
        "is_decoder",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "per_layer_config",
        "prefix",
        "pruned_heads",
        "sep_token_id",
        "task_specific_params",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "use_bfloat16",
    }
)


def _fail(field: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"GatedDeltaNetConfig: {field} must be {expected}, got {got!r}")


class GatedDeltaNetConfig(PreTrainedConfig):
    """Sizes and options of a model; flash-linear-attention's names and defaults.

    Args:
        attn_mode: "chunk" or "fused_recurrent".
        hidden_size: of the residual stream.
        expand_v: V / K; head_dim * expand_v must be a whole number.
        use_gate: gate the mixer's output.
        use_short_conv: short convolutions over q, k and v.
        allow_neg_eigval: write strengths up to 2.
        conv_size: W, from 2 to 8.
        head_dim: K.
        num_heads: H, of queries and keys.
        num_v_heads: HV, a multiple of num_heads. Default: num_heads.
        max_position_embeddings: for information; nothing is limited by it.
        hidden_ratio: of the MLP's size, see intermediate_size. None is 4.
        intermediate_size: of the MLP.
            Default: 256 * ceil(hidden_size * hidden_ratio * 2/3 / 256).
        hidden_act: "swish", or its other name "silu".
        num_hidden_layers: blocks.
        norm_eps: of every norm.
        attn: hybrid models: {"layers": [indices of the layers that hold attention instead],
            "num_heads", "num_kv_heads" (num_heads), "qkv_bias" (False), "qk_norm" (False),
            "window_size" (None: all tokens), "rope_theta" (10000)}, or a list of these, one for
            each kind of attention.
        use_cache: whether generation keeps states.
        pad_token_id, bos_token_id, eos_token_id: None, or from 0 to vocab_size - 1.
        tie_word_embeddings: the output projection is the embedding.
        initializer_range: standard deviation of weights at first.
        fuse_norm: our norms; otherwise torch's.
        fuse_swiglu: our SwiGLU; otherwise torch's silu and a product.
        fuse_cross_entropy: our cross-entropy; otherwise torch's, in fp32.
        fuse_linear_cross_entropy: the loss without the logits (which are then None where labels
            are given); excludes fuse_cross_entropy.
        vocab_size: tokens.

    Raises:
        ValueError: naming the first field that cannot be, what is expected, and its value.
        TypeError: for an unknown field.
    """

    model_type: ClassVar[str] = "gated_deltanet"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    attn_mode: str = "chunk"
    hidden_size: int = 2048
    expand_v: float = 2.0
    use_gate: bool = True
    use_short_conv: bool = True
    allow_neg_eigval: bool = False
    conv_size: int = 4
    head_dim: int = 256
    num_heads: int = 6
    num_v_heads: int | None = None
    max_position_embeddings: int = 2048
    hidden_ratio: float | None = 4
    intermediate_size: int | None = None
    hidden_act: str = "swish"
    num_hidden_layers: int = 21
    norm_eps: float = 1e-6
    attn: dict[str, Any] | list[dict[str, Any]] | None = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    fuse_norm: bool = True
    fuse_swiglu: bool = True
    fuse_cross_entropy: bool = True
    fuse_linear_cross_entropy: bool = False
    vocab_size: int = 32000

    def __post_init__(self, **kwargs: Any) -> None:
        for key, only in _ONLY_AT.items():
            if (value := kwargs.pop(key, only)) != only:
                _fail(key, repr(only), value)
        if (model_type := kwargs.pop("model_type", self.model_type)) != self.model_type:
            _fail("model_type", f'"{self.model_type}"', model_type)
        generation = set(GenerationConfig._get_default_generation_params())
        if unknown := sorted(set(kwargs) - _BASE_KEYS - generation):
            raise TypeError(f"GatedDeltaNetConfig: unknown field {unknown[0]!r}")
        if self.hidden_ratio is None:  # as flash-linear-attention writes its default
            self.hidden_ratio = 4
        if isinstance(self.attn, dict):
            self.attn = _complete(self.attn)
        elif self.attn is not None:
            self.attn = [_complete(kind) for kind in self.attn]
        self._check()
        super().__post_init__(**kwargs)

    @property
    def value_heads(self) -> int:
        """HV."""
        return self.num_heads if self.num_v_heads is None else self.num_v_heads

    @property
    def mlp_size(self) -> int:
        """The MLP's intermediate size, whether given or derived."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        ratio = 4 if self.hidden_ratio is None else self.hidden_ratio
        return -(-int(self.hidden_size * ratio * 2 / 3) // 256) * 256

    def attention_of(self, layer: int) -> dict[str, Any] | None:
        """The attention of a layer, or None for Gated DeltaNet."""
        return next((kind for kind in self._attention_kinds() if layer in kind["layers"]), None)

    def _attention_kinds(self) -> list[dict[str, Any]]:
        if self.attn is None:
            return []
        return self.attn if isinstance(self.attn, list) else [self.attn]

    def _check(self) -> None:
        for field, known in (
            ("attn_mode", ("chunk", "fused_recurrent")),
            ("hidden_act", ("swish", "silu")),
        ):
            if getattr(self, field) not in known:
                _fail(field, " or ".join(f'"{name}"' for name in known), getattr(self, field))
        for field in (
            "hidden_size",
            "head_dim",
            "num_heads",
            "num_hidden_layers",
            "vocab_size",
            "max_position_embeddings",
            "intermediate_size",
        ):
            _check_size(field, getattr(self, field), optional=field == "intermediate_size")
        for field in ("expand_v", "hidden_ratio", "norm_eps"):
            _check_positive(field, getattr(self, field))
        if not 0 <= self.initializer_range < math.inf:
            _fail("initializer_range", "finite and not negative", self.initializer_range)
        if self.value_heads <= 0 or self.value_heads % self.num_heads != 0:
            _fail("num_v_heads", f"a multiple of num_heads = {self.num_heads}", self.num_v_heads)
        V = self.head_dim * self.expand_v
        if V < 1 or abs(V - round(V)) > 1e-5 * V:
            expected = f"such that head_dim * expand_v is a whole number, head_dim {self.head_dim}"
            _fail("expand_v", expected, self.expand_v)
        if not 2 <= self.conv_size <= 8:
            _fail("conv_size", "from 2 to 8", self.conv_size)
        for field in ("pad_token_id", "bos_token_id", "eos_token_id"):
            token = getattr(self, field)
            in_vocabulary = isinstance(token, int) and 0 <= token < self.vocab_size
            if token is not None and not in_vocabulary:
                _fail(field, f"None or from 0 to vocab_size - 1 = {self.vocab_size - 1}", token)
        if self.fuse_cross_entropy and self.fuse_linear_cross_entropy:
            _fail("fuse_linear_cross_entropy", "False when fuse_cross_entropy is True", True)
        self._check_attention()

    def _check_attention(self) -> None:
        taken: set[int] = set()
        for kind in self._attention_kinds():
            for layer in kind["layers"]:
                if not 0 <= layer < self.num_hidden_layers or layer in taken:
                    expected = f"different, from 0 to {self.num_hidden_layers - 1}"
                    _fail("attn.layers", expected, layer)
                taken.add(layer)
            heads = kind["num_heads"]
            if heads <= 0 or self.hidden_size % heads or self.hidden_size // heads % 2:
                _fail("attn.num_heads", "a divisor of hidden_size for an even head size", heads)
            kv_heads = heads if kind["num_kv_heads"] is None else kind["num_kv_heads"]
            if kv_heads <= 0 or heads % kv_heads:
                _fail("attn.num_kv_heads", "a divisor of attn.num_heads", kv_heads)
            _check_size("attn.window_size", kind["window_size"], optional=True)
            _check_positive("attn.rope_theta", kind["rope_theta"])


def _complete(kind: Any) -> dict[str, Any]:
    """One kind of attention with its defaults."""
    if not isinstance(kind, dict):
        _fail("attn", "None, a dict or a list of dicts", kind)
    if unknown := sorted(set(kind) - {"layers", "num_heads"} - set(_ATTENTION_DEFAULTS)):
        raise TypeError(f"GatedDeltaNetConfig: unknown field {'attn.' + unknown[0]!r}")
    for field in ("layers", "num_heads"):
        if field not in kind:
            _fail(f"attn.{field}", "given", None)
    return {**_ATTENTION_DEFAULTS, **kind}


def _check_size(field: str, value: Any, optional: bool = False) -> None:
    if optional and value is None:
        return
    if not isinstance(value, int) or not 0 < value <= 2**31:
        _fail(field, "an integer from 1 to 2^31", value)


def _check_positive(field: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        _fail(field, "positive and finite", value)
