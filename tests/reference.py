"""The transformer again, in plain NumPy and float64, written from the papers' definitions: slow and easy to check.

It shares no code with the model package. If possible, it reads sizes from the shapes of the parameters, so that an
error in a size that the model derives (that of a head or the MLP) is not repeated here.
"""

import math

import numpy as np


def forward(params: dict, config, tokens: np.ndarray) -> np.ndarray:
    """Next-token logits, float64 [b, t, vocab_size], without the rows that pad the vocabulary."""
    return forward_and_attention(params, config, tokens)[0]


def forward_and_attention(params: dict, config, tokens: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Does `forward`, and also returns the attention weights of each layer and head, [b, t, s] each."""
    params = as_float64(params)
    tokens = np.asarray(tokens)
    x = params["embedding"][tokens] * (config.embedding_scale or 1.0)
    if config.position == "learned":
        for t in range(tokens.shape[1]):
            x[:, t] += params["position"][t]
    seen: list[np.ndarray] = []
    for i in range(config.num_layers):
        layer = at_layer(params["layers"], i)

        def norm(name, x, layer=layer):
            return _norm(layer[name], config, x) if name in layer else x

        local = config.window is not None and config.layer_pattern[i % len(config.layer_pattern)] == "local"
        before = x
        y = _attention(layer["attention"], config, norm("attention_norm", x), seen, local)
        x = x + norm("attention_post_norm", y)
        z = _mlp(layer["mlp"], config, norm("mlp_norm", before if config.parallel else x))
        x = x + norm("mlp_post_norm", z)
    x = _norm(params["norm"], config, x)
    head = params["embedding"].T if config.tie_embeddings else params["head"]["kernel"]
    return _capped(x @ head, config.logits_softcap)[..., : config.vocab_size], seen


def _capped(x: np.ndarray, cap: float | None) -> np.ndarray:
    return x if cap is None else cap * np.tanh(x / cap)


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    """Mean of -log softmax(logits)[target], in nats."""
    probability = softmax(logits)
    picked = np.take_along_axis(probability, np.asarray(targets)[..., None], axis=-1)
    return float(-np.log(picked).mean())


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rotate(x: np.ndarray, positions: np.ndarray, theta: float, scaling=None) -> np.ndarray:
    """RoPE of x [t, d]: rotates the pair (x_i, x_{i + d/2}), as a complex number, by position · theta^(-2i/d).

    Args:
      scaling: a RopeScaling, or None for no scaling.
    """
    out = np.empty_like(x, dtype=np.float64)
    d = x.shape[-1]
    for i in range(d // 2):
        frequency = _scaled_frequency(theta ** (-2 * i / d), i, d, theta, scaling)
        turned = (x[:, i] + 1j * x[:, i + d // 2]) * np.exp(1j * np.asarray(positions) * frequency)
        if scaling is not None and scaling.kind == "yarn":
            factor = scaling.attention_factor
            turned *= 0.1 * np.log(scaling.factor) + 1 if factor is None else factor
        out[:, i], out[:, i + d // 2] = turned.real, turned.imag
    return out


def _scaled_frequency(frequency: float, i: int, d: int, theta: float, scaling) -> float:
    """The scaled frequency, computed as in the reference code of Llama 3.1 and YaRN."""
    if scaling is None or scaling.kind == "none":
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    if scaling.kind == "llama3":
        wave = 2 * np.pi / frequency
        if wave < scaling.original_len / scaling.high_freq_factor:
            return frequency
        if wave > scaling.original_len / scaling.low_freq_factor:
            return frequency / scaling.factor
        smooth = scaling.original_len / wave - scaling.low_freq_factor
        smooth /= scaling.high_freq_factor - scaling.low_freq_factor
        return (1 - smooth) * frequency / scaling.factor + smooth * frequency
    assert scaling.kind == "yarn"
    low, high = (
        d * np.log(scaling.original_len / (turns * 2 * np.pi)) / (2 * np.log(theta))
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        low, high = np.floor(low), np.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    ramp = min(max((i - low) / (high - low), 0), 1)
    return frequency / scaling.factor * ramp + frequency * (1 - ramp)


def as_float64(tree):
    return {k: as_float64(v) for k, v in tree.items()} if isinstance(tree, dict) else np.array(tree, np.float64)


def at_layer(tree, i: int):
    return {k: at_layer(v, i) for k, v in tree.items()} if isinstance(tree, dict) else tree[i]


def _linear(layer: dict, x: np.ndarray) -> np.ndarray:
    return x @ layer["kernel"] + layer.get("bias", 0.0)


def _norm(layer: dict, config, x: np.ndarray) -> np.ndarray:
    if config.norm == "layernorm":
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config.norm_eps)
    else:
        y = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + config.norm_eps)
    return y * (layer["scale"] + (1 if config.norm_plus_one else 0)) + layer.get("bias", 0.0)


def _attention(layer: dict, config, x: np.ndarray, seen: list[np.ndarray], local: bool) -> np.ndarray:
    b, t, _ = x.shape
    q, k, v = (_linear(layer[name], x) for name in ("query", "key", "value"))
    if config.qk_norm == "projection":
        q, k = _norm(layer["query_norm"], config, q), _norm(layer["key_norm"], config, k)
    heads, kv_heads = config.num_heads, config.num_kv_heads or config.num_heads
    d = q.shape[-1] // heads
    assert k.shape[-1] == v.shape[-1] == kv_heads * d
    out = np.zeros((b, t, heads * d))
    for h in range(heads):
        group = h * kv_heads // heads  # the first heads / kv_heads query heads share key-value head 0, and so on
        of_q, of_kv = slice(h * d, (h + 1) * d), slice(group * d, (group + 1) * d)
        weights = np.zeros((b, t, t))
        for row in range(b):
            qh, kh = q[row, :, of_q], k[row, :, of_kv]
            if config.qk_norm == "head":
                qh, kh = _norm(layer["query_norm"], config, qh), _norm(layer["key_norm"], config, kh)
            if config.position == "rope":
                turned = int(d * config.rope_fraction)
                theta, scaling = config.rope_theta, config.rope_scaling
                if local and config.local_rope_theta:
                    theta, scaling = config.local_rope_theta, None
                qh, kh = (
                    np.concatenate([rotate(a[:, :turned], np.arange(t), theta, scaling), a[:, turned:]], axis=1)
                    for a in (qh, kh)
                )
            for i in range(t):
                first = max(0, i - config.window + 1) if local else 0
                scores = kh[first : i + 1] @ qh[i] * (config.attention_scale or 1 / np.sqrt(d))
                weights[row, i, first : i + 1] = softmax(_capped(scores, config.attention_softcap))
            out[row, :, of_q] = weights[row] @ v[row, :, of_kv]
        seen.append(weights)
    return _linear(layer["out"], out)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def gelu_new(x: np.ndarray) -> np.ndarray:
    """The tanh approximation, as in GPT-2."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


def mlp_hidden(kind: str, up: np.ndarray, gate: np.ndarray | None) -> np.ndarray:
    if kind == "swiglu":
        return gate * sigmoid(gate) * up
    if kind == "geglu":
        return gelu_new(gate) * up
    if kind == "geglu_exact":
        return gelu(gate) * up
    if kind == "gelu_exact":
        return gelu(up)
    if kind == "silu":
        return up * sigmoid(up)
    if kind == "glu":
        return sigmoid(gate) * up
    if kind == "gelu":
        return gelu_new(up)
    assert kind == "relu2"
    return np.where(up > 0, up, 0.0) ** 2


def _mlp(layer: dict, config, x: np.ndarray) -> np.ndarray:
    gate = _linear(layer["gate"], x) if "gate" in layer else None
    return _linear(layer["down"], mlp_hidden(config.mlp, _linear(layer["up"], x), gate))


def filtered_probabilities(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Probabilities of one distribution [vocab] after temperature, top-k and top-p; no two logits may be equal."""
    p = softmax(np.asarray(logits, np.float64) / temperature)
    order = list(np.argsort(-p))
    if top_k:
        order = order[:top_k]
    total = sum(p[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        if kept and mass >= top_p:
            break
        kept.append(i)
        mass += p[i] / total
    out = np.zeros_like(p)
    out[kept] = p[kept] / p[kept].sum()
    return out
