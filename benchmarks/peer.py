"""A plain GPT in PyTorch, timed beside the train step: what a careful reader of GPT-2's paper would write.

  PYTHON_WITH_TORCH benchmarks/peer.py '{"num_layers": 4, …}'

Imports nothing from this project, so any Python with torch runs it. For each number of steps on stdin it prints one
line of JSON and waits, so that rounds can alternate with those of another program. launch/bench.py starts it.

Pre-norm blocks with LayerNorm, GELU and learned positions, PyTorch's fused attention and AdamW, bfloat16 by autocast
with float32 parameters, gradient accumulation and clipping; random tokens made once, no device sync between steps.
"""

import contextlib
import dataclasses
import json
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Spec:
    num_layers: int
    embed_dim: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    vocab_size: int  # token ids are below this
    padded_vocab_size: int  # rows of the embedding and the head
    seq_len: int
    rows: int  # sequences of one forward pass
    accum: int  # forward passes a step
    bias: bool
    dropout: float
    tie_embeddings: bool
    bfloat16: bool
    clip_norm: float
    compile: bool | None  # torch.compile; None: on a GPU


class Block(nn.Module):
    def __init__(self, spec: Spec):
        super().__init__()
        self.spec = spec
        width = spec.num_heads * spec.head_dim
        self.attention_norm = nn.LayerNorm(spec.embed_dim, bias=spec.bias)
        self.qkv = nn.Linear(spec.embed_dim, 3 * width, bias=spec.bias)
        self.out = nn.Linear(width, spec.embed_dim, bias=spec.bias)
        self.mlp_norm = nn.LayerNorm(spec.embed_dim, bias=spec.bias)
        self.up = nn.Linear(spec.embed_dim, spec.mlp_dim, bias=spec.bias)
        self.down = nn.Linear(spec.mlp_dim, spec.embed_dim, bias=spec.bias)
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (
            y.view(b, t, self.spec.num_heads, self.spec.head_dim).transpose(1, 2)
            for y in self.qkv(self.attention_norm(x)).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.spec.dropout)
        x = x + self.dropout(self.out(y.transpose(1, 2).reshape(b, t, -1)))
        return x + self.dropout(self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh")))


class GPT(nn.Module):
    def __init__(self, spec: Spec):
        super().__init__()
        self.embedding = nn.Embedding(spec.padded_vocab_size, spec.embed_dim)
        self.position = nn.Embedding(spec.seq_len, spec.embed_dim)
        self.dropout = nn.Dropout(spec.dropout)
        self.layers = nn.ModuleList(Block(spec) for _ in range(spec.num_layers))
        self.norm = nn.LayerNorm(spec.embed_dim, bias=spec.bias)
        self.head = nn.Linear(spec.embed_dim, spec.padded_vocab_size, bias=False)
        if spec.tie_embeddings:
            self.head.weight = self.embedding.weight
        for name, p in self.named_parameters():
            if p.ndim >= 2:
                into_residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / (2 * spec.num_layers) ** 0.5 if into_residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of [b, t] targets after [b, t] tokens."""
        x = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


class Peer:
    """The model, its optimizer and one step's tokens on the first GPU, or else the CPU."""

    def __init__(self, spec: Spec):
        self.spec = spec
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        on_gpu = self.device == "cuda"
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high")  # TF32 for float32 on a GPU, as JAX does
        self.model = GPT(spec).to(self.device)
        self.parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=on_gpu)
        self.compiled = on_gpu if spec.compile is None else spec.compile
        self.loss = torch.compile(self.model) if self.compiled else self.model
        shape = (spec.accum, spec.rows, spec.seq_len + 1)
        self.batches = torch.randint(spec.vocab_size, shape, device=self.device)

    def step(self) -> Tensor:
        total = torch.zeros((), device=self.device)
        for tokens in self.batches:
            autocast = torch.autocast(self.device, torch.bfloat16) if self.spec.bfloat16 else contextlib.nullcontext()
            with autocast:
                loss = self.loss(tokens[:, :-1], tokens[:, 1:]) / self.spec.accum
            loss.backward()
            total += loss.detach()
        if self.spec.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.spec.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def run(self, steps: int) -> dict[str, float]:
        """Seconds per step, with one device sync at the end; the last loss."""
        start = time.perf_counter()
        for _ in range(steps):
            loss = self.step()
        last = loss.item()
        return {"seconds": (time.perf_counter() - start) / steps, "loss": last}

    def about(self) -> dict[str, object]:
        return {
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
            "compiled": self.compiled,
            "num_params": sum(p.numel() for p in self.parameters),
        }


def main() -> None:
    peer = Peer(Spec(**json.loads(sys.argv[1])))
    print(json.dumps(peer.about()), flush=True)
    for line in sys.stdin:
        print(json.dumps(peer.run(int(line))), flush=True)


if __name__ == "__main__":
    main()
