"""ONNX Runtime and OpenVINO: transformers' model with eager attention, exported by torch.onnx, in float32.

    python -m beit_jax.peers.engines DIRECTORY    # writes DIRECTORY/model.onnx for what lies there

The export runs in a process of its own, so that its memory is not counted as the engine's.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from beit_jax.peers.job import INPUTS, Call


def exported(directory: Path) -> Path:
    """The model's file, written once.

    Raises:
        RuntimeError: the export failed; its last line says why.
    """
    path = directory / "model.onnx"
    if not path.exists():
        command = [sys.executable, "-P", "-m", "beit_jax.peers.engines", str(directory)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            raise RuntimeError(f"torch.onnx.export: {(done.stderr.strip().splitlines() or ['ended'])[-1]}")
    return path


def onnxruntime(directory: Path, pixels: np.ndarray, threads: int) -> Call:
    """A forward pass by ONNX Runtime; pixels: [b, height, width, c]."""
    import onnxruntime as library

    options = library.SessionOptions()
    options.intra_op_num_threads = threads
    session = library.InferenceSession(str(exported(directory)), options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))}
    return lambda: session.run(None, given)[0]


def openvino(directory: Path, pixels: np.ndarray, threads: int) -> Call:
    """A forward pass by OpenVINO; pixels: [b, height, width, c]."""
    import openvino as library

    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    core = library.Core()
    compiled = core.compile_model(core.read_model(str(exported(directory))), "CPU", settings)
    request, given = compiled.create_infer_request(), np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    return lambda: request.infer([given], share_inputs=True)[0]


def main(directory: Path) -> None:
    """Writes the model's file."""
    import torch

    from beit_jax.peers.by_torch import transformers_model

    model = transformers_model(directory, "eager")
    with np.load(directory / INPUTS) as inputs:
        pixels = torch.from_numpy(inputs["pixels"]).permute(0, 3, 1, 2).contiguous()

    class Logits(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model.eval()

        def forward(self, pixels: Any) -> Any:
            return self.model(pixels).logits

    with torch.inference_mode():
        torch.onnx.export(Logits(), (pixels,), str(directory / "model.onnx"), dynamo=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
