"""Small models of many wirings for the tests of the walk and of calibration, each with a batch it takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertForSequenceClassification, T5Config, T5ForConditionalGeneration

Batch = dict[str, Tensor]


class Mlp(nn.Module):
    """A plain stack."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class ResidualBlock(nn.Module):
    """Two convolutions with batch norms, added in place to what came in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=2)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        x += self.norm2(self.conv2(torch.relu_(self.norm1(self.conv1(x)))))
        return torch.relu_(x)


class Cnn(nn.Module):
    """A stem, residual blocks that write in place, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(8) for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.stem(pixel_values)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Layer(nn.Module):
    """A residual block of two linears."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Towers(nn.Module):
    """Two towers that meet at the end, the second one listed first."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.ModuleList(Layer(6) for _ in range(2))
        self.vision = nn.ModuleList(Layer(6) for _ in range(2))
        self.join = nn.Linear(6, 6)

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        for layer in self.vision:
            pixels = layer(pixels)
        for layer in self.text:
            tokens = layer(tokens)
        return self.join(pixels) @ self.join(tokens).T


class Detached(nn.Module):
    """Blocks whose hidden states autograd cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Layer(6) for _ in range(3))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).detach()
        return self.head(x)


class Deep(nn.Module):
    """Many blocks, each reading the one before."""

    def __init__(self, depth: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Layer(6) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Shared(nn.Module):
    """One linear at two names, run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


class WithSpare(nn.Module):
    """A layer that no input reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.used(x)))


def tiny_t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    )


def tiny_albert() -> nn.Module:
    return AlbertForSequenceClassification(
        AlbertConfig(
            vocab_size=40,
            embedding_size=8,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=16,
        )
    )


def make(name: str, count: int = 2, size: int = 4) -> tuple[nn.Module, list[Batch]]:
    """The model called ``name`` with random weights, and ``count`` batches of ``size`` samples."""
    builder, sample = TOYS[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = builder().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 2)
        return model, [sample(size) for _ in range(count)]


def samples_of(batches: list[Batch]) -> list[dict[str, Tensor]]:
    """The rows of the batches, one dict each."""
    return [{k: v[i] for k, v in batch.items()} for batch in batches for i in range(len(next(iter(batch.values()))))]


def _tokens(size: int) -> Tensor:
    return torch.randint(2, 40, (size, 7))


TOYS: dict[str, tuple[Any, Any]] = {
    "mlp": (Mlp, lambda n: {"x": torch.randn(n, 12)}),
    "cnn": (Cnn, lambda n: {"pixel_values": torch.randn(n, 3, 8, 8)}),
    "towers": (Towers, lambda n: {"pixels": torch.randn(n, 6), "tokens": torch.randn(n, 6)}),
    "detached": (Detached, lambda n: {"x": torch.randn(n, 6)}),
    "deep": (Deep, lambda n: {"x": torch.randn(n, 6)}),
    "shared": (Shared, lambda n: {"x": torch.randn(n, 6)}),
    "spare": (WithSpare, lambda n: {"x": torch.randn(n, 6)}),
    "t5": (tiny_t5, lambda n: {"input_ids": _tokens(n), "decoder_input_ids": _tokens(n)}),
    "albert": (tiny_albert, lambda n: {"input_ids": _tokens(n)}),
}


class Returns(nn.Module):
    """Wraps its input in what a module may return."""

    def __init__(self, wrap) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(x)
