"""LookupViT's invariants: there is no reference to compare with, so these are the specification."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import vitzoo  # noqa: F401
from vitzoo._skeleton import without_memory
from vitzoo.attention import lookup as lookup_layers
from vitzoo.attention.lookup import Gather, Infuse, LookupBlock
from vitzoo.backbones.lookupvit import checkpoint_filter_fn, resize_map

DIM, HEADS, DEPTH = 64, 4, 3


def tiny(**kwargs: Any) -> nn.Module:
    """A narrow model with every parameter away from its special initial value."""
    torch.manual_seed(0)
    shape = {"embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS, "num_classes": 10}
    model = timm.create_model("vz_lookupvit_small", **shape, **kwargs).eval()
    for p in model.parameters():
        nn.init.normal_(p, mean=float(p.dim() == 1) * 0.1, std=0.1)
    return model


def images(*size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def gmacs(model: nn.Module) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    return counter.get_total_flops() / 2e9


class Products(TorchDispatchMode):
    """Records the operand shapes of every batched product."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[torch.Size, torch.Size]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bmm.default:
            self.shapes.append((args[0].shape[1:], args[1].shape[1:]))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def captured() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What every block of the next forward returns."""
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, args: Any, out: Any) -> None:
        if isinstance(module, LookupBlock):
            seen.append(out)

    handle = torch.nn.modules.module.register_module_forward_hook(keep)
    yield seen
    handle.remove()


@pytest.mark.parametrize("side", [3, 5, 7, 10])
@pytest.mark.parametrize("size", [(224, 224), (256, 192), (512, 512)])
def test_shapes_after_every_block(
    side: int, size: tuple[int, int], captured: list[tuple[Tensor, Tensor]]
) -> None:
    with torch.no_grad():
        tiny()(images(*size, batch=1), compressed_size=side)
    assert len(captured) == DEPTH
    for lookup, compressed in captured:
        assert lookup.shape == (1, size[0] // 16, size[1] // 16, DIM)
        assert compressed.shape == (1, side * side, DIM)


def test_similarity_is_computed_once_per_block() -> None:
    m, n, d = 25, 196, DIM // HEADS
    with torch.no_grad(), Products() as products:
        tiny()(images(224, 224))
    with_both = [s for s in products.shapes if {m, n} <= {*s[0], *s[1]}]
    assert with_both.count(((m, d), (d, n))) == DEPTH
    assert with_both.count(((m, n), (n, d))) == DEPTH
    assert with_both.count(((n, m), (m, d))) == DEPTH
    assert len(with_both) == 3 * DEPTH


@pytest.mark.parametrize(
    ("name", "side", "expected"),
    [
        ("vz_lookupvit_small", 3, 1.71),
        ("vz_lookupvit_base", 3, 6.67),
        ("vz_lookupvit_base", 5, 8.47),
        ("vz_lookupvit_base", 7, 11.18),
        ("vz_lookupvit_base", 10, 17.01),
        ("vz_lookupvit_large", 5, 29.71),
    ],
)
def test_cost_is_the_formulas(name: str, side: int, expected: float) -> None:
    with without_memory():
        model = timm.create_model(name, compressed_size=side).eval()
    assert gmacs(model) == pytest.approx(expected, rel=0.02)


def test_base_costs_less_than_half_of_vit_base() -> None:
    with without_memory():
        ours = timm.create_model("vz_lookupvit_base").eval()
        theirs = timm.create_model("vit_base_patch16_224").eval()
    assert gmacs(theirs) / gmacs(ours) >= 2.0


def test_weights_of_both_directions_come_from_one_similarity() -> None:
    model, seen = tiny(), {}

    def keep_gather(module: Gather, args: Any, out: Any) -> None:
        seen["gather"] = out[1]

    def keep_infuse(module: Infuse, args: Any) -> None:
        seen["infuse"] = args[2]

    model.blocks[0].gather.register_forward_hook(keep_gather)
    model.blocks[0].infuse.register_forward_pre_hook(keep_infuse)
    with torch.no_grad():
        model(images(64, 96))
    assert seen["gather"].shape == (2, HEADS, 20, 24)
    assert torch.equal(seen["gather"], seen["infuse"])


def test_same_weights_at_any_compressed_size() -> None:
    weights = tiny().state_dict()
    x, outputs = images(224, 224), []
    for side in (3, 5, 7, 10):
        model = tiny(compressed_size=side)
        model.load_state_dict(weights)
        with torch.no_grad():
            outputs.append(model(x))
            other = tiny()
            other.set_compressed_size(side)
            assert torch.equal(other(x), outputs[-1])
            assert torch.equal(tiny()(x, compressed_size=side), outputs[-1])
    assert all(not torch.equal(a, b) for a, b in pairwise(outputs))


@pytest.mark.parametrize("size", [(14, 14), (2, 5)])
def test_full_grid_is_the_identity(size: tuple[int, int]) -> None:
    tokens = torch.randn(2, *size, DIM)
    assert torch.equal(resize_map(tokens, size), tokens)


def test_full_grid_starts_from_the_lookup_tokens() -> None:
    model = tiny(compressed_size=14)
    tokens = torch.randn(2, 14, 14, DIM)
    lookup, compressed = model.token_sets(tokens, model.pos_embed)
    assert torch.equal(lookup.flatten(1, 2), compressed)


@pytest.mark.parametrize(
    ("size", "tokens"), [((32, 32), 4), ((33, 64), 12), ((48, 400), 15), ((97, 131), 25)]
)
def test_compressed_grid_is_no_larger_than_the_lookup_grid(
    size: tuple[int, int], tokens: int, captured: list[tuple[Tensor, Tensor]]
) -> None:
    with torch.no_grad():
        tiny()(images(*size, batch=1))
    assert captured[-1][1].shape[1] == tokens


def test_padding_is_right_and_bottom_zeros() -> None:
    model, x = tiny(), images(50, 77)
    padded = torch.zeros(2, 3, 64, 80)
    padded[..., :50, :77] = x
    with torch.no_grad():
        assert torch.equal(model(x), model(padded))


def test_permuting_the_batch_permutes_the_logits() -> None:
    model, x = tiny(), images(96, 64, batch=4)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        torch.testing.assert_close(model(x[order]), model(x)[order], rtol=1e-5, atol=1e-6)
        assert torch.equal(model(x), model(x))


def block_gradients(block: LookupBlock) -> dict[str, bool]:
    """Whether each output of two stacked blocks depends on each input."""
    lookup = torch.randn(1, 6, 6, DIM, requires_grad=True)
    compressed = torch.randn(1, 9, DIM, requires_grad=True)
    out = block(*block(lookup, compressed))
    depends = {}
    for name, y in zip(("lookup", "compressed"), out, strict=True):
        grads = torch.autograd.grad(
            y.square().sum(), (lookup, compressed), retain_graph=True, allow_unused=True
        )
        for source, grad in zip(("lookup", "compressed"), grads, strict=True):
            depends[f"{name} from {source}"] = grad is not None and bool(grad.abs().max() > 0)
    return depends


def test_zeroed_projections_separate_the_two_sets() -> None:
    block = tiny().blocks[0]
    assert all(block_gradients(block).values())
    for p in block.gather.proj.parameters():
        nn.init.zeros_(p)
    depends = block_gradients(block)
    assert not depends["compressed from lookup"]
    assert depends["lookup from compressed"]
    block = tiny().blocks[0]
    for p in block.infuse.proj.parameters():
        nn.init.zeros_(p)
    depends = block_gradients(block)
    assert not depends["lookup from compressed"]
    assert depends["compressed from lookup"]


def vit(**kwargs: Any) -> nn.Module:
    torch.manual_seed(2)
    model = timm.create_model(
        "vit_small_patch16_224", embed_dim=DIM, depth=DEPTH, num_heads=HEADS, **kwargs
    ).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model


def test_vit_weights_as_a_start(tmp_path: Path) -> None:
    source = vit().state_dict()
    torch.save(source, tmp_path / "vit.pth")
    model = timm.create_model(
        "vz_lookupvit_small",
        embed_dim=DIM,
        depth=DEPTH,
        num_heads=HEADS,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "vit.pth")},
    ).eval()
    found = model.state_dict()
    ours = {
        **{k: k for k in source if not k.startswith(("head.", "cls_token", "pos_embed"))},
        "head.weight": "head.fc.weight",
        "head.bias": "head.fc.bias",
    }
    for theirs, name in ours.items():
        assert torch.equal(found[name], source[theirs]), name
    assert torch.equal(found["pos_embed"], source["pos_embed"][:, 1:])
    assert source.keys() - ours.keys() == {"cls_token", "pos_embed"}
    # Nothing is added to the lookup tokens yet: they leave as they entered.
    with torch.no_grad():
        x = images(224, 224)
        lookup, _ = model.token_sets(model.patch_embed(x), model.pos_embed)
        maps = model.forward_intermediates(x, norm=False, intermediates_only=True)
    assert torch.equal(maps[-1].permute(0, 2, 3, 1), lookup)


def test_new_parameters_are_the_listed_ones() -> None:
    model = tiny()
    kept = {k.replace("head.", "head.fc.") for k in vit().state_dict()} - {"cls_token"}
    new = {name for name in model.state_dict() if name not in kept}
    parts = (".gather.", ".infuse.", ".mlp_lookup.", ".norm_lookup.")
    assert all(any(part in f".{name}" for part in parts) for name in new)
    assert kept <= model.state_dict().keys()


def test_deits_file_is_a_start(tmp_path: Path) -> None:
    shape = {"embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS, "num_classes": 10}
    source = timm.create_model("deit_base_patch16_224", **shape)
    torch.save({"model": source.state_dict()}, tmp_path / "deit.pth")
    overlay = {"file": str(tmp_path / "deit.pth"), "num_classes": 10}
    model = timm.create_model(
        "vz_lookupvit_base.deit_start", pretrained=True, pretrained_cfg_overlay=overlay, **shape
    )
    assert torch.equal(model.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)
    assert torch.equal(model.pos_embed, source.pos_embed[:, 1:])


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "vit_base_patch16_384"])
def test_timms_vit_base_fits(name: str) -> None:
    with without_memory():
        source = timm.create_model(name).state_dict()
        model = timm.create_model("vz_lookupvit_base")
        weights = checkpoint_filter_fn(source, model)
    assert {k: v.shape for k, v in weights.items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }


def test_draws_depend_on_the_step_alone() -> None:
    sides = (3, 5, 7, 10)
    one, two = (tiny(compressed_sizes=sides).train() for _ in range(2))
    with pytest.raises(ValueError, match="draw_compressed_size"):
        one(images(224, 224))
    drawn = [one.draw_compressed_size(step) for step in range(40)]
    torch.manual_seed(99)
    assert [two.draw_compressed_size(step) for step in range(40)] == drawn
    assert set(drawn) == set(sides)
    x = images(224, 224)
    with torch.no_grad():
        assert torch.equal(one(x), one(x, compressed_size=drawn[-1]))
        assert torch.equal(one.eval()(x), one(x, compressed_size=5))


@pytest.mark.parametrize("side", [0, 15])
def test_impossible_grids_are_refused_wherever_they_are_given(side: int) -> None:
    model, x = tiny(), images(64, 64)
    message = f"compressed size {side} is not between 1 and 14"
    for call in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(ValueError, match=message):
            call(x, compressed_size=side)
    with pytest.raises(ValueError, match=message):
        model.set_compressed_size(side)


def test_the_training_loops_call_draws_where_there_is_a_choice() -> None:
    flexible, fixed = tiny(compressed_sizes=(3, 5, 7)), tiny()
    for update in range(5):
        flexible.begin_update(update)
        drawn = flexible.token_sets.drawn
        assert drawn == flexible.draw_compressed_size(update)
    fixed.begin_update(0)
    assert fixed.token_sets.drawn is None


def test_compressed_pool_trains_what_it_reads() -> None:
    model = tiny(pool="compressed").train()
    model(images(64, 64)).square().mean().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    features = model.forward_features(images(64, 64))
    assert torch.equal(features, features[..., :1, :1].expand_as(features))


def test_pooled_features_are_the_mean_of_both_means(
    captured: list[tuple[Tensor, Tensor]],
) -> None:
    model = tiny()
    with torch.no_grad():
        pooled = model.forward_head(model.forward_features(images(64, 96)), pre_logits=True)
        lookup, compressed = captured[-1]
        expected = model.norm(compressed).mean(1) + model.norm_lookup(lookup).mean((1, 2))
    torch.testing.assert_close(pooled, expected / 2, rtol=1e-5, atol=1e-6)


def test_features_only_are_normed_lookup_tokens(captured: list[tuple[Tensor, Tensor]]) -> None:
    shape = {"embed_dim": DIM, "depth": 8, "num_heads": HEADS}
    extractor = timm.create_model("vz_lookupvit_small", features_only=True, **shape).eval()
    with torch.no_grad():
        maps = extractor(images(64, 96))
        for found, block in zip(maps, (1, 3, 5, 7), strict=True):
            normed = extractor.model.norm_lookup(captured[block][0])
            assert torch.equal(found, normed.permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"compressed_size": 0}, "compressed size 0 "),
        ({"compressed_size": 15}, "compressed size 15 .* 14"),
        ({"compressed_sizes": (3, 20)}, "compressed size 20 "),
        ({"pool": "token"}, "'token'"),
        ({"reuse": "sum"}, "'sum'"),
        ({"num_heads": 5}, "num_heads 5"),
    ],
)
def test_impossible_arguments_are_refused(wrong: dict[str, Any], message: str) -> None:
    shape = {"embed_dim": DIM, "depth": 1, "num_heads": HEADS}
    with pytest.raises(ValueError, match=message):
        timm.create_model("vz_lookupvit_small", **{**shape, **wrong})


@pytest.mark.parametrize("reuse", ["logits", "weights"])
@pytest.mark.parametrize(("side", "folded"), [(3, True), (5, True), (10, False)])
def test_few_compressed_tokens_take_the_projections(
    side: int, folded: bool, reuse: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without gradients the lookup tokens' keys, values and update are not projected one by one.
    torch.manual_seed(3)
    block = LookupBlock(256, 4, reuse=reuse).eval()
    for p in block.parameters():
        nn.init.normal_(p, mean=float(p.dim() == 1) * 0.1, std=0.06)
    calls: list[str] = []
    for name in ("folded_similarity", "folded_gather", "folded_infuse"):
        step = getattr(lookup_layers, name)

        def counted(*args: Any, step: Any = step, name: str = name, **kwargs: Any) -> Tensor:
            calls.append(name)
            return step(*args, **kwargs)

        monkeypatch.setattr(lookup_layers, name, counted)
    lookup, compressed = torch.randn(2, 14, 14, 256), torch.randn(2, side * side, 256)
    expected = [t.detach() for t in block(lookup, compressed)]
    assert not calls
    with torch.inference_mode():
        found = block(lookup, compressed)
        assert len(calls) == (3 if folded else 0)
        # Whoever listens to a layer finds it called.
        heard: list[str] = []
        block.gather.kv.register_forward_hook(lambda *_: heard.append("kv"))
        block.infuse.proj.register_forward_hook(lambda *_: heard.append("proj"))
        block(lookup, compressed)
    assert heard == ["kv", "proj"]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_sides_that_an_image_may_be_built_for() -> None:
    model = timm.create_model("vz_lookupvit_small", depth=1, img_size=(64, 64)).eval()
    assert model.token_sets.compressed_size == 4
    assert model(torch.randn(1, 3, 96, 64)).shape == (1, 1000)
    with pytest.raises(ValueError, match="square"):
        timm.create_model("vz_lookupvit_small", depth=1, img_size=(64, 96))
    with pytest.raises(ValueError, match="between 1 and 4"):
        timm.create_model("vz_lookupvit_small", depth=1, img_size=64, compressed_size=5)


def test_maps_train_what_a_classifier_of_compressed_tokens_leaves_alone() -> None:
    arguments = {"depth": 2, "pool": "compressed", "features_only": True, "out_indices": (0, 1)}
    model = timm.create_model("vz_lookupvit_small", **arguments)
    sum(x.square().mean() for x in model(torch.randn(1, 3, 32, 32))).backward()
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())
