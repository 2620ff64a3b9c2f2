"""Writes the files of this folder: tiny BEiT models as other libraries save them, and the logits that these compute.

Not a part of the tests, which read the files with NumPy alone. Each kind needs its own library at the version below,
beside torch 2.13 and NumPy, in an environment of its own:

    python tests/convert/foreign/make.py lightning      # lightning 2.6.6, timm 1.0.31
    python tests/convert/foreign/make.py accelerate     # accelerate 1.15.0, transformers 5.23.0
    python tests/convert/foreign/make.py trainer        # accelerate 1.15.0, transformers 5.23.0
    python tests/convert/foreign/make.py distributed    # torch 2.13.0, timm 1.0.31
    python tests/convert/foreign/make.py mmpretrain     # mmpretrain 1.2.0, mmengine 0.10.7, mmcv-lite 2.1.0
    python tests/convert/foreign/make.py mmseg          # mmsegmentation 1.2.2, mmengine 0.10.7, mmcv-lite 2.1.0

    python tests/convert/foreign/make.py tensorflow     # transformers 4.57.6, tensorflow-cpu, tf-keras, without torch
    python tests/convert/foreign/make.py kecam          # keras_cv_attention_models 1.4.3, tensorflow-cpu, tf-keras
    python tests/convert/foreign/make.py cae            # Atten4Vis/CAE@a7fd162 on PYTHONPATH, torch 2.13.0, timm 1.0.31
    python tests/convert/foreign/make.py beitv2         # microsoft/unilm@768a3c8's beit2 on PYTHONPATH, timm 1.0.31
    python tests/convert/foreign/make.py paddle         # paddlepaddle 3.3.1, paddleclas 2.6.0, without torch

The relatives with a bias of the keys are made by make_relatives.py.
A kind is a folder of what its library wrote, and `logits.npy` [3, classes] float32 of the images in `images.npy`
[3, 16, 16, 3] float32, as the library computed them with the weights in the files.
"""

import argparse
import functools
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
IMAGES = np.random.default_rng(0).standard_normal((3, 16, 16, 3)).astype(np.float32)


def folder(kind):
    """A new, empty folder for the files of a kind."""
    shutil.rmtree(HERE / kind, ignore_errors=True)
    (HERE / kind).mkdir()
    return HERE / kind


def randomise(model, seed=0):
    """Draws every parameter, because zeros and ones would hide mistakes; for evaluation."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            draw = torch.randn(parameter.shape, generator=generator)
            scale = parameter[0].numel() ** -0.5 if parameter.ndim in (2, 4) else 0.2
            parameter.copy_(draw * scale + (parameter.ndim == 1) * 0.5)
    return model.eval()


def compute(model):
    """The logits of the three images."""
    import torch

    with torch.no_grad():
        found = model(torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy()))
    return getattr(found, "logits", found).numpy()


def timm_model(**changes):
    from timm.models.beit import Beit

    size = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
    options = {"num_classes": 5, "init_values": 0.1, "use_abs_pos_emb": False, "use_rel_pos_bias": True}
    return randomise(Beit(**size | options | changes))


def hf_model(**changes):
    from transformers import BeitConfig, BeitForImageClassification

    size = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    options = {"intermediate_size": 32, "use_relative_position_bias": True, "num_labels": 5, "drop_path_rate": 0.0}
    return randomise(BeitForImageClassification(BeitConfig(**size | options | changes)))


def lightning():
    """A LightningModule of timm's model with a weighted loss and a head of its own, after a step of training."""
    import torch
    from lightning.pytorch import LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self, rate, weights):
            super().__init__()
            self.save_hyperparameters()
            self.net = timm_model()
            self.projector = torch.nn.Linear(5, 2)
            self.loss = torch.nn.CrossEntropyLoss(torch.tensor(weights))

        def training_step(self, batch, index):
            return self.loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), self.hparams.rate)

    images = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy())
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, torch.arange(3)), batch_size=3)
    module, out = Module(0.01, [1.0, 2.0, 1.0, 1.0, 1.0]), folder("lightning")
    trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(module, data)
    trainer.save_checkpoint(out / "last.ckpt")
    np.save(out / "logits.npy", compute(module.eval().net))


def accelerate():
    """`Accelerator.save_state`: no configuration, and the names that transformers has in memory."""
    import torch
    from accelerate import Accelerator

    model, out = hf_model(), folder("accelerate")
    accelerator = Accelerator(cpu=True)
    prepared, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    accelerator.save_state(out / "state")
    model.config.save_pretrained(out)  # what the user has at hand: --config
    np.save(out / "logits.npy", compute(prepared))


def trainer():
    """The output directory of a Trainer with two checkpoints, of which the first scored best."""
    import torch
    from transformers import Trainer, TrainingArguments

    model, out = hf_model(), folder("trainer")
    data = [{"pixel_values": torch.from_numpy(image.transpose(2, 0, 1).copy()), "labels": i}
            for i, image in enumerate(IMAGES)]  # fmt: skip
    scores = iter([0.9, 0.1])
    arguments = TrainingArguments(
        out.name, num_train_epochs=2, save_strategy="epoch", eval_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="accuracy", use_cpu=True, report_to=[], per_device_train_batch_size=3,
        learning_rate=0.01, optim="sgd",
    )  # fmt: skip
    run = Trainer(model, arguments, train_dataset=data, eval_dataset=data,
                  compute_metrics=lambda _: {"accuracy": next(scores)})  # fmt: skip
    run.train()
    from transformers import BeitForImageClassification

    for name in ("checkpoint-1", "checkpoint-2"):
        saved = BeitForImageClassification.from_pretrained(out / name).eval()
        np.save(out / f"{name}.npy", compute(saved))
    for path in out.rglob("*"):
        if path.name in ("optimizer.pt", "training_args.bin", "rng_state.pth", "scheduler.pt", "README.md"):
            path.unlink()


def distributed():
    """torch.distributed.checkpoint of two processes, each with half of the rows of every matrix."""
    out = folder("distributed")
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "WORLD_SIZE": "2"}
    command = [sys.executable, str(Path(__file__).resolve()), "one_rank"]
    ranks = [subprocess.Popen(command, env=environment | {"RANK": str(rank)}) for rank in range(2)]
    assert [rank.wait() for rank in ranks] == [0, 0]
    np.save(out / "logits.npy", compute(timm_model(depth=1)))


def one_rank():
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    model = timm_model(depth=1)
    state = {
        name: distribute_tensor(tensor, mesh, [Shard(0) if tensor.ndim > 1 and len(tensor) > 1 else Replicate()])
        for name, tensor in model.state_dict().items()
    }
    momentum = {name: {"momentum_buffer": torch.zeros(2)} for name in list(state)[:2]}
    content = {"model": state, "optimizer": {"state": momentum, "param_groups": [{"lr": 0.1}]}, "step": 7}
    dcp.save(content, checkpoint_id="distributed/step_7")
    torch.distributed.destroy_process_group()


ARCH = {"embed_dims": 16, "num_layers": 2, "num_heads": 2, "feedforward_channels": 32, "depth": 2}


def mmpretrain():
    """Classifiers of both poolings, pre-training of BEiT and BEiT v2, and a Runner's file with a moving average."""
    import torch
    from mmpretrain.registry import MODELS
    from mmpretrain.utils import register_all_modules

    register_all_modules()
    out = folder("mmpretrain")
    size = {"arch": ARCH, "img_size": 16, "patch_size": 4}
    head = {"type": "LinearClsHead", "num_classes": 5, "in_channels": 16}

    def classifier(**options):
        backbone = {"type": "BEiTViT", **size, **options}
        return randomise(MODELS.build({"type": "ImageClassifier", "backbone": backbone, "head": head}))

    model = classifier(out_type="avg_featmap")
    np.save(out / "mean.npy", compute(model))
    meta = {"dataset_meta": {"classes": ("ant", "bee", "cat", "dog", "eel")}, "mmengine_version": "0.10.7"}
    torch.save({"meta": meta, "state_dict": model.state_dict()}, out / "mean.pth")

    images = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy())
    mask = np.random.default_rng(1).random((3, 4, 4)) < 0.4
    np.save(out / "mask.npy", mask.reshape(3, 16))
    for name in ("mim", "mim_v2"):
        late = {"final_norm": True} if name == "mim" else {"final_norm": False, "out_indices": [0, 1]}
        backbone = {"type": "BEiTPretrainViT", **size, "out_type": "raw", **late}
        kind = "BEiTV1Head" if name == "mim" else "BEiTV2Head"
        neck = {"type": "BEiTV2Neck", "num_layers": 1, "early_layers": 1, "backbone_arch": ARCH}
        parts = [MODELS.build(backbone), MODELS.build({"type": kind, "embed_dims": 16, "num_embed": 24,
                                                       "loss": {"type": "CrossEntropyLoss"}})]  # fmt: skip
        parts += [MODELS.build(neck)] if name == "mim_v2" else []
        model = torch.nn.ModuleDict(dict(zip(("backbone", "head", "neck"), parts, strict=False)))
        randomise(model)
        with torch.no_grad():
            tokens = model["backbone"](images, torch.from_numpy(mask))
            if name == "mim":
                logits = model["head"].cls_head(tokens[0][:, 1:])[None]
            else:
                shared = model["backbone"].shared_rel_pos_bias
                logits = torch.stack([model["head"].cls_head(each) for each in model["neck"](tokens, shared)])
        np.save(out / f"{name}.npy", logits.numpy())
        text = "model = dict(backbone=dict(out_indices=[-2, -1]))" if name == "mim_v2" else ""
        torch.save({"meta": {"cfg": text, "mmengine_version": "0.10.7"}, "state_dict": model.state_dict()},
                   out / f"{name}.pth")  # fmt: skip
    one_layer = ARCH | {"num_layers": 1}
    runner_file(classifier(arch=one_layer, out_type="cls_token", final_norm=True), out, "token")


def runner_file(model, out, name):
    """One epoch by mmengine's Runner with EMAHook: classes of its own beside the weights, and two sets of these."""
    import torch
    from mmengine.hooks import EMAHook
    from mmengine.runner import Runner
    from mmpretrain.structures import DataSample

    data = [{"inputs": torch.from_numpy(image.transpose(2, 0, 1).copy()), "data_samples": DataSample().set_gt_label(i)}
            for i, image in enumerate(IMAGES)]  # fmt: skip
    runner = Runner(
        model, work_dir="run", log_level="ERROR", custom_hooks=[{"type": "EMAHook", "momentum": 0.3}],
        train_dataloader={"batch_size": 3, "dataset": data, "sampler": {"type": "DefaultSampler"},
                          "collate_fn": {"type": "default_collate"}},
        train_cfg={"by_epoch": True, "max_epochs": 3},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}},
        default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 3}},
    )  # fmt: skip
    runner.train()
    average = next(hook for hook in runner.hooks if isinstance(hook, EMAHook)).ema_model.module
    np.save(out / f"{name}_raw.npy", compute(model.eval()))
    np.save(out / f"{name}_ema.npy", compute(average.eval()))
    content = torch.load("run/epoch_3.pth", weights_only=False)  # written above
    content["message_hub"]["runtime_info"].pop("last_ckpt")  # a path of this machine
    torch.save(content, out / f"{name}.pth")
    shutil.rmtree("run")


def mmseg():
    """UperNet with mmsegmentation's neck, and the names of its classes."""
    import torch

    class Operators(types.ModuleType):
        """mmcv-lite has no compiled operators; mmseg asks for them when it is imported, and BEiT needs none."""

        __getattr__ = staticmethod(lambda name: None if name.startswith("__") else print)

    sys.modules["mmcv._ext"] = Operators("mmcv._ext")
    from mmseg.registry import MODELS
    from mmseg.utils import register_all_modules

    register_all_modules()
    out, norm = folder("mmseg"), {"type": "BN"}
    loss = {"type": "CrossEntropyLoss", "use_sigmoid": False}
    heads = {"num_classes": 3, "norm_cfg": norm, "align_corners": False, "loss_decode": loss}
    model = randomise(MODELS.build({
        "type": "EncoderDecoder",
        "backbone": {"type": "BEiT", "img_size": (16, 16), "patch_size": 8, "embed_dims": 4, "num_layers": 4,
                     "num_heads": 2, "mlp_ratio": 2, "out_indices": (0, 1, 2, 3),
                     "norm_cfg": {"type": "LN", "eps": 1e-6}},
        "neck": {"type": "Feature2Pyramid", "embed_dim": 4, "rescales": [4, 2, 1, 0.5], "norm_cfg": norm},
        "decode_head": {"type": "UPerHead", "in_channels": [4] * 4, "in_index": [0, 1, 2, 3], "channels": 4,
                        "pool_scales": (1, 2, 3, 6), **heads},
        "auxiliary_head": {"type": "FCNHead", "in_channels": 4, "in_index": 2, "channels": 2, "num_convs": 1,
                           "concat_input": False, **heads},
    }))  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    for name, buffer in sorted(model.named_buffers()):
        if "running" in name:
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    np.save(out / "logits.npy", compute(model))
    meta = {"cfg": "model = dict(backbone=dict(out_indices=(\n        0,\n        1,\n        2,\n        3,\n    )))",
            "dataset_meta": {"classes": ("wall", "sky", "tree")}, "mmengine_version": "0.10.7"}  # fmt: skip
    # The older container, because the archive would be larger than its tensors.
    torch.save({"meta": meta, "state_dict": model.state_dict()}, out / "upernet.pth",
               _use_new_zipfile_serialization=False)  # fmt: skip


def drawn_keras(model):
    """Draws every weight of a Keras model."""
    generator = np.random.default_rng(0)
    for weight in model.weights:
        if "index" in weight.name:
            continue
        scale = np.prod(weight.shape[:-1]) ** -0.5 if len(weight.shape) in (2, 4) and "kernel" in weight.name else 0.2
        weight.assign(generator.standard_normal(weight.shape) * scale + (len(weight.shape) == 1) * 0.5)


def tensorflow():
    """transformers 4's TFData2VecVision: tf_model.h5, and a model.safetensors with TensorFlow's names."""
    from transformers import Data2VecVisionConfig, TFData2VecVisionForImageClassification

    size = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    options = {"intermediate_size": 32, "use_relative_position_bias": True, "num_labels": 5, "drop_path_rate": 0.0}
    model = TFData2VecVisionForImageClassification(Data2VecVisionConfig(**size, **options))
    images = IMAGES.transpose(0, 3, 1, 2).copy()
    model(images)
    drawn_keras(model)
    out = folder("tensorflow")
    np.save(out / "logits.npy", model(images).logits.numpy())
    model.save_pretrained(out / "h5", safe_serialization=False)
    model.save_pretrained(out / "safetensors", safe_serialization=True)


def kecam():
    """keras_cv_attention_models' BEiT with the weights as save_weights writes them."""
    import h5py
    from keras_cv_attention_models.beit import Beit

    model = Beit(depth=1, embed_dim=16, num_heads=2, mlp_ratio=2, patch_size=4, input_shape=(16, 16, 3), num_classes=5,
                 pretrained=None, classifier_activation=None)  # fmt: skip
    drawn_keras(model)
    out = folder("kecam")
    np.save(out / "logits.npy", model(IMAGES).numpy())
    model.save_weights("large.h5")
    # The same groups, attributes and data sets in the newer layout of HDF5, whose groups take a tenth of the bytes.
    with h5py.File("large.h5") as source, h5py.File(out / "beit.h5", "w", libver="latest") as file:
        file.attrs.update(source.attrs)
        found = []
        source.visit(found.append)
        for name in found:
            if isinstance(source[name], h5py.Group):
                file.create_group(name).attrs.update(source[name].attrs)
            else:
                file.create_dataset(name, data=source[name][()])
    os.remove("large.h5")


def cae():
    """CAE's pre-training with its regressor, decoder and alignment, its classifier, and a probe that attends."""
    import torch

    utilities = types.ModuleType("furnace.utils")  # asks for code that is not published, and gives a batch norm alone
    utilities.LP_BatchNorm = torch.nn.BatchNorm1d
    sys.modules["furnace.utils"] = utilities
    from models.modeling_cae import ContextAutoencoderViT
    from models.modeling_finetune import VisionTransformer

    out, norm = folder("cae"), functools.partial(torch.nn.LayerNorm, eps=1e-6)
    size = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "mlp_ratio": 2}
    size |= {"qkv_bias": True, "norm_layer": norm, "init_values": 0.1}
    args = types.SimpleNamespace(model_type="cae", regressor_depth=1, decoder_embed_dim=12, decoder_depth=1)
    narrow = {**size, "embed_dim": 12, "args": args, "decoder_num_heads": 2, "decoder_num_classes": 12}
    model = randomise(ContextAutoencoderViT(**narrow))
    images = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy())

    def save(name, model, kind):
        settings = argparse.Namespace(model=kind, imagenet_default_mean_and_std=True)
        # The older container, because the archive would be larger than its tensors.
        content = {"model": model.state_dict(), "epoch": 3, "args": settings}
        torch.save(content, out / f"{name}.pth", _use_new_zipfile_serialization=False)

    with torch.no_grad():
        np.save(out / "encoder.npy", model.encoder(images, torch.zeros(3, 16, dtype=torch.bool)).numpy())
    save("pretrained", model, "cae_base_patch16_224_8k_vocab")

    def classifier(**options):
        options = {"num_classes": 5, "args": types.SimpleNamespace(sin_pos_emb=True), **options}
        return randomise(VisionTransformer(**size, **options))

    model = classifier(use_rel_pos_bias=True)
    np.save(out / "classifier.npy", compute(model))
    save("classifier", model, "cae_base_patch16_224")
    model = classifier(use_mean_pooling=False, lin_probe=True, linear_type="attentive")
    save("attentive", model, "cae_base_patch16_224")
    plain = classifier(use_mean_pooling=False, num_classes=16)
    plain.head = torch.nn.Identity()
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if n in plain.state_dict()})
    np.save(out / "attentive.npy", compute(plain))


def beitv2():
    """BEiT v2's pre-training, whose extra blocks predict by the model's head or by one of their own."""
    import torch
    from modeling_pretrain import VisionTransformerForMaskedImageModelingCLS

    out, norm = folder("beitv2"), functools.partial(torch.nn.LayerNorm, eps=1e-6)
    size = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
    size |= {"norm_layer": norm, "init_values": 0.1, "use_abs_pos_emb": False, "use_shared_rel_pos_bias": True}
    images = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy())
    mask = np.random.default_rng(1).random((3, 16)) < 0.4
    np.save(out / "mask.npy", mask)
    for name in ("shared", "own"):
        extra = {"early_layers": 1, "head_layers": 1, "shared_lm_head": name == "shared"}
        model = randomise(VisionTransformerForMaskedImageModelingCLS(**size, **extra, vocab_size=10))
        with torch.no_grad():
            both = model(images, torch.from_numpy(mask), return_all_tokens=True)
        np.save(out / f"{name}.npy", torch.stack(both).numpy())
        args = argparse.Namespace(model="beit_base_patch16_224_8k_vocab_cls_pt", **extra)
        # The older container, because the archive would be larger than its tensors.
        content = {"model": model.state_dict(), "epoch": 3, "args": args}
        torch.save(content, out / f"{name}.pth", _use_new_zipfile_serialization=False)


def paddle():
    """PaddleClas' CAE and BEiTv2 by `paddle.save`, in every way in which it lays a state dict out."""
    import paddle
    from paddleclas.ppcls.arch.backbone.model_zoo import cae, foundation_vit

    out, size = folder("paddle"), {"img_size": 16, "patch_size": 4, "embed_dim": 16, "num_heads": 2, "mlp_ratio": 2}

    def drawn(model, seed=0):
        generator = np.random.default_rng(seed)
        for _, parameter in sorted(model.named_parameters()):
            scale = np.prod(parameter.shape[1:]) ** -0.5 if parameter.ndim in (2, 4) else 0.2
            draw = generator.standard_normal(parameter.shape) * scale + (parameter.ndim == 1) * 0.5
            parameter.set_value(draw.astype(np.float32))
        model.eval()
        return model

    def logits(model):
        with paddle.no_grad():
            return model(paddle.to_tensor(IMAGES.transpose(0, 3, 1, 2).copy())).numpy()

    def as_cae(depth, **options):
        norm = functools.partial(paddle.nn.LayerNorm, epsilon=1e-6)
        always = {"qkv_bias": True, "norm_layer": norm, "init_values": 0.1, "use_abs_pos_emb": False, "class_num": 5}
        return drawn(cae.VisionTransformer(**size, **always, depth=depth, use_rel_pos_bias=True, **options))

    def as_beitv2(kind, **options):
        always = {"qkv_bias": True, "epsilon": 1e-6, "depth": 1, "output_dim": 3, "class_num": 5}
        return drawn(foundation_vit.VisionTransformer(kind + "_vit_base_patch16_224", **size, **always, **options))

    model = as_cae(2)
    np.save(out / "cae.npy", logits(model))
    paddle.save(model.state_dict(), str(out / "cae.pdparams"))
    model = as_cae(1, use_mean_pooling=False)
    np.save(out / "token.npy", logits(model))
    state = model.state_dict()
    paddle.save(state, str(out / "protocol2.pdparams"), protocol=2)
    paddle.save(state, str(out / "paddle.safetensors"), safetensors=True)
    single = {name: value for name, value in state.items() if value.dtype == paddle.float32}
    narrow = {**state, **{name: value.astype("bfloat16") for name, value in single.items()}}
    paddle.save({"model": narrow, "epoch": 3}, str(out / "bfloat16.pdparams"))
    model.set_state_dict({name: value.astype(state[name].dtype) for name, value in narrow.items()})
    np.save(out / "bfloat16.npy", logits(model))
    for kind in ("BEiTv2", "CAE"):
        model = as_beitv2(kind)
        np.save(out / f"{kind}.npy", logits(model))
        paddle.save(model.state_dict(), str(out / f"{kind}.pdparams"))
    optimizer = paddle.optimizer.AdamW(parameters=[model.parameters()[0]])
    model(paddle.to_tensor(IMAGES.transpose(0, 3, 1, 2).copy())).sum().backward()
    optimizer.step()
    paddle.save(optimizer.state_dict(), str(out / "optimizer.pdopt"))


KINDS = {each.__name__: each for each in (lightning, accelerate, trainer, distributed, one_rank, mmpretrain, mmseg,
                                          tensorflow, kecam, cae, beitv2, paddle)}  # fmt: skip

if __name__ == "__main__":
    os.chdir(HERE)  # some libraries write the path that they are given into the file
    np.save("images.npy", IMAGES)
    for kind in sys.argv[1:]:
        KINDS[kind]()
