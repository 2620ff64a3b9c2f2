"""Random models of the reference implementation, with every tensor away from its initial value."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

CLASSES = {
    ("beit", "features"): transformers.BeitModel,
    ("beit", "masked_image_modeling"): transformers.BeitForMaskedImageModeling,
    ("beit", "image_classification"): transformers.BeitForImageClassification,
    ("beit", "semantic_segmentation"): transformers.BeitForSemanticSegmentation,
    ("beit", "backbone"): transformers.BeitBackbone,
    ("data2vec-vision", "features"): transformers.Data2VecVisionModel,
    ("data2vec-vision", "image_classification"): transformers.Data2VecVisionForImageClassification,
    ("data2vec-vision", "semantic_segmentation"): transformers.Data2VecVisionForSemanticSegmentation,
}
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
    "vocab_size": 24,
    "drop_path_rate": 0.0,
}
SEGMENTATION = {key: value for key, value in TINY.items() if key not in ("num_hidden_layers", "vocab_size")} | {
    "num_hidden_layers": 4,
    "use_relative_position_bias": True,
    "num_labels": 7,
    "auxiliary_channels": 24,
    "out_indices": [1, 2, 3, 4],
}
BIAS = {
    "none": {},
    "shared": {"use_shared_relative_position_bias": True},
    "per_layer": {"use_relative_position_bias": True},
    "both": {"use_shared_relative_position_bias": True, "use_relative_position_bias": True},
}


def random_model(
    model_type: str = "beit", task: str = "image_classification", *, seed: int = 0, scale: float = 0.2, **config: Any
) -> torch.nn.Module:
    """A transformers model in evaluation mode whose every parameter is drawn: zeros and ones would hide mistakes.

    Matrices keep unit gain, so that activations and logits stay of magnitude 1 to 10 at any size.
    """
    kind = CLASSES[model_type, task]
    model = kind(kind.config_class(attn_implementation="eager", **config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            draw = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2 and "table" not in name and "token" not in name and "position" not in name:
                parameter.copy_(draw * parameter[0].numel() ** -0.5)
            else:
                parameter.add_(draw * scale)
    randomise_statistics(model, generator)
    return model


def randomise_statistics(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Draws the running statistics of every batch norm; variances stay positive."""
    for name, buffer in sorted(model.named_buffers()):
        if name.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)
        elif name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)


def save(model: torch.nn.Module, directory: Path, *, processor: bool = True) -> Path:
    """The model as a Hugging Face directory, tensors under the names transformers writes to files."""
    model.save_pretrained(directory)
    if processor:
        size = model.config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        half = [0.5] * model.config.num_channels
        transformers.BeitImageProcessorPil(
            size={"height": height, "width": width}, resample=2, image_mean=half, image_std=half
        ).save_pretrained(directory)
    return directory


def pixels(model: torch.nn.Module, *, batch: int = 2, size: tuple[int, int] | None = None, seed: int = 1) -> np.ndarray:
    """[b, h, w, c] float32 normal noise."""
    native = model.config.image_size
    height, width = size or ((native, native) if isinstance(native, int) else tuple(native))
    shape = (batch, height, width, model.config.num_channels)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def mask(model: torch.nn.Module, pixel_values: np.ndarray, *, seed: int = 2) -> np.ndarray:
    """[b, patches] bool, about 40 % True."""
    patch = model.config.patch_size
    count = (pixel_values.shape[1] // patch) * (pixel_values.shape[2] // patch)
    return np.random.default_rng(seed).random((len(pixel_values), count)) < 0.4


def in_file_names(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters or buffers of a model under the names transformers writes to files, which are those of our table."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, tensors))


def named_as_in_files(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters under the names transformers writes to files."""
    return in_file_names(model, dict(model.named_parameters()))


def run(model: torch.nn.Module, pixel_values: np.ndarray, bool_masked_pos: np.ndarray | None = None) -> Any:
    """The reference's outputs, hidden states and attentions included."""
    extra = {} if bool_masked_pos is None else {"bool_masked_pos": torch.from_numpy(bool_masked_pos)}
    with torch.no_grad():
        return model(to_torch(pixel_values), output_hidden_states=True, output_attentions=True, **extra)


def to_torch(pixel_values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixel_values).permute(0, 3, 1, 2).contiguous()
