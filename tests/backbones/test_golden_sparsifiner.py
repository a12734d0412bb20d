"""Sparsifiner against the authors' code.

Whole models choose connections at margins of about 1e-6 of a row's spread, so another order of
summation may flip some: then at most 0.1 % of the stored mask entries, and logits within 1e-2.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import vitzoo  # noqa: F401
from tests.golden_cases import GoldenCase, load_case
from vitzoo._skeleton import without_memory
from vitzoo.attention.connectivity import Sparsity
from vitzoo.attention.sparse import AttentionRecord, SparseAttention, SparseBlock
from vitzoo.backbones.sparsifiner import Details, Sparsifiner

FLIPPED = 1e-3
AFTER_A_FLIP = 1e-2


def stored_mask(case: GoldenCase, name: str) -> Tensor:
    """A mask kept as packed bits."""
    shape = case.spec["outputs"][name]["shape"]
    bits = np.unpackbits(case.outputs[name], count=int(np.prod(shape)))
    return torch.from_numpy(bits.astype(bool)).view(*shape)


def pretrained(case: GoldenCase, name: str, folder: Path) -> nn.Module:
    """A model through timm's own path for pretrained files."""
    overlay = {"file": str(case.save(folder))}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).eval()


def check_whole_model(case: GoldenCase, logits: Tensor, details: Details) -> None:
    flips, entries = 0, 0
    for i in (0, 11):
        golden = stored_mask(case, f"attn_mask_{i}")
        flips += (details.blocks[i].connectivity.mask != golden).sum().item()
        entries += golden.numel()
    assert flips <= FLIPPED * entries, f"{flips} of {entries} connections differ"
    bounds = {} if flips == 0 else {"bound": AFTER_A_FLIP}
    case.check("logits", logits, **bounds)
    case.check("logits", details.logits, **bounds)
    case.check("features", details.features, **bounds)
    rows = [block.connectivity.mask.float().sum(-1).mean() for block in details.blocks]
    case.check("mask_row_sums", torch.stack(rows))
    shares = details.sparsity()
    case.check("basis_sparsity", shares["basis"][None])
    case.check("basis_coef_sparsity", shares["coefficients"][None])
    case.check("attn_mask_sparsity", shares["mask"][None])


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_authors_file_gives_the_authors_numbers(size: str, tmp_path: Path) -> None:
    case = load_case("sparsifiner", f"sparsifiner_deit_{size}_224")
    model = pretrained(case, f"vz_sparsifiner_deit_{size}", tmp_path)
    assert sum(p.numel() for p in model.parameters()) == case.spec["params"]
    with torch.inference_mode():
        check_whole_model(case, model(case.input()), model.forward_details(case.input()))


def attention_block(case: GoldenCase, **sparsity: object) -> SparseAttention:
    arguments = case.spec["reference"]["kwargs"]
    side = int((arguments["num_tokens"] - 1) ** 0.5)
    settings = Sparsity(
        keep_rate=arguments["attn_keep_rate"],
        token_factor=arguments["reduce_n_factor"],
        channel_factor=arguments["reduce_c_factor"],
        **sparsity,
    )
    block = SparseAttention(
        arguments["dim"], arguments["num_heads"], (side, side), sparsity=settings
    )
    block.load_state_dict(case.weights())
    assert sum(p.numel() for p in block.parameters()) == case.spec["params"]
    return block.eval()


def check_block(case: GoldenCase, record: AttentionRecord) -> None:
    case.check("out", record.out)
    case.check("approx_attn", record.connectivity.score)
    case.check("basis_coef", record.connectivity.coefficients)
    case.check("masked_attn", record.masked_attention)
    assert torch.equal(record.connectivity.mask, stored_mask(case, "attn_mask"))


@pytest.mark.parametrize(
    ("name", "sparsity"),
    [
        ("default", {}),
        ("threshold", {"top_coefficients": None, "score_threshold": 0.04}),
    ],
)
def test_blocks(name: str, sparsity: dict) -> None:
    case = load_case("sparsifiner", f"sparse_attention_{name}")
    block = attention_block(case, **sparsity)
    with torch.inference_mode():
        check_block(case, block.detailed(case.input()))
        case.check("out", block(case.input()))


@pytest.mark.parametrize("rows", [False, True])
def test_block_with_masked_tokens(rows: bool) -> None:
    case = load_case("sparsifiner", "sparse_attention_token_mask" + ("_rows" if rows else ""))
    block = attention_block(case, prune_rows=rows)
    arguments = case.spec["reference"]["kwargs"]
    keep = None
    if arguments["token_pruning_this_layer"]:
        keep = int(np.ceil(arguments["token_keep_rate"] * (arguments["num_tokens"] - 1)))
    live = stored_mask(case, "token_mask_in")
    left = int(live[0].sum())
    with torch.inference_mode():
        record = block.detailed(case.input(), None, live, left=left, keep=keep)
    check_block(case, record)
    assert torch.equal(record.live, stored_mask(case, "token_mask"))


def test_block_that_reconstructs() -> None:
    case = load_case("sparsifiner", "sparse_attention_train_recon")
    block = attention_block(case).train()
    block.reconstruct = True
    with torch.inference_mode():
        check_block(case, block.detailed(case.input()))
        case.check("out", block(case.input()))


@pytest.mark.parametrize(("name", "eps"), [("deit_tiny", 1e-6), ("lvvit_small", 1e-5)])
def test_norms_and_activations(name: str, eps: float) -> None:
    with without_memory():
        model = timm.create_model(f"vz_sparsifiner_{name}")
    assert isinstance(model, Sparsifiner)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            assert module.eps == eps
        if isinstance(module, nn.BatchNorm2d):
            assert module.eps == 1e-5
        if isinstance(module, SparseBlock):
            assert isinstance(module.mlp.act, nn.GELU)
            assert module.mlp.act.approximate == "none"
