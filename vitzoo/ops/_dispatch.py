"""How an operator finds the implementation that serves a call.

An operator is a list of backends, best first. Each backend answers `why_not(...)`, called with the
operator's own arguments, with None or with the sentence that a user reads. `auto` takes the first
backend without an objection; a forced backend that objects raises its sentence. The last backend is
the reference: it serves everything that the operator defines.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitzoo.errors import InputError

logger = logging.getLogger("vitzoo.ops")

OPERATORS: dict[str, Operator] = {}

# Operator name ("*" for all) -> backend forced by `use_backend`, ahead of the environment.
_forced: dict[str, str] = {}
# Read once, at the first call: the variables are settings of a process. Compiled code keeps what it
# was told, without a guard.
_environment: dict[str, str] | None = None
# Stands for a backend where the environment asks for what does not exist.
_REFUSED = "refused"
_reported: set[tuple[str, str]] = set()
Listener = Callable[["Operator", tuple[Any, ...], dict[str, Any], Tensor], None]
_listener: Listener | None = None


def _no_objection(*args: Any, **kwargs: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator, with the operator's signature.

    Attributes:
        name: `reference`, `portable`, `triton`, `products`, `onednn`, `numpy`, or the package that
            computes it (`natten`, `xformers`, `torchvision`).
        run: the implementation.
        why_not: a sentence that says why it cannot serve these arguments, or None.
        auto_skip: a sentence that says why `auto` should prefer another backend although this one
            could serve, or None.
    """

    name: str
    run: Callable[..., Tensor]
    why_not: Callable[..., str | None] = _no_objection
    auto_skip: Callable[..., str | None] = _no_objection


class Operator:
    """A named operator and its backends, best first, the reference last."""

    def __init__(self, name: str, backends: Sequence[Backend]) -> None:
        self.name = name
        self.backends = {backend.name: backend for backend in backends}
        OPERATORS[name] = self

    def __call__(self, *args: Any, backend: str = "auto", **kwargs: Any) -> Tensor:
        """Run the operator; `backend` forces an implementation by name."""
        out = self.select(*args, backend=backend, **kwargs).run(*args, **kwargs)
        if _listener is not None:
            _listener(self, args, kwargs, out)
        return out

    def select(self, *args: Any, backend: str = "auto", **kwargs: Any) -> Backend:
        """The backend that would serve this call.

        Raises:
            ValueError: the name is unknown, or the forced backend cannot serve; the message holds
                the backend's sentence.
        """
        wanted = backend if backend != "auto" else forced_backend(self.name)
        if wanted != "auto":
            reason = self.why_not(wanted, *args, **kwargs)
            if reason is not None:
                raise ValueError(
                    f"{self.name}: backend {wanted!r} cannot serve this call: {reason}"
                )
            return self.backends[wanted]
        for candidate in self.backends.values():
            reason = candidate.why_not(*args, **kwargs) or candidate.auto_skip(*args, **kwargs)
            if reason is None:
                return candidate
            self._report(candidate.name, reason)
        raise ValueError(f"{self.name}: no backend serves this call")

    def why_not(self, backend: str, *args: Any, **kwargs: Any) -> str | None:
        """None if `backend` can serve these arguments, else the reason in a sentence."""
        if backend not in self.backends:
            known = ", ".join(self.backends)
            return f"{self.name} has no backend {backend!r}; it has {known}."
        return self.backends[backend].why_not(*args, **kwargs)

    def _report(self, backend: str, reason: str) -> None:
        # Compilers first: they would guard what has been reported, and compile again after it.
        if torch.compiler.is_compiling() or (self.name, backend) in _reported:
            return
        _reported.add((self.name, backend))
        logger.info("%s: %s is passed over: %s", self.name, backend, reason)


def forced_backend(operator: str) -> str:
    """The backend that `use_backend` or the environment asks for, else `auto`.

    The environment is `VITZOO_BACKEND_<OPERATOR>`, then `VITZOO_BACKEND`, which only binds
    operators that have a backend of that name.
    """
    found = _asked(_forced, operator) or _asked_by_environment(operator) or "auto"
    if found == _REFUSED:
        _settings()
    return found


def _asked(settings: Mapping[str, str], operator: str) -> str | None:
    if operator in settings:
        return settings[operator]
    name = settings.get("*")
    known = name == "auto" or name in OPERATORS[operator].backends
    return name if known else None


# Traced, this would leave a guard on `_environment`, which the first call sets: every model would
# be compiled again at its second call.
@torch.compiler.assume_constant_result
def _asked_by_environment(operator: str) -> str | None:
    try:
        return _asked(_settings(), operator)
    except InputError:
        # Raised by the caller: from here a compiler would make it an error of its own.
        return _REFUSED


def _settings() -> dict[str, str]:
    """Backends that the environment asks for, by operator."""
    global _environment
    if _environment is None:
        _environment = _read_environment()
    return _environment


def replaceable(*operators: str) -> bool:
    """Whether a caller may compute these operators together with layers around them.

    Not where a backend is forced for one of them, or somebody listens to operators.
    """
    return _listener is None and all(forced_backend(name) == "auto" for name in operators)


def _read_environment() -> dict[str, str]:
    prefix = "VITZOO_BACKEND_"
    found = {
        key.removeprefix(prefix).lower(): value
        for key, value in os.environ.items()
        if key.startswith(prefix) and value
    }
    for operator, name in found.items():
        if operator not in OPERATORS:
            known = ", ".join(sorted(OPERATORS))
            raise InputError(f"{prefix}{operator.upper()}: no such operator; known: {known}")
        _check_backend(name, [OPERATORS[operator]], f"{prefix}{operator.upper()}")
    if os.environ.get("VITZOO_BACKEND"):
        found["*"] = os.environ["VITZOO_BACKEND"]
        _check_backend(found["*"], list(OPERATORS.values()), "VITZOO_BACKEND")
    return found


def _check_backend(name: str, asked: Sequence[Operator], where: str) -> None:
    """Raise InputError unless one of the operators has such a backend, or it is `auto`."""
    if name != "auto" and not any(name in op.backends for op in asked):
        known = sorted({backend for op in asked for backend in op.backends})
        raise InputError(f"{where}: no backend {name!r} here; known: {', '.join(known)}")


@contextmanager
def use_backend(name: str, *, operator: str | None = None) -> Iterator[None]:
    """Force a backend inside a `with` block, for one operator or for all that have it.

    Args:
        name: a backend's name, or `auto`.
        operator: an operator's name (`window_attention`, ...); all operators if None.

    Raises:
        ValueError: no operator, or not the one named, has such a backend.
    """
    if operator is not None and operator not in OPERATORS:
        raise ValueError(f"unknown operator {operator!r}; known: {', '.join(sorted(OPERATORS))}")
    asked = [OPERATORS[operator]] if operator else list(OPERATORS.values())
    _check_backend(name, asked, "use_backend")
    key = operator or "*"
    before = _forced.get(key)
    _forced[key] = name
    try:
        yield
    finally:
        if before is None:
            del _forced[key]
        else:
            _forced[key] = before


@contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """Call `listener(operator, args, kwargs, out)` after every operator call inside the block."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before
