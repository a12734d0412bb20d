"""Any backbone of the zoo, or of timm, as mmsegmentation's `backbone`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule
from mmseg.registry import MODELS
from torch import Tensor, nn

from vitzoo.backbones._build import name_mismatch
from vitzoo.errors import InputError
from vitzoo.heads.pyramid import Maps
from vitzoo.tasks._models import freeze
from vitzoo.zoo.formats import read_weights, unwrap

_STRIDES = (4, 8, 16, 32)
_BODY = "maps.body.model."


@MODELS.register_module()
class VitzooBackbone(BaseModule):
    """Maps of strides 4 to 32 for mmsegmentation's necks and heads.

    Zoo backbones of several scales are their authors' dense version, output norms included;
    those of one scale feed a simple pyramid. Checkpoints in the authors' names load as they are,
    those of whole segmenters (`load_from`, `init_model`) and, as `pretrained` or
    `init_cfg=dict(type="Pretrained", checkpoint=...)`, those of a classifier.

    Args:
        name: for `timm.create_model`, with or without a weight tag.
        out_indices: which of the four strides to give.
        pretrained: the published weights of the tag, or a file.
        frozen_stages: the stem and the first n stages stay as they are; 0 or less freezes nothing.
        drop_path_rate: stochastic depth.
        with_cp: recompute activations in backward.
        output_norm: mmcv's `norm_cfg` of a norm after each output, for backbones whose authors
            have none.
        args: the backbone's other arguments (`dilations`, `n_win`, ...).
        init_cfg: mmengine's; of type `Pretrained`, or None.

    Raises:
        InputError: a file that does not fit, more stages to freeze than there are.
        ValueError: unknown name, arguments that do not fit, another type of `init_cfg`.
    """

    _is_init: bool  # mmengine's: whether `init_weights` is done.

    def __init__(
        self,
        name: str,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        pretrained: bool | str | None = None,
        frozen_stages: int = -1,
        drop_path_rate: float | None = None,
        with_cp: bool = False,
        output_norm: dict[str, Any] | None = None,
        args: dict[str, Any] | None = None,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        if init_cfg is not None and init_cfg.get("type") != "Pretrained":
            raise ValueError(f"init_cfg is of type Pretrained or None, not {init_cfg}")
        super().__init__(init_cfg=init_cfg)
        arguments = dict(args or {})
        if drop_path_rate is not None:
            arguments["drop_path_rate"] = drop_path_rate
        strides = [_STRIDES[i] for i in out_indices]
        self.maps = Maps(
            name, strides=strides, pretrained=pretrained is True, norm_all=True, **arguments
        )
        self.channels = self.maps.channels
        self.norms = nn.ModuleList(
            build_norm_layer(output_norm, channels)[1] if output_norm else nn.Identity()
            for channels in self.channels
        )
        self.frozen_stages = frozen_stages
        self._frozen = freeze(self.maps.model, stages=max(0, frozen_stages), linear_probe=False)
        if with_cp:
            self.maps.model.set_grad_checkpointing(True)  # type: ignore[operator]
        self.register_load_state_dict_pre_hook(_from_authors)
        if isinstance(pretrained, str):
            self.init_cfg = {"type": "Pretrained", "checkpoint": pretrained}

    def init_weights(self) -> None:
        """Load the file of `init_cfg`; a backbone's own initialisation is done when it is built.

        Raises:
            InputError: no such file, not plain tensors, or it does not fit.
        """
        if self._is_init or self.init_cfg is None:
            return
        file = str(self.init_cfg["checkpoint"])
        model = self.maps.model
        state = authors_names(unwrap(read_weights(Path(file))), model)
        # A deeper network's file fills a shallower one without a word. Names are known of the
        # dense versions; of others timm has taken the head away, and with it more than names say.
        mismatch = name_mismatch(state, model) if getattr(model, "dense", False) else ""
        if mismatch:
            raise InputError(f"{file} does not fit: {mismatch}")
        report = model.load_state_dict(state, strict=False)
        if len(report.missing_keys) > len(model.state_dict()) // 2:
            raise InputError(f"{file} does not fit: {', '.join(report.missing_keys[:3])} missing")
        self._is_init = True

    def train(self, mode: bool = True) -> VitzooBackbone:
        """Training mode, but for the frozen stages."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 3, H, W) -> maps (B, channels[i], H / stride, W / stride)."""
        return tuple(norm(found) for norm, found in zip(self.norms, self.maps(x), strict=True))


def authors_names(state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Parameters of the authors' file under the names of `model`."""
    family = sys.modules[type(model).__module__]
    rename = getattr(family, "checkpoint_filter_fn", None)
    return rename(state, model) if rename is not None else state


def _from_authors(module: Any, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Before loading a segmenter: rename the authors' backbone, in place."""
    mine = [key for key in state_dict if key.startswith(prefix)]
    if not mine or any(key.startswith(prefix + "maps.") for key in mine):
        return
    given = {key.removeprefix(prefix): state_dict.pop(key) for key in mine}
    for key, value in authors_names(given, module.maps.model).items():
        state_dict[prefix + _BODY + key] = value
