"""HaloNet's attention layer against timm's, and against the definition at sizes timm refuses."""

from __future__ import annotations

import pytest
import torch
from timm.layers.halo_attn import HaloAttn

from tests.golden_cases import GOLDEN, load_case
from vitzoo.attention.halo import HaloAttention, MaskedHaloAttention
from vitzoo.ops import use_backend

CASES = sorted(path.stem for path in (GOLDEN / "halonet").glob("haloattn_*.json"))


@pytest.mark.parametrize("backend", ["reference", "portable"])
@pytest.mark.parametrize("name", CASES)
def test_golden_layers(name: str, backend: str) -> None:
    case = load_case("halonet", name)
    layer = HaloAttention(**case.spec["reference"]["arguments"]).eval()
    layer.load_state_dict(case.weights())
    assert sum(p.numel() for p in layer.parameters()) == case.spec["params"]
    with torch.inference_mode(), use_backend(backend, operator="halo_attention"):
        case.check("out", layer(case.input()))


def test_every_layer_case_is_there() -> None:
    assert len(CASES) == 8


@pytest.mark.parametrize(
    "arguments",
    [
        {"dim": 32, "dim_head": 8, "num_heads": 4, "halo_size": 2, "stride": 2},
        {"dim": 32, "num_heads": 2, "block_size": 4, "halo_size": 5, "avg_down": True, "stride": 2},
        {"dim": 48, "dim_out": 96, "num_heads": 4, "qk_ratio": 0.33, "block_size": 4},
    ],
)
def test_gradients_are_timms(arguments: dict) -> None:
    torch.manual_seed(0)
    theirs = HaloAttn(**arguments)
    ours = HaloAttention(**arguments)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, arguments["dim"], 16, 8)
    found = []
    for layer in (theirs, ours):
        leaf = x.clone().requires_grad_()
        out = layer(leaf)
        out.square().sum().backward()
        grads = {name: p.grad for name, p in layer.named_parameters()}
        found.append({"out": out.detach(), "x": leaf.grad, **grads})
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-4, atol=2e-4, msg=name)


def test_initialisation() -> None:
    torch.manual_seed(0)
    layer = HaloAttention(256, num_heads=4, dim_head=64)
    assert layer.q.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert layer.kv.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert layer.pos_embed.height_rel.std().item() == pytest.approx(64**-0.5, rel=0.1)


def test_masked_attention_takes_padding_as_zero_tokens() -> None:
    torch.manual_seed(0)
    layer = MaskedHaloAttention(16, 2, block_size=4, halo_size=1).eval()
    x = torch.randn(1, 6, 5, 16)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 3, 0, 2))
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), layer(padded)[:, :6, :5])


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="3 heads do not divide 32"):
        HaloAttention(32, num_heads=3)
    with pytest.raises(ValueError, match="stride must be 1 or 2, got 3"):
        HaloAttention(32, stride=3)
