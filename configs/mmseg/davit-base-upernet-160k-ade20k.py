# DaViT-B (arXiv 2204.03645). Published: 49.4 mIoU at 512, whole
# images, one scale.
_base_ = ["./_base_/upernet_160k.py"]
model = dict(
    backbone=dict(name="vz_davit_base.msft_in1k", pretrained=True, drop_path_rate=0.3),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
