"""What a family is made of: its table of tensors, and the keys of its config.json."""

import dataclasses
import math
import typing
from collections.abc import Callable, Iterable
from typing import Any

from model.config import ModelConfig, RopeScaling

Json = dict[str, Any]
# Fields that a run chooses, or that do not change what a model computes from its parameters.
OF_TRAINING = (
    "dropout",
    "dropout_end",
    "dropout_scale",
    "dtype",
    "scan_layers",
    "remat",
    "attention",
    "lora",
)
# Keys that say nothing about the weights.
OF_OTHERS = (
    "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache", "bos_token_id",
    "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id", "_name_or_path", "name_or_path",
    "pretraining_tp", "attention_dropout", "auto_map", "_attn_implementation_autoset", "attn_implementation",
    "gradient_checkpointing", "task_specific_params", "return_dict", "output_attentions", "output_hidden_states",
    "is_encoder_decoder", "chunk_size_feed_forward", "id2label", "label2id", "problem_type", "cache_implementation",
    "layer_norm_eps", "is_llama_config", "rope_interleaved", "transformers.js_config", "unsloth_fixed",
)  # fmt: skip


MOST_LAYERS, MOST = 10_000, 2**31


class Unsupported(Exception):
    """A config.json describes a model that we cannot compute, or a family cannot express a model."""


class Keys:
    """A config.json that remembers which of its keys were read."""

    def __init__(self, config: Json, defaults: Json):
        self._config = config
        self._defaults = defaults
        self._read: set[str] = set(OF_OTHERS)

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a key, or the family's default if the key is missing."""
        self._read.add(name)
        return self._config.get(name, self._defaults.get(name, default))

    def number(self, name: str) -> Any:
        """As `get`. Raises Unsupported unless the value is a number above 0, and below what any model has."""
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise Unsupported(f"{name} is {value!r}; it must be a number above 0")
        if not value < (MOST_LAYERS if name in ("num_hidden_layers", "n_layer") else MOST):
            raise Unsupported(f"{name} is {value!r}, which is more than any model has")
        return value

    def must_be(self, name: str, *allowed: Any) -> None:
        """Raises Unsupported if a key has another value than `allowed`: the family has a feature that we do not have.

        A missing key has the family's default, or else the first value of `allowed`.
        """
        value = self.get(name, allowed[0])
        if value not in allowed:
            raise Unsupported(
                f"{name} is {value!r}, which is not supported; it can be {' or '.join(map(repr, allowed))}"
            )

    def choice(self, name: str, choices: dict[Any, Any]) -> Any:
        """The entry of `choices` for a key's value. Raises Unsupported if there is none."""
        value = self.get(name)
        if not isinstance(value, str) or value not in choices:
            raise Unsupported(f"{name} is {value!r}; it can be {', '.join(map(repr, choices))}")
        return choices[value]

    def unused(self) -> list[str]:
        return sorted(name for name, value in self._config.items() if name not in self._read and value is not None)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a published file, and which of our parameters it holds.

    Attributes:
      theirs: the tensor's name without the family's prefix; {i} is the layer.
      ours: dotted paths of the parameters that the tensor holds. Several are concatenated along the last axis, in our
        orientation.
      transpose: whether the tensor is (out, in), as in torch.nn.Linear, and the parameter is (in, out).
    """

    theirs: str
    ours: tuple[str, ...]
    transpose: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of published models.

    Attributes:
      model_type, architecture: the names of the family in a config.json.
      to_fields: makes fields of ModelConfig from the keys of a config.json.
      to_keys: makes the keys of a config.json from a ModelConfig; it may lose what the family does not have.
      tensors: all tensors that the family can have. A tensor is not expected if the model has none of its parameters.
      defaults: the values of keys that a config.json may lack.
      prefix: begins the names of all tensors except the head's in published files; files of the bare model do not have
        it.
      ignored: how the names of tensors end that hold nothing trained.
    """

    model_type: str
    architecture: str
    to_fields: Callable[[Keys], dict[str, Any]]
    to_keys: Callable[[ModelConfig], Json]
    tensors: tuple[Tensor, ...]
    defaults: Json
    prefix: str = "model."
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)

    def to_model(self, config: Json) -> tuple[ModelConfig, list[str]]:
        """The model that a config.json describes, and the keys that were not used.

        Raises:
          Unsupported: the model has a feature that we cannot do.
        """
        keys = Keys(config, self.defaults)
        keys.must_be("quantization_config", None)
        try:
            fields = self.to_fields(keys)
            check_types(fields)
            model = ModelConfig(**fields)
        except ValueError as e:
            raise Unsupported(f"{self.model_type}: {e}") from None
        except (TypeError, KeyError, AttributeError, OverflowError) as e:  # null, a list, or no rope factor
            raise Unsupported(f"{self.model_type}: a key is missing or of the wrong type: {e!r}") from None
        return model, keys.unused()

    def to_json(self, model: ModelConfig) -> Json:
        """The config.json of `model`, except for dtype and token ids."""
        return {"architectures": [self.architecture], "model_type": self.model_type, **self.to_keys(model)}


def check_types(fields: dict[str, Any], section: type = ModelConfig) -> None:
    """Raises ValueError for a value without the type of its field in `section`: a config.json may hold anything."""
    for name, hint in typing.get_type_hints(section).items():
        kinds = typing.get_args(hint) or (hint,)
        if name not in fields or not {bool, int, float} & set(kinds):
            continue
        value = fields[name]
        known = type(value) in kinds or (type(value) is int and float in kinds)
        if not known or (type(value) is float and not math.isfinite(value)):
            wanted = "true or false" if bool in kinds else "a whole number" if int in kinds else "a number"
            raise ValueError(f"{name} would be {value!r}; it must be {wanted}")


def architecture_of(model: ModelConfig) -> dict[str, Any]:
    """The fields that decide what a model computes: derived values are filled in, fields without effect reset."""
    fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    for name in (*OF_TRAINING, "init_std", "init_depth_scale"):
        del fields[name]
    for name in ("qkv_bias", "out_bias", "mlp_bias"):
        fields[name] = model.has_bias(fields[name])
    fields["bias"] = model.bias if model.norm == "layernorm" else None  # the biases of norms; the others are above
    fields |= {"num_kv_heads": model.kv_heads, "head_dim": model.head_size, "mlp_dim": model.mlp_size}
    fields["attention_scale"] = model.attention_scale or model.head_size**-0.5
    fields["embedding_scale"] = model.embedding_scale or 1.0
    fields["layer_pattern"] = model.local_layers
    if not any(model.local_layers):
        fields["window"] = fields["local_rope_theta"] = None
    if model.position == "learned":
        for name in ("rope_theta", "rope_fraction", "rope_scaling", "local_rope_theta"):
            fields[name] = None
    else:
        scaling = model.rope_scaling
        kept = {"none": (), "linear": ("factor",)}.get(scaling.kind, tuple(vars(scaling)))
        fields["rope_scaling"] = {"kind": scaling.kind} | {name: getattr(scaling, name) for name in kept}
    return fields


# --- what the descendants of Llama share ---


def linear(theirs: str, ours: str) -> tuple[Tensor, Tensor]:
    """A torch.nn.Linear with its bias, if there is one."""
    return (
        Tensor(f"{theirs}.weight", (f"{ours}.kernel",), transpose=True),
        Tensor(f"{theirs}.bias", (f"{ours}.bias",)),
    )


def norm(theirs: str, ours: str) -> Tensor:
    return Tensor(f"{theirs}.weight", (f"{ours}.scale",))


LAYER = "layers.{i}."
NORMS_BEFORE = (
    norm(LAYER + "input_layernorm", "layers.attention_norm"),
    norm(LAYER + "post_attention_layernorm", "layers.mlp_norm"),
)
QK_NORMS = (
    norm(LAYER + "self_attn.q_norm", "layers.attention.query_norm"),
    norm(LAYER + "self_attn.k_norm", "layers.attention.key_norm"),
)
LLAMA_LIKE = (
    Tensor("embed_tokens.weight", ("embedding",)),
    *linear(LAYER + "self_attn.q_proj", "layers.attention.query"),
    *linear(LAYER + "self_attn.k_proj", "layers.attention.key"),
    *linear(LAYER + "self_attn.v_proj", "layers.attention.value"),
    *linear(LAYER + "self_attn.o_proj", "layers.attention.out"),
    *linear(LAYER + "mlp.gate_proj", "layers.mlp.gate"),
    *linear(LAYER + "mlp.up_proj", "layers.mlp.up"),
    *linear(LAYER + "mlp.down_proj", "layers.mlp.down"),
    norm("norm", "norm"),
    Tensor("lm_head.weight", ("head.kernel",), transpose=True),
)
GATED = {
    "silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu", "gelu": "geglu_exact",
}  # fmt: skip
HIDDEN_ACT = {"swiglu": "silu", "geglu": "gelu_pytorch_tanh", "geglu_exact": "gelu"}
# The defaults of the keys that Llama's descendants share. A missing num_key_value_heads or head_dim is derived.
LLAMA_DEFAULTS = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "tie_word_embeddings": False,
    "initializer_range": 0.02, "attention_bias": False, "max_position_embeddings": 2048,
}  # fmt: skip


def llama_fields(keys: Keys, act: str = "hidden_act") -> dict[str, Any]:
    """The fields of ModelConfig that a descendant of Llama names with Llama's keys."""
    return {
        "num_layers": keys.number("num_hidden_layers"), "embed_dim": keys.number("hidden_size"),
        "num_heads": keys.number("num_attention_heads"), "num_kv_heads": keys.get("num_key_value_heads") or 0,
        "head_dim": keys.get("head_dim") or 0, "mlp_dim": keys.number("intermediate_size"),
        "mlp": keys.choice(act, GATED), "norm_eps": keys.number("rms_norm_eps"),
        "tie_embeddings": keys.get("tie_word_embeddings"), "init_std": keys.number("initializer_range"),
        "vocab_size": keys.number("vocab_size"), "max_seq_len": keys.number("max_position_embeddings"),
        "init_depth_scale": False,
    }  # fmt: skip


def llama_keys(model: ModelConfig) -> Json:
    if model.mlp not in HIDDEN_ACT:
        raise Unsupported(f"mlp = {model.mlp}")
    return {
        "num_hidden_layers": model.num_layers, "hidden_size": model.embed_dim,
        "num_attention_heads": model.num_heads, "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size, "intermediate_size": model.mlp_size, "hidden_act": HIDDEN_ACT[model.mlp],
        "rms_norm_eps": model.norm_eps, "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std, "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_seq_len,
    }  # fmt: skip


def attention_bias_fields(keys: Keys) -> dict[str, Any]:
    """attention_bias is of all four projections of attention."""
    return {name: keys.get("attention_bias") for name in ("qkv_bias", "out_bias")}


def attention_bias_keys(model: ModelConfig) -> Json:
    return {"attention_bias": model.has_bias(model.qkv_bias)}


def rope_fields(keys: Keys) -> dict[str, Any]:
    """rope_theta and rope_scaling, from transformers 5's rope_parameters or from the keys of transformers 4."""
    new, old = keys.get("rope_parameters") or {}, keys.get("rope_scaling") or {}
    theta, fraction = keys.get("rope_theta"), keys.get("partial_rotary_factor", 1.0)
    return rope_of_both(new, old, theta, fraction, keys.number("max_position_embeddings"))


def rope_of_both(new: Json, old: Json, theta: float, fraction: float, max_seq_len: int) -> dict[str, Any]:
    """As rope_of, of rope parameters in the form of transformers 5 and in that of 4, of which one may be missing."""
    for given in (new, old):
        if not isinstance(given, dict):
            raise Unsupported(f"the rope parameters are {given!r}; they must be an object")
    rest = {name: value for name, value in new.items() if name not in ("rope_type", "type")}
    of_old = rope_of(rest | old if old else new, theta, fraction, max_seq_len)
    if new and rope_of(new, theta, fraction, max_seq_len) != of_old:
        raise Unsupported("rope_parameters and rope_scaling disagree; remove the one that is not meant")
    return of_old


def rope_of(scaling: Json, theta: float, fraction: float, max_seq_len: int) -> dict[str, Any]:
    """The fields for one dictionary of rope parameters; `theta` and `fraction` are those of the config's top level."""
    if (scaling.get("partial_rotary_factor") or fraction) != 1:
        raise Unsupported("partial_rotary_factor is not 1, which transformers ignores in these families")
    kinds = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if not isinstance(kind, str) or kind not in kinds:
        raise Unsupported(f"rope_type is {kind!r}; it can be {', '.join(kinds)}")
    fields: dict[str, Any] = {"rope_theta": _number("rope_theta", scaling.get("rope_theta") or theta)}
    if kind == "default":
        return fields
    given: dict[str, Any] = {"kind": kinds[kind], "factor": _number("factor", scaling.get("factor"))}
    if kind != "linear":
        given["original_len"] = scaling.get("original_max_position_embeddings") or max_seq_len
    names = {"llama3": ("low_freq_factor", "high_freq_factor"), "yarn": ("beta_fast", "beta_slow")}
    for name in names.get(kind, ()):
        if scaling.get(name):
            given[name] = _number(name, scaling[name])
    if kind == "yarn":
        given |= {"truncate": scaling.get("truncate", True), "attention_factor": _attention_factor(scaling)}
    check_types(given, RopeScaling)
    return fields | {"rope_scaling": RopeScaling(**given)}


def _attention_factor(scaling: Json) -> float | None:
    if scaling.get("attention_factor") is not None:
        return _number("attention_factor", scaling["attention_factor"])
    scales = [scaling.get(name) for name in ("mscale", "mscale_all_dim")]
    if all(scales):  # DeepSeek's
        one, all_dim = (1 + 0.1 * _number("mscale", scale) * math.log(scaling["factor"]) for scale in scales)
        return one / all_dim
    return None


def _number(name: str, value: Any) -> float:
    """A rope parameter of a config.json. Raises Unsupported if it is not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unsupported(f"{name} of the rope parameters is {value!r}; it must be a number")
    return float(value)


def rope_parameters(model: ModelConfig) -> Json:
    """The rope of global layers in the form of transformers 5."""
    scaling, kind = model.rope_scaling, model.rope_scaling.kind
    keys: Json = {"rope_type": "default" if kind == "none" else kind, "rope_theta": model.rope_theta}
    if kind != "none":
        keys["factor"] = scaling.factor
    if kind in ("llama3", "yarn"):
        keys["original_max_position_embeddings"] = scaling.original_len
    if kind == "llama3":
        keys |= {name: getattr(scaling, name) for name in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        keys |= {name: getattr(scaling, name) for name in ("beta_fast", "beta_slow", "truncate")}
        if scaling.attention_factor is not None:
            keys["attention_factor"] = scaling.attention_factor
    return keys


def rope_keys(model: ModelConfig) -> Json:
    """The rope in the forms of transformers 4 and 5, because vLLM, llama.cpp and others each read one of the two."""
    new = rope_parameters(model)
    old = {name: value for name, value in new.items() if name != "rope_theta"}
    keys: Json = {"rope_parameters": new, "rope_theta": model.rope_theta}
    keys["rope_scaling"] = None if old == {"rope_type": "default"} else old
    return keys


LOCAL, GLOBAL = "sliding_attention", "full_attention"


def window_fields(keys: Keys, local: Iterable[bool]) -> dict[str, Any]:
    """The window and the local layers: those that layer_types names, or `local` if the key is missing."""
    window, types = keys.get("sliding_window"), keys.get("layer_types")
    layers = list(local) if types is None else [kind == LOCAL for kind in types]
    if types is not None and len(types) != keys.number("num_hidden_layers"):
        raise Unsupported(f"layer_types names {len(types)} of the {keys.number('num_hidden_layers')} layers")
    if types is not None and (strange := set(types) - {LOCAL, GLOBAL}):
        raise Unsupported(f"layer_types has {strange.pop()!r}; it can have {LOCAL} and {GLOBAL}")
    if window is None or not any(layers):
        return {}
    return {"window": window, "layer_pattern": shortest_pattern(layers)}


def shortest_pattern(local: list[bool]) -> tuple[str, ...]:
    """The shortest ModelConfig.layer_pattern of these layers."""
    names = tuple("local" if one else "global" for one in local)
    periods = (n for n in range(1, len(names) + 1) if all(names[i] == names[i % n] for i in range(len(names))))
    return names[: next(periods)]


def window_keys(model: ModelConfig, without: int | None = None) -> Json:
    """The keys of windows.

    Args:
      without: the window to write for a model without local layers, if the family's class needs a number.
    """
    return {
        "sliding_window": without if model.window is None else model.window,
        "layer_types": [LOCAL if local else GLOBAL for local in model.local_layers],
    }
