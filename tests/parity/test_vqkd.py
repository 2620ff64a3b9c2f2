"""BEiT v2's tokenizer against torch code written here from its description; the names are those of its checkpoints."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tolerances import MARGIN, MODEL
from torch import nn
from torch.nn import functional as F

from beit_jax.convert import tokenizers
from beit_jax.errors import BeitJaxError
from beit_jax.hub import resolve
from beit_jax.tokenizers.build import build_tokenizer
from beit_jax.tokenizers.vqkd import VqkdConfig, VqkdTokenizer
from beit_jax.tree import unflatten


class TorchBlock(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp, self.heads = nn.Module(), nn.Module(), heads
        self.attn.qkv, self.attn.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.attn.q_bias, self.attn.v_bias = nn.Parameter(torch.empty(dim)), nn.Parameter(torch.empty(dim))
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = torch.cat([self.attn.q_bias, torch.zeros_like(self.attn.q_bias), self.attn.v_bias])
        qkv = self.attn.qkv(self.norm1(x)) + bias
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.attn.proj(attended)
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class TorchTransformer(nn.Module):
    """Patches after a LayerNorm of each, no layer scale, absolute positions."""

    def __init__(self, image: int, patch: int, channels: int, dim: int, depth: int, heads: int, hidden: int):
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (image // patch) ** 2, dim))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(channels, dim, patch, patch)
        self.blocks = nn.Sequential(*(TorchBlock(dim, heads, hidden) for _ in range(depth)))
        self.fc_norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.fc_norm(self.blocks(x)[:, 1:])


class TorchVqkd(nn.Module):
    def __init__(self, config: VqkdConfig):
        super().__init__()
        c = config
        grid = c.image_size[0] // c.patch_size[0]
        self.encoder = TorchTransformer(
            c.image_size[0], c.patch_size[0], 3, c.hidden_size, c.num_hidden_layers, c.num_attention_heads,
            c.intermediate_size,
        )  # fmt: skip
        self.decoder = TorchTransformer(
            grid, 1, c.codebook_dim, c.decoder_hidden_size, c.decoder_num_hidden_layers, c.decoder_num_attention_heads,
            c.decoder_intermediate_size,
        )  # fmt: skip
        self.quantize = nn.Module()
        self.quantize.register_buffer("cluster_size", torch.zeros(c.vocab_size))
        self.quantize.embedding = nn.Module()
        self.quantize.embedding.weight = nn.Parameter(torch.empty(c.vocab_size, c.codebook_dim))
        self.quantize.embedding.cluster_size = nn.Parameter(torch.empty(c.vocab_size))
        self.quantize.embedding.embed_avg = nn.Parameter(torch.empty(c.vocab_size, c.codebook_dim))
        self.quantize.embedding.register_buffer("initted", torch.ones(1))
        self.encode_task_layer = nn.Sequential(
            nn.Linear(c.hidden_size, c.hidden_size), nn.Tanh(), nn.Linear(c.hidden_size, c.codebook_dim)
        )
        wide = c.decoder_hidden_size
        self.decode_task_layer = nn.Sequential(nn.Linear(wide, wide), nn.Tanh(), nn.Linear(wide, c.target_size))
        self.grid = grid

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[b, patches, codebook_dim], from images in [0, 1]."""
        return self.encode_task_layer(self.encoder(pixel_values * 255 / 127.5 - 1.0))

    def distances(self, features: torch.Tensor) -> torch.Tensor:
        z, book = F.normalize(features, dim=-1), self.quantize.embedding.weight
        return z.pow(2).sum(-1, keepdim=True) + book.pow(2).sum(-1) - 2 * z @ book.T

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        codes = self.quantize.embedding.weight[tokens].transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return self.decode_task_layer(self.decoder(codes))


def random_vqkd(config: VqkdConfig) -> TorchVqkd:
    """Every tensor drawn; code vectors have length one, as training leaves them."""
    model, generator = TorchVqkd(config).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            matrix = tensor.ndim >= 2 and "token" not in name and "embed" not in name.split(".")[-1]
            scale = tensor[0].numel() ** -0.5 if matrix else 0.2
            draw = torch.randn(tensor.shape, generator=generator) * scale
            tensor.copy_(draw + 1.0 if name.endswith(("norm1.weight", "norm2.weight", "fc_norm.weight")) else draw)
        book = model.quantize.embedding.weight
        book.copy_(F.normalize(book, dim=-1))
    return model


TINY = VqkdConfig(
    image_size=(32, 32),
    patch_size=(8, 8),
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=96,
    decoder_hidden_size=64,
    decoder_num_attention_heads=1,
    decoder_intermediate_size=80,
    vocab_size=60,
    codebook_dim=6,
    target_size=20,
)


def converted(model: TorchVqkd, directory: Path) -> VqkdTokenizer:
    path = directory / "vqkd.pth"
    torch.save({"model": model.state_dict()}, path)
    checkpoint = tokenizers.load(resolve(path))
    path.unlink()
    return build_tokenizer(checkpoint.config, unflatten(checkpoint.params))  # type: ignore[return-value]


def assert_close(found: Any, expected: torch.Tensor) -> None:
    flat = np.asarray(found).reshape(expected.shape)
    scale = expected.abs().max()
    assert scale > 0.3
    assert np.abs(flat - expected.numpy()).max() <= MODEL * scale


@pytest.mark.parametrize("config", [TINY, VqkdConfig(decoder_num_hidden_layers=1)], ids=["tiny", "published size"])
@torch.no_grad()
def test_tokens_and_features(tmp_path: Path, config: VqkdConfig) -> None:
    theirs = random_vqkd(config)
    ours = converted(theirs, tmp_path)
    assert ours.config == config
    pixel_values = np.random.default_rng(1).random((2, *config.image_size, 3), dtype=np.float32)
    features = theirs.features(torch.from_numpy(pixel_values).permute(0, 3, 1, 2))
    assert_close(jax.jit(lambda model, pixels: model.encode(pixels))(ours, pixel_values), features)

    distances = theirs.distances(features)
    expected = distances.argmin(-1)
    least = distances.topk(2, largest=False).values
    clear = (least[..., 1] - least[..., 0] > MARGIN).numpy()
    tokens = jax.jit(lambda model, pixels: model.tokens(pixels))(ours, pixel_values)
    assert tokens.dtype == jnp.int32 and tokens.shape == (2, *config.encoder.grid)
    assert clear.mean() > 0.95 and len(expected.unique()) > 3
    assert np.array_equal(np.asarray(tokens).reshape(expected.shape)[clear], expected.numpy()[clear])

    decoded = jax.jit(lambda model, tokens: model.decode(tokens))(ours, expected.numpy().reshape(tokens.shape))
    assert_close(decoded, theirs.decode(expected))


def test_other_image_sizes_have_tokens_too(tmp_path: Path) -> None:
    ours = converted(random_vqkd(TINY), tmp_path)
    assert jax.jit(lambda model, pixels: model.tokens(pixels))(ours, np.zeros((1, 24, 48, 3), np.float32)).shape == (
        1, 3, 6,
    )  # fmt: skip
    with pytest.raises(BeitJaxError, match=r"\(24, 44\)"):
        ours.tokens(np.zeros((1, 24, 44, 3), np.float32))


@pytest.mark.parametrize("wrapper", ["model", "state_dict", None])
def test_round_trip_leaves_the_teacher_out(tmp_path: Path, wrapper: str | None) -> None:
    """Every tensor of the tokenizer comes back bit for bit, and what training kept beside it is not taken."""
    tensors = {name: tensor.clone() for name, tensor in random_vqkd(TINY).state_dict().items()}
    others = {f"{name}.weight": torch.full((3, 2), torch.nan) for name in ("teacher_model.blocks.0", "loss_fn")}
    others |= {"scaling_layer.shift": torch.zeros(1, 3, 1, 1), "scaling_layer.scale": torch.ones(1, 3, 1, 1)}
    torch.save({wrapper: tensors | others} if wrapper else tensors | others, tmp_path / "vqkd.pth")
    checkpoint = tokenizers.load(resolve(tmp_path / "vqkd.pth"))
    exported = tokenizers.to_torch(checkpoint.config, checkpoint.params)
    assert exported.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert exported[name].flags.c_contiguous and np.array_equal(exported[name], tensor.numpy()), name
    TorchVqkd(TINY).load_state_dict({name: torch.from_numpy(tensor) for name, tensor in exported.items()}, strict=True)
