"""A .gguf file of llama.cpp as if it were a folder of Hugging Face, dequantised slice by slice. No JAX.

Its tensors have other names than in Hugging Face's folders. For Llama the rows of queries and keys are in Meta's order:
the two elements that RoPE rotates together are adjacent in the file, but half a head apart in this program.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import json
import pathlib
import re
from typing import Any

import numpy as np

from data.errors import DataError
from model.families.gpt2 import CONV1D
from model.families.layout import Index
from trainer.errors import ConfigError

# From names of GGUF to names of Hugging Face, without the ending .weight or .bias; {} is the number of the layer.
LLAMA_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm", "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj", "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm", "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj", "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
}  # fmt: skip
GPT2_NAMES = {
    "token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
    "output": "lm_head", "blk.{}.attn_norm": "transformer.h.{}.ln_1", "blk.{}.attn_qkv": "transformer.h.{}.attn.c_attn",
    "blk.{}.attn_output": "transformer.h.{}.attn.c_proj", "blk.{}.ffn_norm": "transformer.h.{}.ln_2",
    "blk.{}.ffn_up": "transformer.h.{}.mlp.c_fc", "blk.{}.ffn_down": "transformer.h.{}.mlp.c_proj",
}  # fmt: skip
USE_FOLDER = "use the folder of Hugging Face"
NAMES = {"llama": LLAMA_NAMES, "gpt2": GPT2_NAMES}  # by general.architecture


class GgufFile:
    """The model of a .gguf file, with the attributes and methods of Folder.

    Raises:
      ConfigError: the gguf package is missing, or the architecture is not known.
      DataError: the file is damaged.
    """

    by_rows = False

    def __init__(self, path: pathlib.Path):
        try:
            import gguf
        except ImportError:
            raise ConfigError(f'{path} needs the gguf package: pip install "meshlm[gguf]"') from None
        self.path = path
        if not path.is_file():
            raise ConfigError(f"{path} does not exist, or is not a file")
        try:
            reader = gguf.GGUFReader(path)
            self._fields = {name: field.contents() for name, field in reader.fields.items()}
        except (OSError, ValueError, IndexError, KeyError) as e:
            raise DataError(f"{path} cannot be read as GGUF; copy it again ({e})") from None
        self._dequantize = gguf.quants.dequantize
        self.architecture = str(self._fields.get("general.architecture"))
        if self.architecture not in NAMES:
            raise ConfigError(
                f"{path} holds the architecture {self.architecture!r}; those known are {', '.join(NAMES)}"
            )
        self._tensors = {self._name(tensor.name): tensor for tensor in reader.tensors}
        try:
            self.config = {"llama": self._llama, "gpt2": self._gpt2}[self.architecture]()
        except (TypeError, ValueError, ArithmeticError) as e:
            raise DataError(f"{path} has numbers of another kind than its architecture has ({e})") from None
        self.shapes = {name: self._shape(name) for name in self._tensors}
        self.dtypes = {name: tensor.tensor_type.name for name, tensor in self._tensors.items()}

    def _name(self, theirs: str) -> str:
        """The name that a folder of Hugging Face has for this tensor."""
        stem, _, kind = theirs.rpartition(".")
        layer = re.match(r"blk\.(\d+)\.", stem)
        number = layer[1] if layer else ""
        pattern = stem.replace(f"blk.{number}.", "blk.{}.", 1) if layer else stem
        ours = NAMES[self.architecture].get(pattern)
        return f"{theirs} (of {self.path.name})" if ours is None else f"{ours.format(number)}.{kind}"

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = tuple(int(n) for n in reversed(self._tensors[name].shape))  # GGUF lists the fastest axis first
        return shape[::-1] if self._is_conv1d(name) else shape

    def _is_conv1d(self, name: str) -> bool:
        """Whether Hugging Face stores the transpose of this tensor: its GPT-2 has weights of shape (in, out)."""
        return self.architecture == "gpt2" and name.endswith(CONV1D)

    def _get(self, name: str) -> Any:
        name = f"{self.architecture}.{name}"
        if name not in self._fields:
            raise ConfigError(f"{self.path} lacks {name}")
        return self._fields[name]

    def _llama(self) -> dict[str, Any]:
        heads, width = int(self._get("attention.head_count")), int(self._get("embedding_length"))
        scaled = (
            self._fields.get("llama.rope.scaling.type", "none") != "none" or "llama.rope.scale_linear" in self._fields
        )
        if scaled or any("rope_freqs" in name for name in self._tensors):
            raise ConfigError(f"{self.path} scales rope, which GGUF does not describe in full; {USE_FOLDER}")
        if "llama.attention.sliding_window" in self._fields:
            raise ConfigError(f"{self.path} has a sliding window, which is not supported in GGUF; {USE_FOLDER}")
        size = int(self._fields.get("llama.attention.key_length", width // heads))
        if (rotated := int(self._fields.get("llama.rope.dimension_count", size))) != size:
            raise ConfigError(f"{self.path} rotates {rotated} of {size} dimensions of a head; {USE_FOLDER}")
        return {
            "model_type": "llama", "num_hidden_layers": int(self._get("block_count")), "hidden_size": width,
            "num_attention_heads": heads,
            "num_key_value_heads": int(self._fields.get("llama.attention.head_count_kv", heads)),
            "head_dim": size,
            "intermediate_size": int(self._get("feed_forward_length")),
            "rms_norm_eps": _rounded(self._get("attention.layer_norm_rms_epsilon")),
            "rope_theta": _rounded(self._fields.get("llama.rope.freq_base", 10_000.0)),
            "max_position_embeddings": int(self._get("context_length")),
            "vocab_size": self._rows("model.embed_tokens.weight"),
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in self._tensors, **self._ids(),
        }  # fmt: skip

    def _gpt2(self) -> dict[str, Any]:
        return {
            "model_type": "gpt2", "n_layer": int(self._get("block_count")),
            "n_embd": int(self._get("embedding_length")), "n_head": int(self._get("attention.head_count")),
            "n_inner": int(self._get("feed_forward_length")), "n_positions": int(self._get("context_length")),
            "layer_norm_epsilon": _rounded(self._get("attention.layer_norm_epsilon")),
            "vocab_size": self._rows("transformer.wte.weight"), "tie_word_embeddings": self._tied_gpt2(), **self._ids(),
        }  # fmt: skip

    def _ids(self) -> dict[str, int]:
        ids = {name: self._fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
        return {f"{name}_token_id": int(id) for name, id in ids.items() if id is not None}

    def _rows(self, name: str) -> int:
        if name not in self._tensors:
            raise ConfigError(f"{self.path} lacks {name}")
        return int(self._tensors[name].shape[-1])

    def _tied_gpt2(self) -> bool:
        """Whether the head is the embedding. (llama.cpp writes GPT-2's embedding a second time, as its head.)"""
        head, table = self._tensors.get("lm_head.weight"), self._tensors.get("transformer.wte.weight")
        if head is None or table is None:
            return True
        return head.tensor_type == table.tensor_type and np.array_equal(head.data, table.data)

    def read(self, name: str, index: Index) -> np.ndarray:
        """A slice of a tensor, dequantised to float32."""
        tensor = self._tensors[name]
        if self._is_conv1d(name):
            return self._rows_of(tensor, np.arange(*index[1].indices(self.shapes[name][1])))[:, index[0]].T
        rows = np.arange(*index[0].indices(self.shapes[name][0]))
        if self.architecture == "llama" and name.rpartition(".")[0].endswith((".q_proj", ".k_proj")):
            rows = self._in_pairs(rows)
        if len(self.shapes[name]) == 1:
            return self._dequantize(tensor.data, tensor.tensor_type)[rows]  # F32 or F16: vectors are not quantised
        return self._rows_of(tensor, rows)[:, index[1]]

    def _rows_of(self, tensor: Any, rows: np.ndarray) -> np.ndarray:
        try:
            return self._dequantize(np.ascontiguousarray(tensor.data[rows]), tensor.tensor_type)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise ConfigError(f"{self.path} has tensors of type {kind}, which gguf cannot dequantise") from None

    def _in_pairs(self, rows: np.ndarray) -> np.ndarray:
        """Where the file has these rows of queries or keys: our row h d + i d/2 + j is its row h d + 2 j + i."""
        size = self.config["head_dim"]
        head, within = rows // size, rows % size
        return head * size + 2 * (within % (size // 2)) + within // (size // 2)

    def companions(self) -> dict[str, bytes]:
        """The files that a folder of Hugging Face would have beside the weights."""
        found = {"config.json": json.dumps(self.config, indent=2).encode()}
        if (tokenizer := self._tokenizer_json()) is not None:
            found["tokenizer.json"] = tokenizer
        if template := self._fields.get("tokenizer.chat_template"):
            found["chat_template.jinja"] = str(template).encode()
        return found

    def _tokenizer_json(self) -> bytes | None:
        """The tokenizer.json of a byte-level BPE; None for other kinds, which GGUF does not store in full."""
        pre = str(self._fields.get("tokenizer.ggml.pre", ""))
        if self._fields.get("tokenizer.ggml.model") != "gpt2" or pre not in PRE_TOKENIZERS:
            return None
        tokens = [str(token) for token in self._fields["tokenizer.ggml.tokens"]]
        kinds = self._fields["tokenizer.ggml.token_type"]
        added = [
            {"id": id, "content": tokens[id], "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": kinds[id] == CONTROL}
            for id in range(len(tokens)) if kinds[id] in (CONTROL, USER_DEFINED)
        ]  # fmt: skip
        decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
        spec = {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": PRE_TOKENIZERS[pre], "post_processor": None, "decoder": decoder,
            "model": {
                "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                "vocab": {token: id for id, token in enumerate(tokens)},
                "merges": [str(merge) for merge in self._fields["tokenizer.ggml.merges"]],
            },
        }  # fmt: skip
        return json.dumps(spec, ensure_ascii=False).encode()


CONTROL, USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
# How text is split before merges, by the value of tokenizer.ggml.pre.
PRE_TOKENIZERS: dict[str, Any] = {
    "gpt-2": BYTES, "smollm": {"type": "Sequence", "pretokenizers": [DIGITS, BYTES]},
}  # fmt: skip


def _rounded(value: Any) -> float:
    """The shortest decimal that a number stored as float32 can stand for: 1e-5, not 9.999999747378752e-06."""
    return float(np.format_float_positional(np.float32(value), unique=True))
