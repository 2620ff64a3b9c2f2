"""Step two of parity: what was converted goes back to PyTorch, bit for bit, and transformers computes the same."""

import json
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from safetensors.numpy import load_file, save_file
from tolerances import EXPORT

from beit_jax.convert import load, to_torch
from beit_jax.hub import resolve

CASES = [
    ("beit", "image_classification", reference.BIAS["both"] | {"num_labels": 5}),
    ("beit", "image_classification", {"use_mean_pooling": False, "use_absolute_position_embeddings": True}),
    (
        "beit",
        "masked_image_modeling",
        reference.BIAS["shared"] | {"use_mask_token": True, "layer_scale_init_value": 0.0},
    ),
    ("beit", "features", reference.BIAS["per_layer"]),
    ("beit", "semantic_segmentation", reference.SEGMENTATION),
    (
        "beit",
        "semantic_segmentation",
        reference.SEGMENTATION
        | {"use_mean_pooling": False, "auxiliary_num_convs": 2, "auxiliary_concat_input": True, "pool_scales": [1, 4]},
    ),
    ("beit", "semantic_segmentation", reference.SEGMENTATION | {"use_auxiliary_head": False}),
    ("data2vec-vision", "semantic_segmentation", reference.SEGMENTATION),
    ("beit", "backbone", {"out_indices": [1, 2], "add_fpn": False, "use_mean_pooling": False}),
    (
        "beit",
        "backbone",
        reference.BIAS["per_layer"] | {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "add_fpn": True},
    ),
    ("data2vec-vision", "features", reference.BIAS["shared"] | {"use_mean_pooling": False}),
    ("data2vec-vision", "image_classification", reference.BIAS["per_layer"] | {"num_labels": 3}),
]


@pytest.mark.parametrize(("model_type", "task", "options"), CASES)
def test_round_trip(tmp_path: Path, model_type: str, task: str, options: dict[str, object]) -> None:
    tiny = {key: value for key, value in reference.TINY.items() if model_type == "beit" or key != "vocab_size"}
    theirs = reference.random_model(model_type, task, **tiny | options)
    source = reference.save(theirs, tmp_path / "source")
    checkpoint = load(resolve(source))
    tensors = to_torch(checkpoint.config, checkpoint.params)

    original = load_file(source / "model.safetensors")
    assert tensors.keys() == original.keys()
    for name, tensor in original.items():
        assert tensors[name].flags.c_contiguous
        assert np.array_equal(tensors[name], tensor), name

    exported = tmp_path / "exported"
    exported.mkdir()
    save_file(tensors, exported / "model.safetensors", metadata={"format": "pt"})
    (exported / "config.json").write_text(json.dumps(checkpoint.config.to_hf()))
    reloaded, report = type(theirs).from_pretrained(exported, attn_implementation="eager", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    pixel_values = reference.to_torch(reference.pixels(theirs))
    with torch.no_grad():
        expected, found = theirs(pixel_values)[0], reloaded.eval()(pixel_values)[0]
        if isinstance(expected, tuple):  # a backbone's maps
            expected, found = (torch.cat([part.flatten() for part in parts]) for parts in (expected, found))
    assert (expected - found).abs().max() <= EXPORT
