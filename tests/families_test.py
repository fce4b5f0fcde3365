"""Each family, with all its options, is compared with transformers' own class: import, logits and export."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from flax import traverse_util

from model import families
from model.families.layout import Layout
from model.generate import GREEDY, Generator
from model.transformer import parameter_shapes
from trainer.interchange import exporting
from trainer.interchange.folder import Folder

torch = pytest.importorskip("torch")
torch.set_num_threads(1)  # threads of PyTorch and of XLA would wait for each other
transformers = pytest.importorskip("transformers")

LENGTH = 512
# No two sizes that could be confused are equal; head_dim is not hidden_size / num_attention_heads.
LLAMA = {
    "vocab_size": 131, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": LENGTH, "rms_norm_eps": 1e-4,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 20000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 3000.0, "factor": 4.0}
WINDOWED = {"sliding_window": 40}
GEMMA = LLAMA | WINDOWED | {"query_pre_attn_scalar": 12, "num_hidden_layers": 4, "pad_token_id": 0}
MODELS = {
    "llama": ("Llama", LLAMA | {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}),
    "llama_tied_multi_query": (
        "Llama",
        LLAMA
        | {"num_key_value_heads": 1, "tie_word_embeddings": True, "rope_parameters": LINEAR, "hidden_act": "gelu"},
    ),
    "mistral": ("Mistral", LLAMA | WINDOWED | {"rope_parameters": YARN}),
    "mistral_full": (
        "Mistral",
        LLAMA | {"sliding_window": None, "rope_parameters": YARN | {"truncate": False}, "hidden_act": "swish"},
    ),
    "qwen2": (
        "Qwen2",
        {k: v for k, v in LLAMA.items() if k != "head_dim"}
        | WINDOWED
        | {"use_sliding_window": True, "max_window_layers": 1, "rope_parameters": YARN | {"attention_factor": 1.3}},
    ),
    "qwen3": (
        "Qwen3", LLAMA | WINDOWED | {"use_sliding_window": True, "max_window_layers": 2, "attention_bias": True},
    ),
    "gemma2": ("Gemma2", GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "gemma3": (
        "Gemma3",
        GEMMA
        | {
            "num_hidden_layers": 7, "attention_bias": True,
            "rope_parameters": {
                "full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            },
        },
    ),
    "olmo2": (
        "Olmo2",
        {k: v for k, v in LLAMA.items() if k != "head_dim"} | {"rope_parameters": LLAMA3, "attention_bias": True},
    ),
    "gpt2": (
        "GPT2", {"vocab_size": 131, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_inner": 80, "n_positions": LENGTH},
    ),
    "gpt2_untied": (
        "GPT2",
        {"vocab_size": 131, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": LENGTH,
         "tie_word_embeddings": False, "activation_function": "gelu"},
    ),
}  # fmt: skip
# Models of these families are exported as another family, which has the same form and comes first.
EXPRESSED_BY_ANOTHER = ("mistral", "qwen2")
every_model = pytest.mark.parametrize("name", MODELS)


@functools.cache
def theirs(name: str):
    """transformers' model in float32, with all parameters far from their initial values."""
    kind, fields = MODELS[name]
    config = getattr(transformers, f"{kind}Config" if kind != "Gemma3" else "Gemma3TextConfig")(**fields)
    config._attn_implementation = "eager"  # the other implementations leave soft caps out
    torch.manual_seed(len(name))
    model = getattr(transformers, f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config).float()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim == 1:
                around = 0 if path.endswith("bias") or kind.startswith("Gemma") else 1
                parameter.copy_(around + 0.3 * noise)
            else:
                parameter.copy_(noise * (0.3 if "emb" in path or "wte" in path else 1.2 / parameter.shape[-1] ** 0.5))
    return model.eval()


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """The folder of each model."""

    @functools.cache
    def of(name: str) -> pathlib.Path:
        folder = tmp_path_factory.mktemp(name)
        theirs(name).save_pretrained(folder)
        return folder

    return of


def load(folder: pathlib.Path):
    """(family, ModelConfig, layout, parameters by dotted path)."""
    opened = Folder(folder)
    family, model, unused = families.loaded(opened.config)
    assert unused == []
    layout = Layout(family, model, parameter_shapes(model))
    names = {name if name in layout.shapes else family.prefix + name: shape for name, shape in opened.shapes.items()}
    assert layout.problems(names) == []
    params = {
        path: layout.parameter(opened.read, path, (slice(None),) * len(shape))
        for path, shape in parameter_shapes(model).items()
    }
    return family, model, layout, params


def nested_of(params: dict) -> dict:
    return traverse_util.unflatten_dict({tuple(path.split(".")): jnp.asarray(p) for path, p in params.items()})


def logits_of(model, params, tokens) -> np.ndarray:
    nested = nested_of(params)
    with jax.default_matmul_precision("highest"):
        return np.asarray(tiny_models.jitted_forward(model)(nested, tokens))[..., : model.vocab_size]


@every_model
def test_logits_are_those_of_transformers(name, saved):
    """Over 512 tokens, in float32, the difference is within 1e-4 of the largest logit."""
    _, model, _, params = load(saved(name))
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (2, LENGTH)).astype(np.int32)
    with torch.no_grad():
        expected = theirs(name)(torch.as_tensor(tokens.astype(np.int64)), use_cache=False).logits.numpy()
    actual = logits_of(model, params, tokens)
    assert expected.std() > 0.3
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()


@every_model
def test_out_again_every_bit_is_the_same(name, saved, tmp_path):
    """transformers loads the export without missing or unexpected tensors, with equal values, and generates the same
    greedy text."""
    family, model, _, params = load(saved(name))
    nested = nested_of(params)
    target = tmp_path / "out"
    # The export has several files of at most 100 kB.
    tensors = exporting.of_arrays(lambda _: nested, model)
    exporting.export(target, tensors, model, None, dtype="float32", card="", kept=saved(name), shard_bytes=100_000)
    assert len(list(target.glob("*.safetensors"))) > 1
    kind = type(theirs(name)) if family.model_type in EXPRESSED_BY_ANOTHER else transformers.AutoModelForCausalLM
    again, info = kind.from_pretrained(target, output_loading_info=True, attn_implementation="eager")
    assert not any(info.values()), info
    original, written = theirs(name).state_dict(), again.state_dict()
    assert original.keys() == written.keys()
    for key, value in original.items():
        assert torch.equal(value, written[key]), key
    prompt = np.random.default_rng(1).integers(3, model.vocab_size, 24)
    generator = Generator(model, tiny_models.applier(model), context=128)
    with jax.default_matmul_precision("highest"):
        ours = generator(nested, prompt, rows=1, max_new_tokens=64, sampling=GREEDY)[0]
    with torch.no_grad():
        text = again.generate(
            torch.as_tensor(prompt)[None], max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0,
            eos_token_id=None,
        )  # fmt: skip
    assert ours.tolist() == text[0, 24:].tolist()


@every_model
def test_a_config_means_the_same_after_a_round_trip(name, saved):
    """A config is converted to our ModelConfig and back, read and written by transformers, and converted again."""
    family, model, *_ = load(saved(name))
    config = family.to_json(model)
    ours = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
    again = type(theirs(name).config)(**ours)
    assert families.differences(family.to_model(again.to_dict())[0], model) == []
    # Reads it with only the keys of transformers 4, and with only the keys of transformers 5.
    for dropped in (("rope_parameters",), ("rope_theta", "rope_scaling", "rope_local_base_freq")):
        part = {k: v for k, v in config.items() if k not in dropped}
        assert families.differences(family.to_model(part)[0], model) == []
    found, config = families.expressing(model)
    assert families.differences(found.to_model(config)[0], model) == []


def test_a_gemma_without_local_layers_runs_there(tmp_path):
    """Its class needs a number of tokens for the window that no layer has."""
    kinds = ["full_attention"] * 4
    config = transformers.Gemma3TextConfig(**GEMMA | {"layer_types": kinds})
    family, model, _ = families.loaded(config.to_dict())
    config = transformers.Gemma3TextConfig(
        **{k: v for k, v in family.to_json(model).items() if k not in ("model_type", "architectures")}
    )
    with torch.no_grad():
        assert transformers.Gemma3ForCausalLM(config)(torch.arange(60)[None]).logits.shape == (1, 60, 131)


def test_a_cap_that_gemma_3_does_not_use_is_refused():
    config = transformers.Gemma3TextConfig(**GEMMA | {"attn_logit_softcapping": 5.0}).to_dict()
    with pytest.raises(families.Unsupported, match=r"attn_logit_softcapping is 5\.0"):
        families.loaded(config)
