"""BEiT-3's block against its formula in torch: outputs, and the gradient of every parameter."""

from typing import Any

import jax
import numpy as np
import torch
import torch.nn.functional as F
from numpy.testing import assert_allclose
from tolerances import MODEL

from beit_jax.config import BeitConfig
from beit_jax.models.build import build_model, param_shapes
from beit_jax.tree import flatten, unflatten

CONFIG = BeitConfig(
    image_size=(8, 8), patch_size=(4, 4), hidden_size=12, num_hidden_layers=2, num_attention_heads=3,
    intermediate_size=20, layer_norm_eps=1e-5, pooling="cls", use_absolute_position_embeddings=True,
    layer_scale_init_value=0.0, use_key_bias=True, use_sub_norm=True, embedding_size=5,
)  # fmt: skip
IMAGES = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32)
WANTED = np.random.default_rng(1).standard_normal((2, 5)).astype(np.float32)


def drawn() -> dict[str, np.ndarray]:
    random = np.random.default_rng(2)
    return {
        name: random.standard_normal(shape).astype(np.float32) * 0.5 for name, shape in param_shapes(CONFIG).items()
    }


def in_torch(p: dict[str, Any]) -> torch.Tensor:
    """The embedding of the images, [2, 5], by names of leaves."""

    def norm(x: torch.Tensor, name: str, layer: int | None = None) -> torch.Tensor:
        scale, bias = (
            p[f"{name}/{part}"] if layer is None else p[f"{name}/{part}"][layer] for part in ("scale", "bias")
        )
        return F.layer_norm(x, x.shape[-1:], scale, bias, 1e-5)

    patches = torch.from_numpy(IMAGES).reshape(2, 2, 4, 2, 4, 3).transpose(2, 3).reshape(2, 4, 48)
    x = patches @ p["embeddings/patch_kernel"].reshape(48, 12) + p["embeddings/patch_bias"]
    x = torch.cat([p["embeddings/cls_token"].expand(2, 1, 12), x], dim=1) + p["embeddings/position_embeddings"]
    for i in range(2):
        qkv = norm(x, "blocks/norm1", i) @ p["blocks/attention/qkv_kernel"][i].reshape(12, 36)
        qkv = (qkv + p["blocks/attention/qkv_bias"][i].reshape(36)).reshape(2, 5, 3, 3, 4)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 12)
        attended = norm(attended, "blocks/attention/norm", i)
        x = x + attended @ p["blocks/attention/out_kernel"][i].reshape(12, 12) + p["blocks/attention/out_bias"][i]
        hidden = F.gelu(norm(x, "blocks/norm2", i) @ p["blocks/mlp/fc1/kernel"][i] + p["blocks/mlp/fc1/bias"][i])
        x = x + norm(hidden, "blocks/mlp/norm", i) @ p["blocks/mlp/fc2/kernel"][i] + p["blocks/mlp/fc2/bias"][i]
    return F.normalize(norm(x, "norm")[:, 0] @ p["embedding_head/kernel"], dim=-1)


def test_outputs_and_gradients() -> None:
    params = drawn()

    def ours(params: Any) -> tuple[jax.Array, jax.Array]:
        found = build_model(CONFIG, params)(IMAGES).pooler_output
        return (found * WANTED).sum(), found

    (_, found), gradients = jax.jit(jax.value_and_grad(ours, has_aux=True))(unflatten(dict(params)))
    theirs = {name: torch.from_numpy(leaf).requires_grad_() for name, leaf in params.items()}
    expected = in_torch(theirs)
    (expected * torch.from_numpy(WANTED)).sum().backward()
    assert_allclose(found, expected.detach(), rtol=0.0, atol=MODEL)
    for name, gradient in flatten(gradients).items():
        wanted = theirs[name].grad.numpy()
        # Of the keys' bias the gradient is zero, and what is there is rounding.
        largest = max(np.abs(wanted).max(), np.abs(theirs["blocks/norm1/bias"].grad.numpy()).max())
        assert_allclose(gradient, wanted, rtol=0.0, atol=1e-5 * largest, err_msg=name)
    keys = flatten(gradients)["blocks/attention/qkv_bias"]
    assert np.abs(keys[:, 1]).max() < 1e-5 * np.abs(keys[:, 0]).max()
