"""The transformer again, in plain NumPy and float64, written from the papers' definitions: slow and easy to check.

It shares no code with the model package. It reads sizes from the shapes of the parameters if it can, so that a derived
one (the size of a head or the MLP) that is wrong in the model is not equally wrong here.
"""

import numpy as np


def forward(params: dict, config, tokens: np.ndarray) -> np.ndarray:
    """Next-token logits, float64 [b, t, vocab_size], without the rows that pad the vocabulary."""
    return forward_and_attention(params, config, tokens)[0]


def forward_and_attention(params: dict, config, tokens: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """`forward`, and the attention weights of each layer and head, [b, t, s] each."""
    params = as_float64(params)
    tokens = np.asarray(tokens)
    x = params["embedding"][tokens]
    if config.position == "learned":
        for t in range(tokens.shape[1]):
            x[:, t] += params["position"][t]
    seen: list[np.ndarray] = []
    for i in range(config.num_layers):
        layer = at_layer(params["layers"], i)
        x = x + _attention(layer["attention"], config, _norm(layer["attention_norm"], config, x), seen)
        x = x + _mlp(layer["mlp"], config, _norm(layer["mlp_norm"], config, x))
    x = _norm(params["norm"], config, x)
    head = params["embedding"].T if config.tie_embeddings else params["head"]["kernel"]
    return (x @ head)[..., : config.vocab_size], seen


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    """Mean of -log softmax(logits)[target], in nats."""
    probability = softmax(logits)
    picked = np.take_along_axis(probability, np.asarray(targets)[..., None], axis=-1)
    return float(-np.log(picked).mean())


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rotate(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """RoPE of x [t, d]: the pair (x_i, x_{i + d/2}), as a complex number, turned by position · theta^(-2i/d)."""
    out = np.empty_like(x, dtype=np.float64)
    d = x.shape[-1]
    for i in range(d // 2):
        turned = (x[:, i] + 1j * x[:, i + d // 2]) * np.exp(1j * np.asarray(positions) * theta ** (-2 * i / d))
        out[:, i], out[:, i + d // 2] = turned.real, turned.imag
    return out


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
    return y * layer["scale"] + layer.get("bias", 0.0)


def _attention(layer: dict, config, x: np.ndarray, seen: list[np.ndarray]) -> np.ndarray:
    b, t, _ = x.shape
    q, k, v = (_linear(layer[name], x) for name in ("query", "key", "value"))
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
            if config.position == "rope":
                qh, kh = (rotate(a, np.arange(t), config.rope_theta) for a in (qh, kh))
            for i in range(t):
                weights[row, i, : i + 1] = softmax(kh[: i + 1] @ qh[i] / np.sqrt(d))
            out[row, :, of_q] = weights[row] @ v[row, :, of_kv]
        seen.append(weights)
    return _linear(layer["out"], out)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def gelu_new(x: np.ndarray) -> np.ndarray:
    """The tanh approximation, as in GPT-2."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def mlp_hidden(kind: str, up: np.ndarray, gate: np.ndarray | None) -> np.ndarray:
    if kind == "swiglu":
        return gate * sigmoid(gate) * up
    if kind == "geglu":
        return gelu_new(gate) * up
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
