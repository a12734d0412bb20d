"""segmentation-models-pytorch's decoders, fed with four maps instead of one of its encoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from vitzoo.errors import missing_extra
from vitzoo.heads.segmentation.pooling import AdaptiveAvgPool2d

Maps = list[Tensor]


class Decoder(nn.Module):
    """A decoder and its classifier, both SMP's.

    Args:
        decoder: of SMP.
        classifier: from the decoder's map to logits at the image's size.
        feed: (decoder, image, maps) -> the decoder's map; SMP's decoders differ in what they want.
    """

    def __init__(
        self,
        decoder: nn.Module,
        classifier: nn.Module,
        feed: Callable[[nn.Module, Tensor, Maps], Tensor],
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.classifier = classifier
        self._feed = feed

    def forward(self, images: Tensor, maps: Maps) -> Tensor:
        """Images (B, 3, H, W), sides multiples of 32, and their maps -> (B, classes, H, W)."""
        logits: Tensor = self.classifier(self._feed(self.decoder, images, maps))
        return logits


def _levels(decoder: nn.Module, images: Tensor, maps: Maps) -> Tensor:
    """SMP counts levels from stride 1; a network of stages has nothing at stride 2."""
    B, _, H, W = images.shape
    result: Tensor = decoder([images, images.new_empty(B, 0, H // 2, W // 2), *maps])
    return result


def _reassembled(decoder: nn.Module, images: Tensor, maps: Maps) -> Tensor:
    """DPT takes maps and, from plain ViTs, class tokens."""
    result: Tensor = decoder(maps, [None] * len(maps))
    return result


def _upernet(channels: Sequence[int], classes: int, *, decoder_channels: int = 256) -> Decoder:
    from segmentation_models_pytorch.base import SegmentationHead
    from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

    decoder = UPerNetDecoder(_smp(channels), decoder_channels=decoder_channels)
    for block in decoder.psp.blocks:
        block[0] = AdaptiveAvgPool2d(block[0].output_size)
    return Decoder(
        decoder, SegmentationHead(decoder_channels, classes, kernel_size=1, upsampling=4), _levels
    )


def _fpn(
    channels: Sequence[int],
    classes: int,
    *,
    pyramid_channels: int = 256,
    segmentation_channels: int = 128,
    dropout: float = 0.1,
) -> Decoder:
    from segmentation_models_pytorch.base import SegmentationHead
    from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder

    decoder = FPNDecoder(
        _smp(channels),
        pyramid_channels=pyramid_channels,
        segmentation_channels=segmentation_channels,
        dropout=dropout,
    )
    classifier = SegmentationHead(decoder.out_channels, classes, kernel_size=1, upsampling=4)
    return Decoder(decoder, classifier, _levels)


def _segformer(
    channels: Sequence[int], classes: int, *, segmentation_channels: int = 256
) -> Decoder:
    from segmentation_models_pytorch.base import SegmentationHead
    from segmentation_models_pytorch.decoders.segformer.decoder import SegformerDecoder

    decoder = SegformerDecoder(_smp(channels), segmentation_channels=segmentation_channels)
    classifier = SegmentationHead(segmentation_channels, classes, kernel_size=1, upsampling=4)
    return Decoder(decoder, classifier, _levels)


def _dpt(
    channels: Sequence[int],
    classes: int,
    *,
    intermediate_channels: Sequence[int] = (256, 512, 1024, 1024),
    fusion_channels: int = 256,
) -> Decoder:
    from segmentation_models_pytorch.decoders.dpt.decoder import DPTDecoder, DPTSegmentationHead

    decoder = DPTDecoder(
        channels,
        [4, 8, 16, 32],
        encoder_has_prefix_tokens=False,
        readout="ignore",
        intermediate_channels=intermediate_channels,
        fusion_channels=fusion_channels,
    )
    return Decoder(decoder, DPTSegmentationHead(fusion_channels, classes), _reassembled)


def _unet(
    channels: Sequence[int],
    classes: int,
    *,
    decoder_channels: Sequence[int] = (256, 128, 64, 32, 16),
) -> Decoder:
    from segmentation_models_pytorch.base import SegmentationHead
    from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder

    decoder = UnetDecoder(_smp(channels), decoder_channels=decoder_channels)
    return Decoder(decoder, SegmentationHead(decoder_channels[-1], classes, kernel_size=3), _levels)


def _smp(channels: Sequence[int]) -> list[int]:
    return [3, 0, *channels]


HEADS: dict[str, Callable[..., Decoder]] = {
    "upernet": _upernet,
    "fpn": _fpn,
    "segformer": _segformer,
    "dpt": _dpt,
    "unet": _unet,
}


def build_decoder(head: str, channels: Sequence[int], classes: int, **head_args: Any) -> Decoder:
    """One of SMP's decoders over maps of `channels` at strides 4, 8, 16 and 32.

    Args:
        head: a key of `HEADS`.
        channels: of the four maps, finest first.
        classes: channels of the logits.
        **head_args: widths; SMP's names and defaults.

    Raises:
        ValueError: unknown head, or arguments that it does not take.
        InputError: segmentation-models-pytorch is not installed.
    """
    if head not in HEADS:
        raise ValueError(f"unknown head {head!r}; known: {', '.join(HEADS)}")
    try:
        import segmentation_models_pytorch  # noqa: F401
    except ImportError:
        raise missing_extra("seg", "segmentation-models-pytorch") from None
    try:
        return HEADS[head](list(channels), classes, **head_args)
    except TypeError as error:
        raise ValueError(f"head arguments do not fit {head}: {error}") from None


class AuxiliaryHead(nn.Sequential):
    """A convolutional classifier on one map, for a second loss (PSPNet, arXiv 1612.01105)."""

    def __init__(self, channels: int, classes: int, *, dim: int = 256) -> None:
        super().__init__(
            nn.Conv2d(channels, dim, 3, padding=1, bias=False),
            nn.BatchNorm2d(dim),
            nn.ReLU(inplace=True),
            nn.Dropout2d(0.1),
            nn.Conv2d(dim, classes, 1),
        )
