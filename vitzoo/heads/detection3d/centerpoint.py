"""The CenterPoint head: a heatmap of centres and a box at each."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from vitzoo.heads.detection3d.neck import conv3x3

HEATMAP_BIAS = -2.19


class Branch(nn.Sequential):
    """A hidden 3x3 convolution and the 3x3 convolution that gives one quantity."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__(conv3x3(in_dim, in_dim), nn.Conv2d(in_dim, dim, 3, padding=1))


class CenterHead(nn.Module):
    """One 3x3 convolution shared by all branches, then a branch per quantity.

    Branches: `reg` offset of the centre in its cell (x, y), `height` of the centre in metres, `dim`
    log of length, width, height, `rot` sine and cosine of the heading, `vel` velocity (x, y), `iou`
    the overlap that the box is expected to have, `heatmap` a logit per class.

    Args:
        in_dim: channels of the map.
        num_classes: object classes.
        dim: channels of the shared and hidden convolutions.
        velocity: whether there is a velocity branch.
        iou: whether there is an overlap branch.
    """

    def __init__(
        self,
        in_dim: int,
        num_classes: int,
        *,
        dim: int = 64,
        velocity: bool = True,
        iou: bool = True,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.shared = conv3x3(in_dim, dim, eps=1e-3, momentum=0.01)
        sizes = {"reg": 2, "height": 1, "dim": 3, "rot": 2}
        sizes |= {"vel": 2} if velocity else {}
        sizes |= {"iou": 1} if iou else {}
        sizes["heatmap"] = num_classes
        self.branches = nn.ModuleDict({name: Branch(dim, size) for name, size in sizes.items()})
        self.init_weights()

    def init_weights(self) -> None:
        """Kaiming's normal initialisation; the heatmap starts at a tenth."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.constant_(self.branches["heatmap"][1].bias, HEATMAP_BIAS)  # type: ignore[index]

    def forward(self, x: Tensor, *, skip: Collection[str] = ()) -> dict[str, Tensor]:
        """(B, in_dim, H, W) -> branch -> (B, k, H, W), raw; branches in `skip` are left out."""
        x = self.shared(x)
        return {name: branch(x) for name, branch in self.branches.items() if name not in skip}
