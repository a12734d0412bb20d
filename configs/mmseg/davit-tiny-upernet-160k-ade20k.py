# DaViT-T (arXiv 2204.03645). Published: 46.3 mIoU at 512, whole
# images, one scale.
_base_ = ["./_base_/upernet_160k.py"]
model = dict(
    backbone=dict(name="vz_davit_tiny.msft_in1k", pretrained=True, drop_path_rate=0.3),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
