"""Sparsifiner's own promises: pruning, sizes, phases, starting points."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import vitzoo  # noqa: F401
from vitzoo.attention.choices import record_choices, replay_choices
from vitzoo.backbones.sparsifiner import PHASES, Sparsifiner
from vitzoo.zoo.errors import WeightsError

PRUNING = {"pruning_blocks": (1, 2, 3), "token_keep_rate": 0.7}


def small(**kwargs: object) -> Sparsifiner:
    """A narrow net whose predictors choose by what they see, as trained ones do."""
    torch.manual_seed(0)
    arguments = {"embed_dim": 96, "depth": 4, "num_heads": 3, "img_size": 112, "num_classes": 10}
    model = timm.create_model("vz_sparsifiner_deit_tiny", **arguments | kwargs).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("proj_n", "proj_back_n")) or ".proj_c" in name or "qkv" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def images(*size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def assert_close(found: Tensor, expected: Tensor, bound: float = 1e-5) -> None:
    scale = max(1.0, expected.abs().max().item())
    assert (found - expected).abs().max().item() <= bound * scale


@pytest.mark.parametrize("size", [(112, 112), (75, 130)])
@pytest.mark.parametrize("keep_rate", [0.25, 0.9])
def test_removed_tokens_equal_masked_tokens(size: tuple[int, int], keep_rate: float) -> None:
    model = small(keep_rate=keep_rate, **PRUNING)
    x = images(*size)
    with torch.no_grad():
        masked = model.forward_details(x)
        removed = model.forward_details(x, attention=False)
        tokens = model.forward_features(x)
        assert_close(model(x), masked.logits)
    assert masked.blocks[0].live is None
    patches = masked.features.shape[1]
    for i, block in enumerate(masked.blocks[1:], start=1):
        assert block.live.sum(1).tolist() == [math.ceil(0.7**i * patches)] * 2
    assert torch.equal(removed.live, masked.live)
    assert_close(removed.features, masked.features)
    assert_close(tokens[:, 1:], masked.features)
    # A pruned token is zero before the last norm.
    pruned = tokens[:, 1:][~masked.live]
    assert torch.equal(pruned, model.norm.bias.expand_as(pruned))


def test_removed_tokens_are_exact_in_float64() -> None:
    model, x = small(**PRUNING).double(), images(112, 112).double()
    with torch.no_grad():
        assert_close(model(x), model.forward_details(x).logits, 1e-12)


def test_removed_tokens_train_like_masked_tokens() -> None:
    model = small(**PRUNING).train()
    x = images(112, 112)
    weights = [p for p in model.parameters() if p.requires_grad]
    removed = torch.autograd.grad(model(x).square().sum(), weights)
    masked = torch.autograd.grad(model.forward_details(x).logits.square().sum(), weights)
    for a, b in zip(removed, masked, strict=True):
        assert_close(a, b, 1e-4)


@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_trains_its_parts_only(phase: str | None) -> None:
    model = small()
    model.set_phase(phase)
    predictor, body = PHASES[phase]
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (predictor if ".mask_predictor." in name else body)


def test_reconstruction_keeps_all_tokens_and_is_dense_in_train_mode() -> None:
    model = small(**PRUNING)
    x = images(112, 112)
    unpruned = small()
    unpruned.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert not torch.allclose(model(x), unpruned(x), atol=1e-2)
        model.set_phase("attn_recon")
        assert torch.equal(model(x), unpruned(x))
        details = model.train().forward_details(x)
        assert_close(model(x), details.logits)
    assert details.live is None
    for block in details.blocks:
        assert torch.equal(block.masked_attention, block.attention)


def test_a_pass_leaves_no_state_behind() -> None:
    model = small(**PRUNING)
    with torch.no_grad():
        before = model(images(112, 112))
        model(images(32, 32))
        model(images(75, 130))
        assert torch.equal(model(images(112, 112)), before)


def test_the_patches_bound_the_budget_behind_a_block_that_prunes_none() -> None:
    # The authors' mask exists from the first pruning block on: its class column is no patch.
    arguments = {"depth": 3, "keep_rate": 1.0, "pruning_blocks": (0,), "token_keep_rate": 0.7}
    model = timm.create_model("vz_sparsifiner_deit_tiny", **arguments).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        details = model.forward_details(x)
        torch.testing.assert_close(model(x), details.logits)
    counts = [
        block.connectivity.mask[:, :, 1].sum(-1).unique().tolist() for block in details.blocks
    ]
    assert counts == [[17], [16], [16]]


def test_the_budget_counts_all_tokens() -> None:
    model = small(keep_rate=[0.1, 0.25, 0.5, 1.0])
    with torch.no_grad():
        details = model.forward_details(images(100, 160))
    for block, keys in zip(details.blocks, (8, 18, 36, 71), strict=True):
        rows = block.connectivity.mask.sum(-1)
        assert torch.equal(rows[:, :, 1:], torch.full_like(rows[:, :, 1:], keys))
        assert torch.equal(rows[:, :, 0], torch.full_like(rows[:, :, 0], 71))


def test_recorded_choices_replay() -> None:
    model = small(**PRUNING)
    x = images(112, 112)
    with torch.no_grad():
        with record_choices() as choices:
            expected = model(x)
        with replay_choices(choices):
            found = model.double()(x.double())
    assert_close(found.float(), expected)


def test_other_sizes_keep_the_class_row_and_the_basis() -> None:
    model = small()
    x = images(80, 144)
    with torch.no_grad():
        expected = model(x)
        row = model.pos_embed[:, :1].clone()
        model.set_input_size((80, 144))
        assert model.pos_embed.shape == (1, 46, 96)
        assert torch.equal(model.pos_embed[:, :1], row)
        assert model.blocks[0].attn.mask_predictor.proj_n.shape == (46, 8)
        assert_close(model(x), expected)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("size", [(144, 144), (80, 144)])
def test_a_file_of_another_size_keeps_its_basis(
    shared: bool, size: tuple[int, int], tmp_path: Path
) -> None:
    sparsity = {"sparsity": {"shared_tables": shared}}
    trained = small(**sparsity)
    torch.save({"model": trained.state_dict()}, tmp_path / "trained.pth")
    overlay = {"file": str(tmp_path / "trained.pth"), "num_classes": 10}
    loading = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    other = small(img_size=size, **sparsity)
    rows = other.blocks[0].attn.mask_predictor.proj_n.shape[1]
    # Not `small`, which draws new tables.
    arguments = {"embed_dim": 96, "depth": 4, "num_heads": 3, "num_classes": 10}
    loaded = timm.create_model(
        "vz_sparsifiner_deit_tiny", img_size=size, **arguments, **sparsity, **loading
    ).eval()
    predictor = loaded.blocks[0].attn.mask_predictor
    assert predictor.proj_n.shape[1] == 8 != rows
    assert (predictor.proj_n is predictor.proj_back_n) == shared
    assert not predictor.proj_n.requires_grad
    x = images(*size)
    with torch.no_grad():
        expected = trained(x)
        found = loaded(x)
        trained.set_input_size(size)
        assert torch.equal(trained(x), found)
    assert_close(found, expected)
    # What it saves goes back into a new model of its size, as when a run is resumed.
    parameter = other.blocks[0].attn.mask_predictor.proj_n
    other.load_state_dict(loaded.state_dict())
    assert other.blocks[0].attn.mask_predictor.proj_n is parameter
    with torch.no_grad():
        assert torch.equal(other(x), found)


def test_tables_that_fit_no_grid_are_refused(tmp_path: Path) -> None:
    weights = small().state_dict()
    # A distilled DeiT's second token.
    weights["pos_embed"] = torch.zeros(1, 51, 96)
    torch.save(weights, tmp_path / "odd.pth")
    with pytest.raises(WeightsError, match=r"pos_embed is \(1, 51, 96\) in the file"):
        small(
            img_size=96,
            pretrained=True,
            pretrained_cfg_overlay={"file": str(tmp_path / "odd.pth")},
        )


def test_dense_file_starts_the_body(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arguments = {"embed_dim": 96, "depth": 2, "num_heads": 3, "num_classes": 10}
    torch.manual_seed(0)
    dense = timm.create_model("deit_tiny_patch16_224", img_size=96, **arguments).eval()
    torch.save({"model": dense.state_dict()}, tmp_path / "deit.pth")
    overlay = {"file": str(tmp_path / "deit.pth"), "num_classes": 10}
    with caplog.at_level(logging.WARNING):
        model = timm.create_model(
            "vz_sparsifiner_deit_tiny",
            pretrained=True,
            pretrained_cfg_overlay=overlay,
            img_size=96,
            # With all connections kept it is the dense model.
            keep_rate=1.0,
            **arguments,
        ).eval()
    assert "untrained" in caplog.text
    x = images(96, 96)
    with torch.no_grad():
        assert_close(model(x), dense(x))
        # From 6x6 to 14x14 patches.
        wider = timm.create_model(
            "vz_sparsifiner_deit_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **arguments
        )
    assert wider.pos_embed.shape == (1, 197, 96)
    assert torch.equal(wider.pos_embed[0, 0], dense.pos_embed[0, 0])


def test_auxiliary_head() -> None:
    model = small(aux_head=True)
    x = images(112, 112)
    with torch.no_grad():
        details = model.forward_details(x, attention=False)
        tokens = model.forward_features(x)
        plain = model.head(tokens[:, 0])
        assert_close(details.features, model.aux_head(tokens[:, 1:]))
        assert_close(model(x), plain + 0.5 * details.features.amax(1))
        model.reset_classifier(3)
        assert model(x).shape == (2, 3)
        assert torch.equal(model.train()(x), model.head(model.forward_features(x)[:, 0]))
    with pytest.raises(ValueError, match="auxiliary head"):
        small(aux_head=True, **PRUNING)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep_rate": [0.5, 0.5]}, "2 values for 4 blocks"),
        ({"keep_rate": 0.0}, "keep_rate"),
        ({"pruning_blocks": (4,), "token_keep_rate": 0.5}, "blocks 0 to 3"),
        ({"token_keep_rate": 1.5}, "token_keep_rate"),
        ({"sparsity": {"score_threshold": -1.0}}, "score_threshold"),
    ],
)
def test_impossible_settings_raise(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**arguments)
