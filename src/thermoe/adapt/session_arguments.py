"""What a session may be given, checked once, with what would have been accepted in the refusal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from torch import nn

from thermoe.adapt.session_learning import check_learn
from thermoe.energy.cost_model import CostModel
from thermoe.energy.read_cost import checked_read_cost
from thermoe.energy.work import ModelWork
from thermoe.errors import ConfigError, TelemetryError, UnknownNameError
from thermoe.moe.layer import routed_modules
from thermoe.telemetry.meter import EnergyMeter

Feedback = Literal["auto", "measured", "modelled"]
FEEDBACKS: tuple[Feedback, ...] = get_args(Feedback)


def _refused(name: str, value: object, accepted: str, fix: str | None = None) -> ConfigError:
    return ConfigError(
        f"{name} is {value!r}", where=f"AdaptiveSession({name}=...)", accepted=accepted, fix=fix or f"leave {name} out"
    )


def is_count(value: Any) -> bool:
    """Return whether ``value`` is an integer of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_session_arguments(
    model: Any,
    *,
    meter: Any,
    cost_model: Any,
    read_cost: Any,
    feedback: Any,
    window_s: Any,
    auto_step: Any,
    on_step: Any,
    solve_every: Any,
    router: Any,
    control: Any,
    learn: Any,
) -> None:
    """Look at the arguments of a session, the budget apart.

    Raises:
        ConfigError: one is of the wrong kind or outside its range.
        UnknownNameError: no such feedback.
    """
    if not isinstance(model, nn.Module):
        raise _refused("model", model, "a torch.nn.Module with MoE layers", "give the model itself, loaded")
    if meter is not None and not isinstance(meter, EnergyMeter):
        raise _refused("meter", meter, "an EnergyMeter, or None", 'write meter=EnergyMeter("auto"), or leave it out')
    if cost_model is not None and not isinstance(cost_model, CostModel):
        raise _refused("cost_model", cost_model, "a CostModel, or None")
    # A Hugging Face MoE has no layers to name before it is entered; then they are looked at again.
    if checked_read_cost(read_cost) and next(routed_modules(model), None) is not None:
        ModelWork.of(model, read_cost=read_cost)
    if feedback not in FEEDBACKS:
        raise UnknownNameError.of("feedback", str(feedback), FEEDBACKS, where="AdaptiveSession(feedback=...)")
    is_number = isinstance(window_s, (int, float)) and not isinstance(window_s, bool)
    if not is_number or not math.isfinite(window_s) or not 0 < window_s <= 3600:
        raise _refused("window_s", window_s, "a number of seconds above 0, at most 3600")
    for name, value in (("auto_step", 1 if auto_step is None else auto_step), ("solve_every", solve_every)):
        if not is_count(value):
            raise _refused(name, value, "an integer of at least 1")
    if on_step is not None and not callable(on_step):
        raise _refused("on_step", on_step, "something to call with the metrics of a step, or None")
    for name, options in (("router", router), ("control", control)):
        if options is not None and not (isinstance(options, Mapping) and all(isinstance(key, str) for key in options)):
            raise _refused(name, options, "a mapping of options by name, or None")
    check_learn(learn, model)


def check_shape(batch_size: Any, sequence_length: Any) -> tuple[int, int]:
    """Return the shape of a forward.

    Raises:
        ConfigError: a size is no integer of at least 1.
    """
    if not (is_count(batch_size) and is_count(sequence_length)):
        raise ConfigError(
            f"a forward of {batch_size!r} sequences of {sequence_length!r} positions",
            where="AdaptiveSession.observe",
            accepted="two integers of at least 1",
            fix="write session.observe(*input_ids.shape)",
        )
    return batch_size, sequence_length


def not_open(name: str) -> TelemetryError:
    """Return the error for what only a session inside its with block can do."""
    return TelemetryError(
        "the session is not open",
        where=f"AdaptiveSession.{name}",
        accepted="a session inside its with block",
        fix="write: with AdaptiveSession(model, budget=...) as session: ...",
    )


def open_already() -> TelemetryError:
    """Return the error for entering twice."""
    return TelemetryError(
        "the session is open already",
        where="AdaptiveSession",
        accepted="one with block at a time",
        fix="make another session, or leave this one first",
    )


def inside_on_step(name: str) -> TelemetryError:
    """Return the error for what ``on_step`` may not do."""
    return TelemetryError(
        f"{name} was called inside on_step, which is part of a step",
        where=f"AdaptiveSession.{name}",
        accepted="one step at a time",
        fix="leave the step to whoever runs the model; on_step is given its metrics",
    )


def not_learning() -> ConfigError:
    """Return the error for reading where nothing learns."""
    return ConfigError(
        "the session does not learn",
        where="AdaptiveSession.read",
        accepted="a session with learn=True, options of RouterAdapter, or an adapter",
        fix="write AdaptiveSession(model, budget, learn=True)",
    )
