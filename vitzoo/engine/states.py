"""State of model and optimiser as whole tensors by name, also where they are sharded."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vitzoo.engine.checkpoint import Checkpoint, flatten_optimizer, unflatten_optimizer


def model_state(model: nn.Module, *, sharded: bool) -> dict[str, Tensor]:
    """The model's parameters and buffers; of a sharded model whole and on the CPU."""
    model = _bare(model)
    if not sharded:
        return model.state_dict()
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    return get_model_state_dict(model, options=_whole())  # type: ignore[return-value]


def collect(
    model: nn.Module, optimizer: Any, *, sharded: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors under `model.` and `optimizer.`, and the facts that belong to the optimiser."""
    if sharded:
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        state: Any = get_optimizer_state_dict(_bare(model), optimizer.optimizer, options=_whole())
    else:
        state = optimizer.optimizer.state_dict()
    tensors, facts = flatten_optimizer(state)
    named = {f"optimizer.{name}": tensor for name, tensor in tensors.items()}
    named |= {f"model.{name}": t for name, t in model_state(model, sharded=sharded).items()}
    return named, {"optimizer": facts}


def load(model: nn.Module, optimizer: Any, saved: Checkpoint, *, sharded: bool) -> None:
    """Put a checkpoint back into model and optimiser."""
    weights = saved.part("model.")
    state = unflatten_optimizer(saved.part("optimizer."), saved.facts["optimizer"])
    if not sharded:
        _bare(model).load_state_dict(weights)
        optimizer.optimizer.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import (
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    set_model_state_dict(_bare(model), weights, options=_whole())  # type: ignore[arg-type]
    set_optimizer_state_dict(_bare(model), optimizer.optimizer, state, options=_whole())


def _whole() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True)


def _bare(model: nn.Module) -> nn.Module:
    """Without DDP's wrapper."""
    inner = getattr(model, "module", None)
    return inner if isinstance(inner, nn.Module) else model
