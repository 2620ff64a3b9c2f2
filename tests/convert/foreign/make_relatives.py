"""Writes the relatives of BEiT that stand in this folder, as make.py does the others:

python tests/convert/foreign/make_relatives.py beit3      # torchscale 0.3.0, fairscale 0.4.13, timm 1.0.31, and
                                                          # modeling_*.py of unilm@768a3c8 beit3 on PYTHONPATH
python tests/convert/foreign/make_relatives.py vit        # timm 1.0.31
python tests/convert/foreign/make_relatives.py originals  # timm 1.0.31, and on PYTHONPATH models_*.py, pos_embed.py
                                                          # of MAE@efb2a80 and, as ibot_vit.py,
                                                          # models/vision_transformer.py of iBOT@da316d8
"""

import argparse
import functools
import importlib
import os
import sys
import types

import numpy as np
from make import HERE, IMAGES, compute, folder, randomise


def beit3():
    """BEiT-3's classifier and retrieval of unilm, both halves and all heads, and the same vision towers of timm."""
    import timm
    import torch

    utilities = types.ModuleType("utils")  # asks for libraries of a training run, and gives the loss of retrieval
    utilities.get_rank, utilities.get_world_size, utilities.ClipLoss = (lambda: 0), (lambda: 1), lambda **_: None
    sys.modules["utils"] = utilities
    import modeling_finetune as original
    from torchscale.architecture.config import EncoderConfig

    out = folder("beit3")

    def settings(**options):
        size = {"img_size": 16, "patch_size": 4, "vocab_size": 8, "encoder_embed_dim": 16, "encoder_layers": 1}
        size |= {"encoder_attention_heads": 2, "encoder_ffn_embed_dim": 32, "max_source_positions": 8}
        return EncoderConfig(multiway=True, no_output_layer=True, **size, **options)

    def save(name, model):
        # The older container, because the archive would be larger than its tensors.
        torch.save({"model": model.state_dict()}, out / f"{name}.pth", _use_new_zipfile_serialization=False)

    images = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy())
    model = randomise(original.BEiT3ForImageClassification(settings(normalize_output=False), num_classes=5))
    save("classifier", model)
    np.save(out / "classifier.npy", compute(model))
    model = randomise(original.BEiT3ForRetrieval(settings(normalize_output=True)), seed=1)
    save("retrieval", model)
    with torch.no_grad():
        np.save(out / "retrieval.npy", model(images, only_infer=True)[0].numpy())
    size = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
    model = randomise(timm.create_model("beit3_base_patch16_224", num_classes=5, **size))
    timm.models.save_for_hf(model, out / "timm", safe_serialization=True)
    np.save(out / "timm.npy", compute(model))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.nn.functional.cross_entropy(model(images), torch.arange(3)).backward()
    optimizer.step()
    np.save(out / "timm_after_a_step.npy", compute(model))


def vit():
    """timm's ViTs with one bias of queries, keys and values, and EVA-01, by `save_for_hf`."""
    import timm

    out = folder("vit")
    size = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "mlp_ratio": 2}
    names = {"deit": "deit_base_patch16_224", "eva_large": "eva_large_patch14_196", "deit3": "deit3_base_patch16_224",
             "dinov2": "vit_base_patch14_dinov2", "eva_giant": "eva_giant_patch14_224"}  # fmt: skip
    for name, architecture in names.items():
        model = randomise(timm.create_model(architecture, **size | {"num_classes": 0 if name == "dinov2" else 5}))
        timm.models.save_for_hf(model, out / name, safe_serialization=True)
        np.save(out / f"{name}.npy", compute(model))


def originals():
    """MAE's pre-training and classifier, iBOT's student and teacher, by their own code."""
    import timm.models.vision_transformer as library
    import torch

    class Block(library.Block):
        """timm's, as MAE calls it: with an argument that timm has no longer, and that says the default."""

        def __init__(self, *args, qk_scale=None, **options):
            super().__init__(*args, **options)

    out, norm = folder("originals"), functools.partial(torch.nn.LayerNorm, eps=1e-6)
    images = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy())

    np.float = float  # NumPy's name for it when MAE was written
    sys.modules |= {"util": types.ModuleType("util"), "util.pos_embed": importlib.import_module("pos_embed")}
    mae = importlib.import_module("models_mae")
    mae.Block = Block
    size = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "norm_layer": norm}
    model = mae.MaskedAutoencoderViT(**size, mlp_ratio=2, decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2)
    positions = model.pos_embed.detach().clone()
    randomise(model)
    model.pos_embed.data.copy_(positions)  # the fixed table
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(model="mae_vit_base_patch16", epochs=1)},
               out / "mae.pth", _use_new_zipfile_serialization=False)  # fmt: skip
    with torch.no_grad():
        kept, _, restore = model.forward_encoder(images, 0.0)  # in an order of its own
        tokens = torch.gather(kept[:, 1:], 1, restore[..., None].expand(-1, -1, 16))
        np.save(out / "mae.npy", torch.cat([kept[:, :1], tokens], dim=1).numpy())
    classifier = importlib.import_module("models_vit").VisionTransformer
    model = randomise(classifier(True, **size, mlp_ratio=2, qkv_bias=True, num_classes=5))
    torch.save({"model": model.state_dict()}, out / "mae_classifier.pth", _use_new_zipfile_serialization=False)
    with torch.no_grad():
        np.save(out / "mae_classifier.npy", model.head(model.forward_features(images)).numpy())

    utilities = types.ModuleType("utils")
    utilities.trunc_normal_ = torch.nn.init.trunc_normal_
    sys.modules["utils"] = utilities
    ibot = importlib.import_module("ibot_vit").VisionTransformer
    size = {"img_size": [16], "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "mlp_ratio": 2}
    student, teacher = (ibot(**size, qkv_bias=True, masked_im_modeling=masked) for masked in (True, False))
    randomise(student, 1), randomise(teacher, 2)
    content = {key: {f"{before}backbone.{name}": tensor for name, tensor in model.state_dict().items()}
               for key, before, model in (("student", "module.", student), ("teacher", "", teacher))}  # fmt: skip
    torch.save(content | {"args": argparse.Namespace(arch="vit_small", patch_size=4)}, out / "ibot.pth",
               _use_new_zipfile_serialization=False)  # fmt: skip
    np.save(out / "ibot.npy", compute(teacher))


KINDS = {each.__name__: each for each in (beit3, vit, originals)}

if __name__ == "__main__":
    os.chdir(HERE)
    for kind in sys.argv[1:]:
        KINDS[kind]()
