"""A backbone's maps, a decoder and, in training, an auxiliary classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vitzoo.heads.pyramid import Maps
from vitzoo.heads.segmentation.decoders import AuxiliaryHead, Decoder, build_decoder
from vitzoo.ops._sides import overhang

STRIDES = (4, 8, 16, 32)
_PREFIX = "backbone.body.model."


class Segmenter(nn.Module):
    """Logits for every pixel, at any image size.

    Args:
        backbone: images -> maps at strides 4, 8, 16 and 32, with `channels`.
        decoder: maps -> logits.
        auxiliary: classifier on the map of stride 16; used in training only.
    """

    def __init__(
        self, backbone: Maps, decoder: Decoder, auxiliary: AuxiliaryHead | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder
        self.auxiliary = auxiliary

    def forward(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        """Images (B, 3, H, W) -> logits (B, classes, H, W).

        Images are padded with zeros right and bottom to multiples of 32, logits cropped. With an
        auxiliary head training gives `{"out": ..., "aux": ...}`, both of the images' size.
        """
        H, W = images.shape[-2:]
        padded = F.pad(images, (0, overhang(W, 32), 0, overhang(H, 32)))
        maps = self.backbone(padded)
        logits: Tensor = self.decoder(padded, maps)
        logits = logits[..., :H, :W]
        if self.auxiliary is None or not self.training:
            return logits
        coarse = self.auxiliary(maps[2])
        # Logits grow in float32: half precision would round the interpolated differences.
        aux = F.interpolate(coarse.float(), padded.shape[-2:], mode="bilinear")
        return {"out": logits, "aux": aux[..., :H, :W]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's activations in backward."""
        self.backbone.model.set_grad_checkpointing(enable)  # type: ignore[operator]

    def no_weight_decay(self) -> set[str]:
        """The backbone's parameters without weight decay, under their names here."""
        # Not all of timm's models have any.
        own: Any = getattr(self.backbone.model, "no_weight_decay", set)
        return {f"{_PREFIX}{name}" for name in own()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups of the backbone; decoder and classifiers are the last group."""
        return self.backbone.layer_groups(_PREFIX, coarse=coarse)


def build_segmenter(
    name: str,
    *,
    head: str = "upernet",
    num_classes: int,
    pretrained: bool = False,
    aux: bool = False,
    head_args: Mapping[str, Any] | None = None,
    **backbone_args: Any,
) -> Segmenter:
    """A segmenter over a backbone of the zoo or of timm.

    Args:
        name: for `timm.create_model`; a zoo backbone of several scales is its authors' dense
            version, one of a single scale feeds a simple pyramid.
        head: `upernet`, `fpn`, `segformer`, `dpt` or `unet`.
        num_classes: channels of the logits: the labels of the data, its background among them if
            it has one.
        pretrained: load published weights into the backbone.
        aux: add the auxiliary classifier.
        head_args: widths of the decoder under segmentation-models-pytorch's names.
        **backbone_args: for the backbone, such as `dilations="ade20k"`.

    Raises:
        ValueError: unknown head or name, arguments that do not fit, a backbone without the four
            strides.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    backbone = Maps(name, strides=STRIDES, pretrained=pretrained, norm_all=True, **backbone_args)
    decoder = build_decoder(head, backbone.channels, num_classes, **(head_args or {}))
    auxiliary = AuxiliaryHead(backbone.channels[2], num_classes) if aux else None
    return Segmenter(backbone, decoder, auxiliary)
