"""`linear` through oneDNN: the same numbers, never stale weights, a choice that can be repeated."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitzoo.attention.layers import Linear, Mlp
from vitzoo.ops import OPERATORS, linear, linear_choices, linear_gelu, set_linear_choices
from vitzoo.ops import use_backend as forced
from vitzoo.ops._derived import kept_views

linear_module = import_module("vitzoo.ops.linear")  # The function has its name.
BIG = (256, 160, 128)  # rows, in, out: enough work for `auto` to consider oneDNN


@pytest.fixture(autouse=True)
def everything_through_onednn() -> Iterator[None]:
    """Whatever this machine would choose."""
    before = linear_choices()
    set_linear_choices(dict.fromkeys(before, "onednn"))
    yield
    set_linear_choices(before)


def tensors(*leading: int, width: int = 24, out: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*leading, width, generator=generator)
    return x, torch.randn(out, width, generator=generator), torch.randn(out, generator=generator)


def chosen(*args: Any, operator: str = "linear") -> str:
    return OPERATORS[operator].select(*args).name


@pytest.mark.parametrize("leading", [(1,), (7,), (2, 1, 1), (2, 7, 9), (1, 13, 30)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_forward_and_gradients_equal_the_reference(leading: tuple, with_bias: bool) -> None:
    x, weight, bias = tensors(*leading)
    inputs = [t.clone().requires_grad_() for t in ((x, weight, bias) if with_bias else (x, weight))]
    expected = F.linear(*inputs)
    found = linear(*inputs, backend="onednn")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        packed = linear(*inputs, backend="onednn")
        fused = linear_gelu(*inputs, backend="onednn")
    torch.testing.assert_close(packed, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused, F.gelu(expected.detach()), rtol=1e-5, atol=1e-5)
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, inputs, cotangent)
    for a, b in zip(torch.autograd.grad(found, inputs, cotangent), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_strided_inputs() -> None:
    x, weight, bias = tensors(6, 5, 2)
    with torch.no_grad():
        for view in (x.transpose(0, 1), x[:, ::2], x[..., :12].expand(6, 5, 2, 12)):
            w = weight[:, : view.shape[-1]]
            found = linear(view, w, bias, backend="onednn")
            torch.testing.assert_close(found, F.linear(view, w, bias), rtol=1e-5, atol=1e-5)


def test_second_derivatives() -> None:
    x, weight, bias = (t.requires_grad_() for t in tensors(9))

    def second(run: Callable[..., Tensor]) -> Tensor:
        (grad,) = torch.autograd.grad(run(x, weight, bias).tanh().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), weight)[0]

    found = second(lambda *args: linear(*args, backend="onednn"))
    torch.testing.assert_close(found, second(F.linear), rtol=1e-4, atol=1e-4)


def in_place(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.weight.mul_(2)


def through_data(layer: nn.Linear) -> None:
    layer.weight.data.mul_(2)


def load(layer: nn.Linear) -> None:
    layer.load_state_dict({k: v * 2 for k, v in layer.state_dict().items()})


def assign(layer: nn.Linear) -> None:
    layer.load_state_dict({k: v * 2 for k, v in layer.state_dict().items()}, assign=True)


def there_and_back(layer: nn.Linear) -> None:
    layer.double()
    in_place(layer)
    layer.float()


def new_data(layer: nn.Linear) -> None:
    layer.weight.data = layer.weight.data * 2


def row_through_data(layer: nn.Linear) -> None:
    layer.weight.data[layer.out_features // 3] = 0


def column_through_numpy(layer: nn.Linear) -> None:
    layer.weight.detach().numpy()[:, 5] = 9


def optimiser(layer: nn.Linear) -> None:
    layer(torch.randn(300, layer.in_features)).square().sum().backward()
    torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True).step()


@pytest.mark.parametrize(
    "change",
    [
        in_place,
        through_data,
        row_through_data,
        column_through_numpy,
        load,
        assign,
        there_and_back,
        new_data,
        optimiser,
    ],
)
def test_packed_weights_are_never_stale(change: Callable[[nn.Linear], None]) -> None:
    rows, width, out = BIG
    layer, x = Linear(width, out), torch.randn(rows, width)
    with torch.no_grad():
        before = layer(x)
        assert chosen(x, layer.weight, layer.bias) == "onednn"
    change(layer)
    with torch.no_grad():
        after = layer(x)
        expected = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)
    assert (after - before).abs().max() > 1e-2


def test_copies_have_their_own_packed_weights() -> None:
    rows, width, out = BIG
    layer, x = Linear(width, out), torch.randn(rows, width)
    with torch.inference_mode():
        before = layer(x)
    twin = copy.deepcopy(layer)
    in_place(twin)
    with torch.inference_mode():
        assert torch.equal(layer(x), before)
        expected = F.linear(x, twin.weight, twin.bias)
        torch.testing.assert_close(twin(x), expected, rtol=1e-5, atol=1e-5)
    assert layer.state_dict().keys() == nn.Linear(width, out).state_dict().keys()


def test_weights_made_in_inference_mode() -> None:
    rows, width, out = BIG
    with torch.inference_mode():
        layer, x = Linear(width, out), torch.randn(rows, width)
        layer(x)
        layer.weight.mul_(2)
        expected = F.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_auto_leaves_everything_else_to_torch() -> None:
    x, weight, bias = (t.detach() for t in tensors(4096, width=96, out=96))
    assert chosen(x, weight, bias) == "onednn"
    assert chosen(x[:3], weight, bias) == "reference"
    for other in (x.bfloat16(), x.double(), x.to("meta")):
        w, b = weight.to(other), bias.to(other)
        assert chosen(other, w, b) == "reference"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert chosen(x, weight, bias) == "reference"
    with FlopCounterMode(display=False) as counter:
        linear(x, weight, bias)
    assert counter.get_total_flops() == 2 * 4096 * 96 * 96


def test_transforms_see_torchs_linear() -> None:
    x, weight, bias = tensors(256, width=160, out=128)
    _, tangent = torch.func.jvp(lambda v: linear(v, weight, bias), (x,), (x,))
    torch.testing.assert_close(tangent, x @ weight.T, rtol=1e-5, atol=1e-4)
    found = torch.vmap(lambda v: linear(v, weight, bias))(x.unflatten(0, (2, 128)))
    expected = F.linear(x, weight, bias)
    torch.testing.assert_close(found.flatten(0, 1), expected, rtol=1e-5, atol=1e-4)


def test_compile_and_export_keep_torchs_linear() -> None:
    layer, x = Mlp(160, 128).eval(), torch.randn(256, 160)
    program = torch.export.export(layer, (x,))
    assert "mkldnn" not in str(program.graph)
    with torch.no_grad():
        expected = layer(x)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(program.module()(x), expected, rtol=1e-5, atol=1e-5)


def test_reference_gives_stock_linears() -> None:
    x, weight, bias = tensors(256, width=160, out=128)
    with forced("reference", operator="linear"):
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
        assert chosen(x, weight, bias, operator="linear_gelu") == "reference"
    assert chosen(x, weight, bias, operator="linear_gelu") == "onednn"
    with pytest.raises(ValueError, match="float32"):
        linear(x.double(), weight.double(), bias.double(), backend="onednn")


def test_mlp_serves_whoever_listens_or_replaces_a_layer() -> None:
    mlp, x, seen = Mlp(160, 128).eval(), torch.randn(256, 160), []
    with torch.no_grad():
        expected = mlp.fc2(F.gelu(mlp.fc1(x)))
        torch.testing.assert_close(mlp(x), expected, rtol=1e-5, atol=1e-5)
        handle = mlp.fc1.register_forward_hook(lambda *args: seen.append(args[2]))
        mlp(x)
        handle.remove()
        mlp.act = nn.ReLU()
        relu = mlp.fc2(F.relu(mlp.fc1(x)))
        torch.testing.assert_close(mlp(x), relu, rtol=1e-5, atol=1e-5)
    assert len(seen) == 1


def test_choices_are_made_once_and_can_be_repeated() -> None:
    state = torch.get_rng_state()
    set_linear_choices(None)
    first = linear_choices()
    assert linear_choices() == first
    assert torch.equal(torch.get_rng_state(), state)
    set_linear_choices(first)
    assert linear_choices() == first
    with pytest.raises(ValueError, match="inference/wide"):
        set_linear_choices({k: v for k, v in first.items() if k != "inference/wide"})
    with pytest.raises(ValueError, match="mkl"):
        set_linear_choices(dict.fromkeys(first, "mkl"))


def test_choices_are_timed_under_any_default_dtype_and_device() -> None:
    set_linear_choices(None)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert set(linear_choices().values()) <= {"onednn", "reference"}
    finally:
        torch.set_default_dtype(before)


def test_shapes_that_do_not_fit_get_torchs_message() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(torch.zeros(4096, 64), torch.zeros(512, 65))


def test_nan_and_empty_inputs() -> None:
    x, weight, bias = tensors(5)
    x[2, 3] = float("nan")
    with torch.no_grad():
        found = linear(x, weight, bias, backend="onednn")
        assert found[2].isnan().all()
        assert found[[0, 1, 3, 4]].isfinite().all()
        assert linear(x[:0], weight, bias).shape == (0, 40)


def test_inference_takes_onednn_where_the_blas_leaves_half_of_the_vectors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear_module, "_CLEAR_WIN", float("inf"))
    for narrow, inference in ((True, "onednn"), (False, "reference")):
        monkeypatch.setattr(linear_module, "_blas_is_narrow", lambda narrow=narrow: narrow)
        set_linear_choices(None)
        found = linear_choices()
        assert {v for k, v in found.items() if k.startswith("inference")} == {inference}
        assert {v for k, v in found.items() if k.startswith("training")} == {"reference"}


def test_views_of_a_weight_are_packed_once() -> None:
    rows, width, out = BIG
    weight, x = nn.Parameter(torch.randn(2 * out, width)), torch.randn(rows, width)

    def halves(w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return w[:out], w[out:]

    with torch.inference_mode():
        views = kept_views(halves, (weight,))
        assert all(a is b for a, b in zip(views, kept_views(halves, (weight,)), strict=True))
        found = torch.cat([linear(x, view) for view in views], -1)
        torch.testing.assert_close(found, F.linear(x, weight), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        weight.mul_(2)
        found = torch.cat([linear(x, view) for view in kept_views(halves, (weight,))], -1)
        torch.testing.assert_close(found, F.linear(x, weight), rtol=1e-5, atol=1e-5)
    assert all(view.requires_grad for view in kept_views(halves, (weight,)))
    gone = weakref.ref(weight)
    del weight
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("operator", [linear, linear_gelu])
@torch.no_grad()
def test_a_bias_that_is_a_view(operator: Any) -> None:
    # oneDNN reads a bias by its address: every other number, and one number for all.
    x, weight = torch.randn(60, 32), torch.randn(48, 32)
    for bias in (torch.randn(96)[::2], torch.randn(1).expand(48)):
        expected = operator(x, weight, bias, backend="reference")
        torch.testing.assert_close(operator(x, weight, bias, backend="onednn"), expected)


def test_what_torch_broadcasts_stays_with_torch() -> None:
    x, weight = torch.randn(60, 32), torch.randn(48, 32)
    for given in ((x, weight, torch.randn(1)), (x, weight, torch.randn(1, 48)), (x, weight[0])):
        assert OPERATORS["linear"].why_not("onednn", *given) is not None
