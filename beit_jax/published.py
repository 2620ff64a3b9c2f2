"""The published checkpoints of the family: where each one is, its format and its accuracy.

Sources: microsoft/unilm@768a3c8 beit/README.md, beit2/README.md, dit/README.md; facebookresearch/data2vec_vision@
af9a363 beit/README.md; pytorch-image-models 1.0.31 results-imagenet.csv; the conversion scripts of transformers.
Accuracies are top-1 on ImageNet-1k unless another measure is named.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Format = Literal["hugging face", "original", "timm"]


@dataclass(frozen=True)
class Published:
    """One published checkpoint.

    Attributes:
        name: hub name, file name or timm tag.
        variant: its name in `beit_jax.VARIANTS`, if it is there.
        where: the hub name that ``beit-jax convert`` takes, or the address to download the file from.
        result: as its authors report it.
        sha256_prefix: the beginning of the file's digest, if the file's name has it.
    """

    name: str
    variant: str | None
    format: Format
    where: str
    result: str | None = None
    sha256_prefix: str | None = None


_UNILM = "https://github.com/addf400/files/releases/download/v1.0/"
_UNILM2 = "https://github.com/addf400/files/releases/download/BEiT-v2/"
_DATA2VEC = "https://dl.fbaipublicfiles.com/fairseq/data2vec/data2vec_vision/"

_HUGGING_FACE: dict[str, tuple[str | None, str | None]] = {
    "microsoft/beit-base-patch16-224-pt22k": ("beit_base_patch16_224_pt22k", None),
    "microsoft/beit-large-patch16-224-pt22k": ("beit_large_patch16_224_pt22k", None),
    "microsoft/beit-base-patch16-224-pt22k-ft22k": ("beit_base_patch16_224_pt22k_ft22k", None),
    "microsoft/beit-large-patch16-224-pt22k-ft22k": ("beit_large_patch16_224_pt22k_ft22k", None),
    "microsoft/beit-base-patch16-224": ("beit_base_patch16_224", "85.2"),
    "microsoft/beit-base-patch16-384": ("beit_base_patch16_384", "86.8"),
    "microsoft/beit-large-patch16-224": ("beit_large_patch16_224", "87.4"),
    "microsoft/beit-large-patch16-384": ("beit_large_patch16_384", "88.4"),
    "microsoft/beit-large-patch16-512": ("beit_large_patch16_512", "88.60"),
    "microsoft/beit-base-finetuned-ade-640-640": ("beit_base_patch16_640_ade20k", "mIoU 53.6 (ADE20K)"),
    "microsoft/beit-large-finetuned-ade-640-640": ("beit_large_patch16_640_ade20k", "mIoU 56.7 (ADE20K)"),
    "microsoft/dit-base": ("dit_base", None),
    "microsoft/dit-large": ("dit_large", None),
    "microsoft/dit-base-finetuned-rvlcdip": ("dit_base_finetuned_rvlcdip", "92.11 (RVL-CDIP)"),
    "microsoft/dit-large-finetuned-rvlcdip": ("dit_large_finetuned_rvlcdip", "92.69 (RVL-CDIP)"),
    "facebook/data2vec-vision-base": ("data2vec_vision_base", None),
    "facebook/data2vec-vision-large": ("data2vec_vision_large", None),
    "facebook/data2vec-vision-base-ft1k": ("data2vec_vision_base_ft1k", "83.97"),
    "facebook/data2vec-vision-large-ft1k": ("data2vec_vision_large_ft1k", None),
}
_ORIGINAL: dict[str, dict[str, tuple[str | None, str | None]]] = {
    _UNILM: {
        "beit_base_patch16_224_pt22k": ("beit_base_patch16_224_pt22k", None),
        "beit_large_patch16_224_pt22k": ("beit_large_patch16_224_pt22k", None),
        "beit_base_patch16_224_pt22k_ft22k": ("beit_base_patch16_224_pt22k_ft22k", None),
        "beit_large_patch16_224_pt22k_ft22k": ("beit_large_patch16_224_pt22k_ft22k", None),
        "beit_base_patch16_224_pt22k_ft1k": ("beit_base_patch16_224", "83.7"),
        "beit_large_patch16_224_pt22k_ft1k": ("beit_large_patch16_224", "86.0"),
        "beit_base_patch16_224_pt22k_ft22kto1k": ("beit_base_patch16_224", "85.2"),
        "beit_base_patch16_384_pt22k_ft22kto1k": ("beit_base_patch16_384", "86.8"),
        "beit_large_patch16_224_pt22k_ft22kto1k": ("beit_large_patch16_224", "87.4"),
        "beit_large_patch16_384_pt22k_ft22kto1k": ("beit_large_patch16_384", "88.4"),
        "beit_large_patch16_512_pt22k_ft22kto1k": ("beit_large_patch16_512", "88.60"),
        "beit_base_patch16_640_pt22k_ft22ktoade20k": ("beit_base_patch16_640_ade20k", "mIoU 53.6 (ADE20K)"),
        "beit_large_patch16_640_pt22k_ft22ktoade20k": ("beit_large_patch16_640_ade20k", "mIoU 56.7 (ADE20K)"),
        "beit_base_patch16_224_pt1k_800ep": ("beit_base_patch16_224_pt1k_800ep", None),
    },
    _UNILM2: {
        "beitv2_base_patch16_224_pt1k": ("beit_base_patch16_224_pt22k", None),
        "beitv2_base_patch16_224_pt1k_300e": ("beit_base_patch16_224_pt22k", None),
        "beitv2_base_patch16_224_pt1k_ft21k": ("beit_base_patch16_224_pt22k_ft22k", None),
        "beitv2_base_patch16_224_pt1k_300e_ft1k": ("beit_base_patch16_224", "85.0"),
        "beitv2_base_patch16_224_pt1k_ft1k": ("beit_base_patch16_224", "85.5"),
        "beitv2_base_patch16_224_pt1k_ft21kto1k": ("beit_base_patch16_224", "86.5"),
        "beitv2_large_patch16_224_pt1k": ("beit_large_patch16_224_pt22k", None),
        "beitv2_large_patch16_224_pt1k_300e": ("beit_large_patch16_224_pt22k", None),
        "beitv2_large_patch16_224_pt1k_ft21k": ("beit_large_patch16_224_pt22k_ft22k", None),
        "beitv2_large_patch16_224_pt1k_300e_ft1k": ("beit_large_patch16_224", "86.6"),
        "beitv2_large_patch16_224_pt1k_ft1k": ("beit_large_patch16_224", "87.3"),
        "beitv2_large_patch16_224_pt1k_ft21kto1k": ("beit_large_patch16_224", "88.4"),
    },
}
_DATA2VEC_FILES: dict[str, str | None] = {
    "base_800/checkpoint-799.pth": None,
    "large_800/checkpoint-799.pth": None,
    "large_1600/checkpoint-799.pth": None,
    "finetuned_base/checkpoint-99/mp_rank_00_model_states.pt": "data2vec_vision_base_ft1k",
    "finetuned_large/checkpoint-49/mp_rank_00_model_states.pt": "data2vec_vision_large_ft1k",
}
# The names of two files of DiT and of the tokenizers of BEiT v2 have the beginning of the file's digest.
_WITH_DIGEST: dict[str, dict[str, str | None]] = {
    "https://huggingface.co/HYPJUDY/dit": {
        "dit-base-224-p16-500k-62d53a": "dit_base",
        "dit-large-224-p16-500k-d7a2fb": "dit_large",
    },
    _UNILM2: {
        "vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7": None,
        "vqkd_encoder_base_decoder_1x768x12_clip-d93179da": None,
        "vqkd_encoder_base_decoder_1x768x12_dino-663c55d7": None,
    },
}
_TIMM: dict[str, tuple[str | None, str | None]] = {
    "beit_base_patch16_224.in22k_ft_in22k_in1k": ("beit_base_patch16_224", "85.238"),
    "beit_base_patch16_224.in22k_ft_in22k": ("beit_base_patch16_224_pt22k_ft22k", None),
    "beit_base_patch16_384.in22k_ft_in22k_in1k": ("beit_base_patch16_384", "86.814"),
    "beit_large_patch16_224.in22k_ft_in22k_in1k": ("beit_large_patch16_224", "87.486"),
    "beit_large_patch16_224.in22k_ft_in22k": ("beit_large_patch16_224_pt22k_ft22k", None),
    "beit_large_patch16_384.in22k_ft_in22k_in1k": ("beit_large_patch16_384", "88.380"),
    "beit_large_patch16_512.in22k_ft_in22k_in1k": ("beit_large_patch16_512", "88.576"),
    "beitv2_base_patch16_224.in1k_ft_in22k_in1k": ("beit_base_patch16_224", "86.494"),
    "beitv2_base_patch16_224.in1k_ft_in1k": ("beit_base_patch16_224", "85.596"),
    "beitv2_base_patch16_224.in1k_ft_in22k": ("beit_base_patch16_224_pt22k_ft22k", None),
    "beitv2_large_patch16_224.in1k_ft_in22k_in1k": ("beit_large_patch16_224", "88.406"),
    "beitv2_large_patch16_224.in1k_ft_in1k": ("beit_large_patch16_224", "87.414"),
    "beitv2_large_patch16_224.in1k_ft_in22k": ("beit_large_patch16_224_pt22k_ft22k", None),
}


def _rows() -> Iterator[Published]:
    for name, (variant, result) in _HUGGING_FACE.items():
        yield Published(name, variant, "hugging face", name, result)
    for base, files in _ORIGINAL.items():
        for name, (variant, result) in files.items():
            yield Published(name, variant, "original", f"{base}{name}.pth", result)
    for name, variant in _DATA2VEC_FILES.items():
        yield Published(f"data2vec_vision {name}", variant, "original", _DATA2VEC + name)
    for base, digests in _WITH_DIGEST.items():
        for name, variant in digests.items():
            where = f"{base}{name}.pth" if base.endswith("/") else base
            yield Published(name, variant, "original", where, None, name.rpartition("-")[2])
    for name, (variant, result) in _TIMM.items():
        yield Published(name, variant, "timm", f"timm/{name}", result)


PUBLISHED = tuple(_rows())
