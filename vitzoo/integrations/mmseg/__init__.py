"""The zoo's backbones in mmsegmentation 1.2.2: importing this registers them.

In a config::

    custom_imports = dict(imports=["vitzoo.integrations.mmseg"], allow_failed_imports=False)
    custom_hooks = [dict(type="PlainHistoryHook")]
    model = dict(backbone=dict(type="VitzooBackbone", name="vz_davit_tiny", pretrained=True), ...)

With mmcv-lite import this before anything of mmsegmentation that builds models: it puts a small
stand-in in the place of the compiled `mmcv.ops`, with a warning in the log.
"""

from vitzoo.errors import missing_extra
from vitzoo.integrations.mmseg.ops import install_stand_in

try:
    install_stand_in()
    from vitzoo.integrations.mmseg.backbone import VitzooBackbone
    from vitzoo.integrations.mmseg.history import PlainHistoryHook
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in ("mmcv", "mmengine", "mmseg"):
        raise
    raise missing_extra("mmseg", "mmsegmentation") from None

__all__ = ["PlainHistoryHook", "VitzooBackbone", "install_stand_in"]
