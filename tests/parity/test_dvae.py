"""DALL-E's dVAE computes what the `dall_e` package computes; and what transformers' copy of its encoder computes."""

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from tolerances import HALF, MARGIN, MODEL

from beit_jax.convert import tokenizers
from beit_jax.errors import BeitJaxError
from beit_jax.hub import resolve
from beit_jax.tokenizers.build import build_tokenizer, tokenizer_shapes
from beit_jax.tokenizers.dvae import DvaeDecoder, DvaeEncoder, DvaeEncoderConfig, map_pixels, unmap_pixels
from beit_jax.tree import unflatten

SMALL = {"n_hid": 16, "vocab_size": 96, "n_blk_per_group": 1}


@pytest.fixture(scope="module")
def dall_e() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("dall_e", reason="the dall_e package is not installed: pip install DALL-E")


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter drawn. The last convolution of a path is as much larger as its path is then scaled down, or a
    mistake in it would drown."""
    generator = torch.Generator().manual_seed(seed)
    gains = {
        f"{name}.res_path.": 1 / part.post_gain for name, part in model.named_modules() if hasattr(part, "res_path")
    }
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            scale = parameter[0].numel() ** -0.5 if parameter.ndim == 4 else 0.2
            if "conv_4." in name:
                scale *= next(gain for prefix, gain in gains.items() if name.startswith(prefix))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


@torch.no_grad()
def centred(model: torch.nn.Module, inputs: torch.Tensor) -> torch.nn.Module:
    """An encoder whose logits are zero on average over `inputs`: without it one token would win everywhere."""
    [bias] = (parameter for parameter in model.blocks.output.conv.parameters() if parameter.ndim == 1)
    bias -= model(inputs).mean((0, 2, 3))
    return model


def converted(model: torch.nn.Module, directory: Path, **options: Any) -> DvaeEncoder | DvaeDecoder:
    path = directory / "model.pth"
    torch.save(model.state_dict(), path)
    checkpoint = tokenizers.load(resolve(path))
    path.unlink()
    return build_tokenizer(checkpoint.config, unflatten(checkpoint.params), **options)  # type: ignore[return-value]


def images(batch: int, height: int, width: int, channels: int) -> np.ndarray:
    """[b, h, w, c] in [0, 1]: squares of one colour each, so that tokens differ, under noise."""
    rng = np.random.default_rng(1)
    squares = rng.integers(0, 2, (batch, height // 8, width // 8, channels)).repeat(8, axis=1).repeat(8, axis=2)
    return (0.8 * squares + 0.2 * rng.random(squares.shape)).astype(np.float32)


def nchw(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()


def nhwc(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().permute(0, 2, 3, 1).numpy()


def assert_close(found: Any, expected: np.ndarray, tolerance: float = MODEL) -> None:
    scale = np.abs(expected).max()
    assert found.shape == expected.shape and scale > 0.3
    assert np.abs(np.asarray(found) - expected).max() <= tolerance * scale


def assert_tokens(found: Any, logits: np.ndarray) -> None:
    second, first = np.moveaxis(np.partition(logits, -2)[..., -2:], -1, 0)
    clear = first - second > MARGIN
    print(
        "TOKENS",
        clear.mean(),
        len(np.unique(logits.argmax(-1))),
        (np.asarray(found) != logits.argmax(-1)).sum(),
        clear.size,
    )
    assert found.dtype == jnp.int32 and found.shape == logits.shape[:-1]
    assert clear.mean() > 0.95 and len(np.unique(logits.argmax(-1))) > 3
    assert np.array_equal(np.asarray(found)[clear], logits.argmax(-1)[clear])


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        (SMALL, (2, 32, 32, 3)),
        (SMALL | {"n_blk_per_group": 3, "input_channels": 1}, (1, 16, 40, 1)),
        ({}, (1, 112, 112, 3)),
    ],
    ids=["small", "three blocks, grey, not square", "published size"],
)
def test_encoder(dall_e: Any, tmp_path: Path, options: dict[str, int], shape: tuple[int, ...]) -> None:
    pixel_values = images(*shape)
    inputs = dall_e.map_pixels(nchw(pixel_values))
    theirs = centred(randomised(dall_e.Encoder(**options)), inputs)
    ours = converted(theirs, tmp_path)
    with torch.no_grad():
        expected = nhwc(theirs(inputs))
    assert_close(jax.jit(lambda model, pixels: model(pixels))(ours, pixel_values), expected)
    assert_tokens(jax.jit(lambda model, pixels: model.tokens(pixels))(ours, pixel_values), expected)


@pytest.mark.parametrize(
    ("options", "grid"),
    [(SMALL, (4, 4)), (SMALL | {"n_blk_per_group": 2, "n_init": 24, "output_channels": 1}, (2, 5)), ({}, (4, 4))],
    ids=["small", "two blocks, grey, not square", "published size"],
)
def test_decoder(dall_e: Any, tmp_path: Path, options: dict[str, int], grid: tuple[int, int]) -> None:
    theirs = randomised(dall_e.Decoder(**options))
    ours = converted(theirs, tmp_path)
    vocab_size, channels = theirs.vocab_size, theirs.output_channels
    tokens = np.random.default_rng(2).integers(0, vocab_size, (2, *grid))
    one_hot = np.eye(vocab_size, dtype=np.float32)[tokens]
    soft = np.random.default_rng(3).random(one_hot.shape, dtype=np.float32)
    soft /= soft.sum(-1, keepdims=True)
    statistics = jax.jit(lambda model, codes: model(codes))
    for codes in (one_hot, soft):
        with torch.no_grad():
            expected = nhwc(theirs(nchw(codes)))
        assert_close(statistics(ours, codes), expected)
    with torch.no_grad():
        drawn = nhwc(dall_e.unmap_pixels(torch.sigmoid(theirs(nchw(one_hot))[:, :channels])))
    assert_close(jax.jit(lambda model, tokens: model.decode(tokens))(ours, tokens), drawn)


def test_pixels_are_mapped_as_there(dall_e: Any) -> None:
    pixel_values = np.linspace(-0.5, 1.5, 48, dtype=np.float32).reshape(1, 4, 4, 3)
    for ours, theirs in ((map_pixels, dall_e.map_pixels), (unmap_pixels, dall_e.unmap_pixels)):
        found, expected = ours(pixel_values), nhwc(theirs(nchw(pixel_values)))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["Encoder", "Decoder"])
def test_float16_is_where_the_reference_has_it_on_cuda(dall_e: Any, tmp_path: Path, name: str) -> None:
    """Every convolution by its kernel's shape, and whether it computes in float16."""
    theirs = randomised(getattr(dall_e, name)(**SMALL))
    ours = converted(theirs, tmp_path, dtype=jnp.float16)
    expected = Counter((part.use_float16, *part.w.shape) for part in theirs.modules() if hasattr(part, "use_float16"))
    inputs = np.zeros((1, 8, 8, 3 if name == "Encoder" else SMALL["vocab_size"]), np.float32)
    jaxpr = jax.make_jaxpr(lambda inputs: ours(inputs))(inputs)
    kernels = [equation.invars[1].aval for equation in jaxpr.eqns if equation.primitive.name == "conv_general_dilated"]
    # NHWC: [height, width, in, out]
    found = Counter((kernel.dtype == np.float16, *(kernel.shape[i] for i in (3, 2, 0, 1))) for kernel in kernels)
    assert found == expected
    assert jaxpr.out_avals[0].dtype == np.float32


def test_float16_rounds_as_the_reference(dall_e: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's CUDA branch, run on the CPU."""
    theirs = randomised(dall_e.Encoder(**SMALL))
    ours, pixel_values = converted(theirs, tmp_path, dtype=jnp.float16), images(2, 32, 32, 3)

    def on_cuda(conv: Any, x: torch.Tensor) -> torch.Tensor:
        dtype = torch.float16 if conv.use_float16 else torch.float32
        return torch.nn.functional.conv2d(x.to(dtype), conv.w.to(dtype), conv.b.to(dtype), padding=(conv.kw - 1) // 2)

    monkeypatch.setattr(type(theirs.blocks.input), "forward", on_cuda)
    with torch.no_grad():
        expected = nhwc(theirs(dall_e.map_pixels(nchw(pixel_values))))
    assert_close(jax.jit(lambda model, pixels: model(pixels))(ours, pixel_values), expected, HALF)


def test_flava_codebook(tmp_path: Path) -> None:
    """transformers' port of the encoder: another reference, and another place where its weights are published."""
    config = transformers.FlavaImageCodebookConfig(hidden_size=16, vocab_size=96, num_blocks_per_group=2)
    pixel_values = images(2, 32, 32, 3)
    inputs = nchw(np.array(map_pixels(pixel_values)))
    theirs = centred(randomised(transformers.FlavaImageCodebook(config)), inputs)
    theirs.save_pretrained(tmp_path)
    checkpoint = tokenizers.load(resolve(tmp_path))
    ours = build_tokenizer(checkpoint.config, unflatten(checkpoint.params))
    with torch.no_grad():
        expected = nhwc(theirs(inputs))
    assert_close(jax.jit(lambda model, pixels: model(pixels))(ours, pixel_values), expected)
    assert_tokens(jax.jit(lambda model, pixels: model.tokens(pixels))(ours, pixel_values), expected)
    exported = tokenizers.to_torch(checkpoint.config, checkpoint.params, tokenizers.FLAVA)
    assert exported.keys() == theirs.state_dict().keys()
    assert all(np.array_equal(exported[name], tensor.numpy()) for name, tensor in theirs.state_dict().items())


@pytest.mark.parametrize(
    ("shape", "needle"),
    [
        ((1, 32, 32), r"\[batch, height, width, 3\]"),
        ((1, 32, 32, 1), "3"),
        ((1, 32, 30, 3), "multiples of the stride 8"),
    ],
)
def test_images_of_another_shape(shape: tuple[int, ...], needle: str) -> None:
    config = DvaeEncoderConfig(n_hid=4, vocab_size=8, n_blk_per_group=1)
    zeros = {name: np.zeros(leaf, np.float32) for name, leaf in tokenizer_shapes(config).items()}
    encoder = build_tokenizer(config, unflatten(zeros))
    with pytest.raises(BeitJaxError, match=needle):
        encoder.check_shape(shape)
