"""Features of all images of some folders by torch and transformers, as their users compute them; `scale.py` starts it.

    python benchmarks/scale_contenders.py loader HF_DIRECTORY OUTPUT.npz --batch 64 --workers 2 FOLDER...

`loader` is torch's DataLoader with transformers' image processor in its workers and the model under torch.compile;
`pipeline` is transformers' pipeline in batches.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image


class Images(torch.utils.data.Dataset):  # type: ignore[misc]  # torch has no types here
    """Pixel values of files by transformers' processor."""

    def __init__(self, files: Sequence[Path], processor: Any):
        self.files, self.processor = files, processor

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.files[index]) as image:
            return self.processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]


class Names(torch.utils.data.Dataset):  # type: ignore[misc]
    """The files' names."""

    def __init__(self, files: Sequence[Path]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> str:
        return str(self.files[index])


def by_loader(directory: Path, files: Sequence[Path], batch: int, workers: int) -> Iterator[np.ndarray]:
    """Yields the features of every batch."""
    processor = transformers.AutoImageProcessor.from_pretrained(directory)
    model = transformers.AutoModel.from_pretrained(directory).eval()
    compiled = torch.compile(model)
    loader = torch.utils.data.DataLoader(Images(files, processor), batch, num_workers=workers)
    with torch.inference_mode():
        for pixels in loader:
            # A last batch of another size would be compiled again: it is filled up, as ours is.
            filled = torch.nn.functional.pad(pixels, (0,) * 6 + (0, batch - len(pixels)))
            yield compiled(filled).pooler_output[: len(pixels)].numpy()


def by_pipeline(directory: Path, files: Sequence[Path], batch: int, workers: int) -> Iterator[np.ndarray]:
    """Yields the features of every image."""
    pipeline = transformers.pipeline("image-feature-extraction", model=str(directory), batch_size=batch)

    # Of a generator transformers would read with one worker at most, of a list it would keep all results.
    for found in pipeline(Names(files), pool=True, return_tensors=True, num_workers=workers):
        yield found.numpy()


CONTENDERS = {"loader": by_loader, "pipeline": by_pipeline}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("directory", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--workers", type=int, required=True)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    files = [file for folder in options.folders for file in sorted(folder.iterdir())]
    found = CONTENDERS[options.contender](options.directory, files, options.batch, options.workers)
    np.savez(options.output, features=np.concatenate(list(found)), images=np.array([str(file) for file in files]))


if __name__ == "__main__":
    main()
