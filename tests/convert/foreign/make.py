"""Writes the files of this folder: tiny BEiT models as other libraries save them, and the logits that these compute.

Not a part of the tests, which read the files with NumPy alone. Each kind needs its own library at the version below,
beside torch 2.13 and NumPy, in an environment of its own:

    python tests/convert/foreign/make.py lightning      # lightning 2.6.6, timm 1.0.31
    python tests/convert/foreign/make.py accelerate     # accelerate 1.15.0, transformers 5.23.0
    python tests/convert/foreign/make.py trainer        # accelerate 1.15.0, transformers 5.23.0
    python tests/convert/foreign/make.py distributed    # torch 2.13.0, timm 1.0.31

A kind is a folder of what its library wrote, and `logits.npy` [3, classes] float32 of the images in `images.npy`
[3, 16, 16, 3] float32, as the library computed them with the weights in the files.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
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
        out, num_train_epochs=2, save_strategy="epoch", eval_strategy="epoch", load_best_model_at_end=True,
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
    command = [sys.executable, __file__, "one_rank"]
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
    dcp.save(content, checkpoint_id=HERE / "distributed" / "step_7")
    torch.distributed.destroy_process_group()


KINDS = {each.__name__: each for each in (lightning, accelerate, trainer, distributed, one_rank)}

if __name__ == "__main__":
    np.save(HERE / "images.npy", IMAGES)
    for kind in sys.argv[1:]:
        KINDS[kind]()
