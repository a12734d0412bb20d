# DiNAT_s-Small (arXiv 2209.15001). Published: 48.6 mIoU,
# 49.9 with several scales. Dilations are the authors' for this task; they hold no parameters.
_base_ = ["./_base_/upernet_160k.py"]
model = dict(
    backbone=dict(
        name="vz_dinat_s_small", pretrained=True, drop_path_rate=0.3, args=dict(dilations="ade20k")
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    paramwise_cfg=dict(custom_keys={"rpb": dict(decay_mult=0.0), "norm": dict(decay_mult=0.0)}),
)
