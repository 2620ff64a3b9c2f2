"""Writes `hosts/`: tiny models of depth and of detection around a BEiT encoder, and the states that this computes.

Not a part of the tests. It needs timm 0.6.13 (MiDaS asks for 0.6.12, which Python 3.11 does not import), torch 2.13.0,
and on PYTHONPATH isl-org/MiDaS@4545977, isl-org/ZoeDepth@d87f17b and microsoft/unilm@768a3c8's dit/object_detection.

Beside each file are the last states of its encoder, as the code around it computes them: of images of the encoder's
size, [2, tokens, channels] float32, and of MiDaS' also of images twice as wide.
"""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import torch
from make import HERE, folder, randomise


def images(*size):
    """[2, 3, *size]; the tests draw the same."""
    drawn = np.random.default_rng(7).standard_normal((2, *size, 3)).astype(np.float32)
    return torch.from_numpy(drawn.transpose(0, 3, 1, 2).copy())


def states(model, block, *size):
    """What a block gives when the whole model is called."""
    kept = []
    handle = block.register_forward_hook(lambda module, inputs, output: kept.append(output))
    with torch.no_grad():
        model(images(*size))
    handle.remove()
    return kept[0].numpy()


def save(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)  # the archive would be larger than its tensors


def without_numbers(state, encoder):
    """A state dict in which all but the encoder's tensors are views of the same zeros: nobody reads these numbers."""
    others = [tensor for name, tensor in state.items() if not name.startswith(encoder)]
    zeros = {kind: torch.zeros(max(t.numel() for t in others if t.dtype == kind), dtype=kind)
             for kind in {t.dtype for t in others}}  # fmt: skip
    return {
        name: tensor if name.startswith(encoder) else zeros[tensor.dtype][: tensor.numel()].view(tensor.shape)
        for name, tensor in state.items()
    }


def depth(out):
    """DPT of MiDaS 3.1 with a BEiT that timm built for classes, and ZoeDepth on it."""
    import midas.blocks
    import midas.dpt_depth
    from midas.backbones.beit import _make_beit_backbone
    from timm.models.beit import Beit

    def encoder(*args, hooks=None, use_readout="ignore", **kwargs):
        model = Beit(img_size=32, patch_size=16, embed_dim=4, depth=2, num_heads=2, mlp_ratio=2, num_classes=7,
                     init_values=0.1, use_abs_pos_emb=False, use_rel_pos_bias=True)  # fmt: skip
        features = [4, 4, 4, 4]
        backbone = _make_beit_backbone(model, features, [32, 32], [0, 0, 1, 1], 4, use_readout)
        return backbone, midas.blocks._make_scratch(features, 4)

    midas.dpt_depth._make_encoder = encoder
    model = randomise(midas.dpt_depth.DPTDepthModel(backbone="beitb16_384", features=4))
    last = model.pretrained.model.blocks[-1]
    save(without_numbers(model.state_dict(), "pretrained.model."), out / "midas.pt")
    np.save(out / "midas.npy", states(model, last, 32, 32))
    np.save(out / "midas_wide.npy", states(model, last, 32, 64))

    from zoedepth.models.base_models.midas import MidasCore
    from zoedepth.models.zoedepth.zoedepth_v1 import ZoeDepth

    core = MidasCore(model, trainable=True, img_size=[32, 32])
    core.output_channels = (4, 4, 4, 4, 4)
    around = randomise(ZoeDepth(core, n_bins=4, bin_embedding_dim=4, n_attractors=[2, 2, 1, 1]), seed=1)
    state = without_numbers(around.state_dict(), "core.core.pretrained.model.")
    save({"model": state, "optimizer": None, "epoch": 1}, out / "zoedepth.pt")
    np.save(out / "zoedepth.npy", states(around.core.core, last, 32, 32))


def detection(out):
    """DiT's encoder for detection under detectron2's names; the rest of that model is stood for by a few layers."""
    from ditod.beit import BEiT

    encoder = BEiT(img_size=[32, 32], patch_size=16, embed_dim=8, depth=4, num_heads=2, mlp_ratio=2, qkv_bias=True,
                   init_values=0.1, use_abs_pos_emb=True, use_checkpoint=False,
                   out_features=["layer0", "layer1", "layer2", "layer3"])  # fmt: skip
    model = torch.nn.ModuleDict({"backbone": torch.nn.ModuleDict({"bottom_up": torch.nn.ModuleDict()})})
    model["backbone"]["bottom_up"]["backbone"] = encoder
    model["backbone"]["fpn_lateral2"] = torch.nn.Conv2d(8, 4, 1)
    model["roi_heads"] = torch.nn.ModuleDict({"box_predictor": torch.nn.Linear(4, 2)})
    randomise(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": {"last_epoch": 3},
               "iteration": 3}  # fmt: skip
    save(content, out / "dit.pth")
    np.save(out / "dit.npy", states(encoder, encoder.blocks[-1], 32, 32))


if __name__ == "__main__":
    found = folder("hosts")
    spec = importlib.util.find_spec("ditod")  # its __init__ asks for detectron2, which the encoder does not need
    package = types.ModuleType("ditod")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["ditod"] = package
    depth(found)
    detection(found)
    print({path.name: path.stat().st_size for path in Path(HERE / "hosts").iterdir()})
