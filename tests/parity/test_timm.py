"""The original code's semantics, through timm: epsilon 1e-6, and the table resize on a geometric grid.

Run with ``pytest -m timm`` where timm is installed; it needs torchvision, which needs its own build of torch.
"""

from typing import Any

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose
from tolerances import MODEL

from beit_jax.config import BeitConfig
from beit_jax.heads import build_model, param_shapes
from beit_jax.tree import unflatten

timm = pytest.importorskip("timm", reason="timm is not installed; see pyproject.toml, extra timm")
torch = pytest.importorskip("torch")

pytestmark = [pytest.mark.timm, pytest.mark.filterwarnings("ignore")]  # the reference warns of its own code


def random_timm(**options: Any) -> Any:
    model = timm.models.beit.Beit(num_classes=7, **options).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            gain = parameter[0].numel() ** -0.5 if parameter.ndim >= 2 else 0.2
            parameter.add_(torch.randn(parameter.shape, generator=generator) * gain)
    return model


def convert(model: Any, config: BeitConfig) -> dict[str, np.ndarray]:
    """timm's tensors in our layout, written out by hand: independent of the tables under test."""
    t = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    heads, head_dim, hidden, depth = (
        config.num_attention_heads, config.head_dim, config.hidden_size, config.num_hidden_layers,
    )  # fmt: skip

    def stack(name: str) -> np.ndarray:
        return np.stack([t[f"blocks.{i}.{name}"] for i in range(depth)])

    flax = {
        "beit/embeddings/cls_token": t["cls_token"],
        "beit/embeddings/patch_kernel": t["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "beit/embeddings/patch_bias": t["patch_embed.proj.bias"],
        "beit/blocks/norm1/scale": stack("norm1.weight"),
        "beit/blocks/norm1/bias": stack("norm1.bias"),
        "beit/blocks/norm2/scale": stack("norm2.weight"),
        "beit/blocks/norm2/bias": stack("norm2.bias"),
        "beit/blocks/attention/qkv_kernel": stack("attn.qkv.weight")
        .reshape(depth, 3, heads, head_dim, hidden)
        .transpose(0, 4, 1, 2, 3),
        "beit/blocks/attention/q_bias": stack("attn.q_bias").reshape(depth, heads, head_dim),
        "beit/blocks/attention/v_bias": stack("attn.v_bias").reshape(depth, heads, head_dim),
        "beit/blocks/attention/out_kernel": stack("attn.proj.weight")
        .transpose(0, 2, 1)
        .reshape(depth, heads, head_dim, hidden),
        "beit/blocks/attention/out_bias": stack("attn.proj.bias"),
        "beit/blocks/gamma_1": stack("gamma_1"),
        "beit/blocks/gamma_2": stack("gamma_2"),
        "beit/blocks/mlp/fc1/kernel": stack("mlp.fc1.weight").transpose(0, 2, 1),
        "beit/blocks/mlp/fc1/bias": stack("mlp.fc1.bias"),
        "beit/blocks/mlp/fc2/kernel": stack("mlp.fc2.weight").transpose(0, 2, 1),
        "beit/blocks/mlp/fc2/bias": stack("mlp.fc2.bias"),
        "beit/pooler_norm/scale": t["fc_norm.weight"],
        "beit/pooler_norm/bias": t["fc_norm.bias"],
        "classifier/kernel": t["head.weight"].T,
        "classifier/bias": t["head.bias"],
    }
    if config.has_layer_bias:
        flax["beit/blocks/attention/bias_table"] = stack("attn.relative_position_bias_table")
    if config.has_shared_bias:
        flax["beit/shared_bias_table"] = t["rel_pos_bias.relative_position_bias_table"]
    assert {name: leaf.shape for name, leaf in flax.items()} == dict(param_shapes(config))
    return {name: np.array(leaf) for name, leaf in flax.items()}


SMALL = {"embed_dim": 32, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0, "patch_size": 8, "init_values": 0.1}


@pytest.mark.parametrize(
    ("image", "options"),
    [
        ((32, 32), SMALL | {"use_rel_pos_bias": True}),
        ((32, 32), SMALL | {"use_shared_rel_pos_bias": True, "use_abs_pos_emb": False}),
        ((16, 40), SMALL | {"use_rel_pos_bias": True}),
        ((224, 224), {"use_rel_pos_bias": True, "init_values": 0.1}),
    ],
    ids=["per layer", "shared", "not square", "base size"],
)
def test_forward(image: tuple[int, int], options: dict[str, Any]) -> None:
    theirs = random_timm(img_size=image, **{"use_abs_pos_emb": False} | options)
    config = BeitConfig(
        task="image_classification",
        image_size=image,
        patch_size=(options.get("patch_size", 16),) * 2,
        hidden_size=options.get("embed_dim", 768),
        num_hidden_layers=options.get("depth", 12),
        num_attention_heads=options.get("num_heads", 12),
        intermediate_size=int(options.get("embed_dim", 768) * options.get("mlp_ratio", 4.0)),
        position_bias="per_layer" if options.get("use_rel_pos_bias") else "shared",
        layer_norm_eps=1e-6,
        labels=tuple("abcdefg"),
    )
    ours = build_model(config, unflatten(convert(theirs, config)))
    pixel_values = np.random.default_rng(0).standard_normal((1, *image, 3)).astype(np.float32)
    found = jax.jit(lambda model, pixels: model(pixels))(ours, pixel_values)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(pixel_values).permute(0, 3, 1, 2))
    assert np.abs(expected).max() > 0.5
    assert_allclose(found.logits, expected, rtol=0.0, atol=MODEL)


@pytest.mark.parametrize(("source", "target"), [((14, 14), (24, 24)), ((14, 14), (16, 20)), ((10, 6), (14, 14))])
def test_geometric_linear_resize_is_timms(source: tuple[int, int], target: tuple[int, int]) -> None:
    from timm.layers.pos_embed_rel import resize_rel_pos_bias_table

    from beit_jax.position import num_relative_offsets, resize_bias_table

    table = np.random.default_rng(0).standard_normal((num_relative_offsets(source), 4)).astype(np.float32)
    expected = resize_rel_pos_bias_table(
        torch.from_numpy(table), new_window_size=target, new_bias_shape=(num_relative_offsets(target), 4),
        **({} if source[0] == source[1] else {"old_window_size": source}),
    )  # fmt: skip
    found = resize_bias_table(jax.numpy.asarray(table), source, target, "geometric_linear")
    assert_allclose(found, expected, rtol=0.0, atol=MODEL)
