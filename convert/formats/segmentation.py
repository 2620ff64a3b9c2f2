"""The names of UperNet's tensors: its neck, which scales feature maps, and its two heads."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .rules import CONV, CONV_TRANSPOSE, Rule, Rules, batch_norm, linear, rule

if TYPE_CHECKING:
    from beit_jax.config import BeitConfig


@dataclass(frozen=True)
class SegmentationNames:
    """The names of the tensors of segmentation; the defaults are mmseg's words, which transformers 4 took over.

    Attributes:
        pyramid: the first, second and third layer with weights of fpn1, and the one layer of fpn2.
        conv, norm: the two halves of a convolution with batch norm.
        bottleneck: the convolution behind the pyramid pooling.
        pool: the convolution of the k-th pooling scale; ``{k}`` stands for k.
        classifier: the last layer of either head.
    """

    pyramid: tuple[str, str, str, str] = ("fpn1.0", "fpn1.1", "fpn1.3", "fpn2.0")
    conv: str = "conv"
    norm: str = "bn"
    bottleneck: str = "bottleneck"
    pool: str = "psp_modules.{k}.1"
    classifier: str = "classifier"

    def pyramid_rules(self) -> Rules:
        """Returns the rules of the neck."""
        up4_first, up4_norm, up4_second, up2 = self.pyramid
        layers = ((up4_first, "up4_first"), (up4_second, "up4_second"), (up2, "up2"))
        kernels = [each for torch, flax in layers for each in linear(torch, f"fpn/{flax}", CONV_TRANSPOSE)]
        return (*kernels, *batch_norm(up4_norm, "fpn/up4_norm"))

    def head_rules(self, config: "BeitConfig") -> Rules:
        """Returns the rules of both heads, with as many pooling scales and convolutions as `config` has."""
        decode = [(f"lateral_convs.{i}", f"lateral_{i}") for i in range(3)]
        decode += [(f"fpn_convs.{i}", f"smooth_{i}") for i in range(3)]
        decode += [(self.pool.replace("{k}", str(k)), f"pool_{k}") for k in range(len(config.pool_scales))]
        decode += [(self.bottleneck, "bottleneck"), ("fpn_bottleneck", "fuse")]
        auxiliary = [(f"convs.{i}", f"conv_{i}") for i in range(config.auxiliary_num_convs)]
        auxiliary.append(("conv_cat", "concat"))
        rules: list[Rule] = []
        for head, layers in (("decode_head", decode), ("auxiliary_head", auxiliary)):
            for torch, flax in layers:
                rules.append(rule(f"{head}.{torch}.{self.conv}.weight", f"{head}/{flax}/kernel", CONV))
                rules.extend(batch_norm(f"{head}.{torch}.{self.norm}", f"{head}/{flax}/norm"))
            rules.extend(linear(f"{head}.{self.classifier}", f"{head}/classifier", CONV))
        return tuple(rules)


MMSEG_NAMES = SegmentationNames()
