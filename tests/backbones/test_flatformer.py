"""FlatFormer on frames of any size and on any grid."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor

import vitzoo
from vitzoo.backbones.flatformer import FlatFormer, encode_position, flatten_windows

GRID = (80, 80)


def draw_pillars(
    counts: tuple[int, ...], *, grid: tuple[int, int] = GRID, channels: int = 16
) -> tuple[Tensor, Tensor]:
    """Features and coordinates of pillars in distinct cells, rows shuffled over the frames."""
    generator = torch.Generator().manual_seed(len(counts))
    coords = []
    for frame, count in enumerate(counts):
        cells = torch.randperm(grid[0] * grid[1], generator=generator)[:count]
        coords.append(
            torch.stack([torch.full_like(cells, frame), cells // grid[1], cells % grid[1]], 1)
        )
    shuffle = torch.randperm(sum(counts), generator=generator)
    features = torch.randn(sum(counts), channels, generator=generator)
    return features, torch.cat(coords)[shuffle]


def small(**kwargs: object) -> FlatFormer:
    torch.manual_seed(0)
    arguments = {"num_heads": 2, "depth": 1, "group_size": 9, "window_size": 5, "grid_size": GRID}
    return FlatFormer(16, **(arguments | kwargs)).eval()


@pytest.mark.parametrize("counts", [(300, 4, 0, 40), (0, 9), (8, 8), (0, 0, 1), (18,)])
def test_a_frame_does_not_depend_on_its_neighbours(counts: tuple[int, ...]) -> None:
    model = small()
    features, coords = draw_pillars(counts)
    with torch.inference_mode():
        bev = model(features, coords, len(counts))
        assert bev.shape == (len(counts), 16, *GRID)
        for frame, count in enumerate(counts):
            mine = coords[:, 0] == frame
            alone = coords[mine] * torch.tensor([0, 1, 1])
            assert (bev[frame] - model(features[mine], alone, 1)[0]).abs().max() <= 1e-6
            assert (bev[frame] != 0).any(0).sum() == count


def test_a_batch_without_pillars_is_a_zero_map() -> None:
    bev = small()(torch.zeros(0, 16), torch.zeros(0, 3, dtype=torch.int64), 2)
    assert bev.shape == (2, 16, *GRID)
    assert not bev.any()


def test_row_order_does_not_matter() -> None:
    model, (features, coords) = small(), draw_pillars((70, 33))
    shuffle = torch.randperm(len(coords))
    with torch.inference_mode():
        expected = model(features, coords, 2)
        torch.testing.assert_close(model(features[shuffle], coords[shuffle], 2), expected)


@pytest.mark.parametrize(
    ("grid", "window"),
    [((100, 40), 13), ((7, 31), 3), ((13, 13), 13), ((40, 23), (5, 2)), ((9, 30), (1, 7))],
)
def test_orders_follow_the_written_keys(
    grid: tuple[int, int], window: int | tuple[int, int]
) -> None:
    """The keys of the reference's formula, with an offset that keeps the frames apart."""
    ny, nx = grid
    frame, cell = torch.arange(2 * ny * nx) // (ny * nx), torch.arange(2 * ny * nx) % (ny * nx)
    coords = torch.stack([frame, cell // nx, cell % nx], 1)
    orders = flatten_windows(coords, grid, window)
    sign = lambda k: 1 - 2 * (k % 2)  # noqa: E731
    wx, wy = (window, window) if isinstance(window, int) else window
    wide = 2 * (-(-max(grid) // min(wx, wy)) + 1)
    for i, order in enumerate(orders):
        major, minor = coords[:, 2] + wx // 2 * (i % 2), coords[:, 1] + wy // 2 * (i % 2)
        long, short = wx, wy
        if i >= 2:
            major, minor, long, short = minor, major, short, long
        row, column = minor // short, major // long
        inside = 2 * short * (major % long) + sign(major % long) * (minor % short)
        key = (wide * row + sign(row) * column) * 4 * wx * wy + sign(row) * inside
        key = key + coords[:, 0] * 10**9
        assert key.unique().numel() == len(key)
        assert order.tolist() == key.argsort().tolist()


def test_position_encoding() -> None:
    coords = torch.tensor([[0, 3, 5], [1, 0, 2]])
    found = encode_position(coords, (8, 6), 18)
    assert found.shape == (2, 18)
    assert not found[:, 16:].any()
    period = 10000 ** (4 / 8)
    torch.testing.assert_close(found[0, 4], torch.tensor(5 / period).sin())
    torch.testing.assert_close(found[0, 8 + 5], torch.tensor(3 / period).cos())
    normal = encode_position(coords, (8, 6), 16, normalize=True)
    torch.testing.assert_close(normal[0, 0], torch.tensor(5 / 6 * 2 * 3.1415).sin())


def test_every_parameter_gets_a_gradient() -> None:
    model, (features, coords) = small(depth=2).train(), draw_pillars((40, 3))
    model(features, coords, 2).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_checkpointing_keeps_the_gradients() -> None:
    features, coords = draw_pillars((40, 3))
    gradients = []
    for enable in (False, True):
        model = small().train()
        model.set_grad_checkpointing(enable)
        model(features, coords, 2).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_compiles_and_takes_other_counts() -> None:
    model = small()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.inference_mode():
        for counts in ((40, 3), (25, 31), (7, 60)):
            features, coords = draw_pillars(counts)
            expected = model(features, coords, 2)
            torch.testing.assert_close(compiled(features, coords, 2), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    features, coords = draw_pillars((40, 3))
    with torch.inference_mode():
        expected = small()(features, coords, 2)
        out = small().to(dtype)(features.to(dtype), coords, 2)
    assert out.dtype == dtype
    assert (out.float() - expected).abs().max() < (0.1 if dtype == torch.bfloat16 else 1e-4)


def test_arguments_are_checked() -> None:
    model, (features, coords) = small(), draw_pillars((10,))
    with pytest.raises(ValueError, match=r"features must be \(P, 16\)"):
        model(features[:, :5], coords, 1)
    with pytest.raises(ValueError, match=r"as \(frame, y, x\)"):
        model(features, coords.float(), 1)
    with pytest.raises(ValueError, match="coords must lie in"):
        model(features, coords + 80, 1)
    with pytest.raises(ValueError, match="no published weights"):
        timm.create_model("vz_flatformer", pretrained=True)
    with pytest.raises(ValueError, match="no classifier"):
        timm.create_model("vz_flatformer", num_classes=10)
    for window in (0, (5, 0), (3, 3, 1)):
        with pytest.raises(ValueError, match="window_size must be one side or two"):
            small(window_size=window)
    with pytest.raises(TypeError):
        timm.create_model("vz_flatformer", halo=3)


def test_record() -> None:
    record = vitzoo.info("vz_flatformer")
    model = timm.create_model("vz_flatformer", device="meta")
    assert record.modality == "points"
    assert sum(p.numel() for p in model.parameters()) == record.params
    assert model.num_features == record.channels[0]
    narrow = timm.create_model("vz_flatformer", in_chans=32, num_heads=4, grid_size=(20, 30))
    assert narrow.grid_size == (20, 30)
