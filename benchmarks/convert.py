"""Conversion of 1.2 GB against `torch.load` and safetensors' `save_file` of the same file.

    python benchmarks/convert.py [--rounds 5] [--kinds pth sharded dcp h5] [--other FOLDER] [--json FILE]

BEiT-large as a .pth file, as sharded safetensors, as a folder of torch.distributed.checkpoint that two processes wrote,
and as HDF5 of Keras. Every run is a process of its own, the contenders take turns, and the cache is warm. Prints for
each the least wall time and the least CPU time of the work alone, imports not counted, the time of `inspect` with its
imports, and the peak memory beyond that of an interpreter that has only imported NumPy. Others' programs slow the wall
clock and hardly the CPU's: compare both. A conversion also transposes, checks for NaN, takes digests of every tensor,
and reads back what it wrote; `write` is the floor of both, the same bytes written by `os.write` and nothing else.

--other names a folder with another version of the package, as installed (beit_jax/convert in it), to compare with.

Needs torch, h5py, and 8 GB of free disk in the temporary directory; writes random weights there and removes them.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

VARIANT, CLASSIFIER = "beit_large_patch16_224_pt22k", "beit_large_patch16_224"  # Keras's files hold classifiers
KINDS = {"pth": "beit_large_patch16_224_pt22k.pth", "sharded": "sharded", "dcp": "dcp", "h5": "keras.h5"}
SHARDS, RANKS = 4, 2


# --- The sources ------------------------------------------------------------------------------------------------------


def make_sources(directory: Path) -> None:
    """Writes a source of every kind, with random weights."""
    from beit_jax.convert.formats import FORMATS
    from beit_jax.convert.formats.transformers import HF
    from beit_jax.convert.formats.unilm import UNILM
    from beit_jax.variants import VARIANTS
    from beit_jax.weights.leaves import shapes

    def tensors(naming: Any, variant: str) -> dict[str, np.ndarray]:
        rng, config = np.random.default_rng(0), VARIANTS[variant]
        params = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes(config).items()}
        return dict(naming.to_torch(config, params))

    import torch

    original = {name: torch.from_numpy(array) for name, array in tensors(UNILM, VARIANT).items()}
    torch.save({"model": original}, directory / KINDS["pth"])
    del original
    write_shards(directory / KINDS["sharded"], tensors(HF, VARIANT), VARIANTS[VARIANT].to_hf())
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533", "WORLD_SIZE": str(RANKS)}
    command = [sys.executable, __file__, "--child", "rank", str(directory)]
    ranks = [subprocess.Popen(command, env=environment | {"RANK": str(rank)}) for rank in range(RANKS)]
    if any([rank.wait() for rank in ranks]):
        raise SystemExit("the processes that write the distributed checkpoint failed")
    import h5py

    (keras,) = (each for each in FORMATS if each.name == "keras_cv_attention_models")
    with h5py.File(directory / KINDS["h5"], "w") as file:
        for name, array in tensors(keras, CLASSIFIER).items():
            file[f"{name.partition('/')[0]}/{name}"] = array  # Keras puts a layer's weights in its group


def write_shards(directory: Path, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> None:
    from safetensors.numpy import save_file

    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    total, at, shards = sum(array.nbytes for array in tensors.values()), 0, dict[int, list[str]]()
    for name, array in tensors.items():
        shards.setdefault(at * SHARDS // total, []).append(name)
        at += array.nbytes
    weight_map = {}
    for i, names in shards.items():
        file = f"model-{i + 1:05}-of-{SHARDS:05}.safetensors"
        save_file({name: tensors[name] for name in names}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def write_rank(directory: Path) -> None:
    """One of the processes of a distributed checkpoint: each has half of the rows of every matrix."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (RANKS,))
    whole = torch.load(directory / KINDS["pth"])["model"]
    state = {
        name: distribute_tensor(tensor, mesh, [Shard(0) if tensor.ndim > 1 and len(tensor) > 1 else Replicate()])
        for name, tensor in whole.items()
    }
    dcp.save({"model": state}, checkpoint_id=str(directory / KINDS["dcp"]))
    torch.distributed.destroy_process_group()


# --- The contenders ---------------------------------------------------------------------------------------------------


def ours(kind: str, source: Path, destination: Path) -> Callable[[], None]:
    from beit_jax.convert import convert

    return lambda: void(convert(source, destination))


def torchs(kind: str, source: Path, destination: Path) -> Callable[[], None]:
    import torch
    from safetensors.torch import load_file, save_file

    def pth() -> dict[str, Any]:
        return dict(torch.load(source)["model"])

    def sharded() -> dict[str, Any]:
        return {
            name: tensor for file in sorted(source.glob("*.safetensors")) for name, tensor in load_file(file).items()
        }

    def distributed() -> dict[str, Any]:
        import torch.distributed.checkpoint as dcp

        held = dcp.FileSystemReader(source).read_metadata().state_dict_metadata
        state = {name: torch.empty(each.size, dtype=each.properties.dtype) for name, each in held.items()}
        dcp.load(state, checkpoint_id=source, no_dist=True)
        return state

    def h5() -> dict[str, Any]:
        import h5py

        found: dict[str, Any] = {}

        def visit(name: str, each: Any) -> None:
            if isinstance(each, h5py.Dataset):
                found[name] = torch.from_numpy(each[()])

        with h5py.File(source) as file:
            file.visititems(visit)
        return found

    load = {"pth": pth, "sharded": sharded, "dcp": distributed, "h5": h5}[kind]
    destination.mkdir()
    return lambda: save_file(load(), destination / "model.safetensors")


def written(kind: str, source: Path, destination: Path) -> Callable[[], None]:
    """As many bytes as the source has, from one megabyte of memory."""
    files = [source] if source.is_file() else list(source.iterdir())
    total, chunk = sum(file.stat().st_size for file in files), os.urandom(1 << 20)
    destination.mkdir()

    def write() -> None:
        with (destination / "copy").open("wb", buffering=0) as file:
            for _ in range(total >> 20):
                file.write(chunk)

    return write


def inspected(kind: str, source: Path, destination: Path) -> Callable[[], None]:
    from beit_jax.cli.main import main

    destination.mkdir()
    return lambda: void(main(["inspect", str(source), "--json"]))


CONTENDERS = {"convert": ours, "torch": torchs, "write": written, "inspect": inspected}


def void(value: object) -> None:
    """Drops a result."""


def child(contender: str, kind: str, source: str, destination: str) -> None:
    """Runs one contender and prints what it took, as the last line."""
    start, began = peak(), time.perf_counter()
    work = CONTENDERS[contender](kind, Path(source), Path(destination))
    if contender != "inspect":
        began = time.perf_counter()
    before = cpu()
    work()
    wall, used = time.perf_counter() - began, cpu() - (0.0 if contender == "inspect" else before)
    print()
    print(json.dumps({"wall": wall, "cpu": used, "memory": peak() - start}))


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def peak() -> int:
    """Bytes of resident memory at the peak; the peak of getrusage would be inherited from the parent."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def run(contender: str, kind: str, sources: Path, other: Path | None = None) -> dict[str, float]:
    """What one process took; its output is removed."""
    destination = sources / "out"
    environment = os.environ | ({"PYTHONPATH": str(other)} if other else {})
    command = [sys.executable, __file__, "--child", contender, kind, str(sources / KINDS[kind]), str(destination)]
    try:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    finally:
        shutil.rmtree(destination, ignore_errors=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns of all contenders")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="the sources")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="who takes part")
    parser.add_argument(
        "--sources", type=Path, help="a directory with the sources, made there if it is empty, and kept"
    )
    parser.add_argument("--other", type=Path, help="a folder with another version of the package")
    parser.add_argument("--json", type=Path, help="write the result to this file too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        sources = options.sources or Path(temporary)
        sources.mkdir(exist_ok=True)
        if not (sources / KINDS["h5"]).exists():
            make_sources(sources)
        turns: list[tuple[str, str, Path | None]] = [(name, name, None) for name in options.contenders]
        if options.other:
            turns += [
                (f"{name}, other", name, options.other) for name in options.contenders if name in ("convert", "inspect")
            ]
        result: dict[str, dict[str, dict[str, float]]] = {}
        for kind in options.kinds:
            found: dict[str, list[dict[str, float]]] = {}
            for _ in range(options.rounds):
                for label, name, other in turns:
                    found.setdefault(label, []).append(run(name, kind, sources, other))
            result[kind] = {
                label: {key: (max if key == "memory" else min)(each[key] for each in runs) for key in runs[0]}
                for label, runs in found.items()
            }
            print_kind(kind, result[kind])
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def print_kind(kind: str, found: Mapping[str, Mapping[str, float]]) -> None:
    for label, took in found.items():
        against = {} if "inspect" in label else found.get("torch", {})
        times = " ".join(f"{against[key] / took[key]:5.2f}" for key in ("wall", "cpu") if against)
        print(
            f"{kind:8} {label:15} {took['wall']:6.2f} s wall {took['cpu']:6.2f} s CPU {took['memory'] / 1e6:6.0f} MB  "
            f"{times}",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1:3] == ["--child", "rank"]:
        write_rank(Path(sys.argv[3]))
    elif sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
