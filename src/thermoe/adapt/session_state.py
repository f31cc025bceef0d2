"""The saved state of a session: read whole, or refused whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from thermoe.errors import CheckpointError

#: 2: with what learning has spent, and what it learned.
STATE_VERSION = 2
_PARTS = {"prices", "levied_j", "levy", "controller", "tally"}


def take_up(state: Any, take: Callable[[Mapping[str, Any]], None]) -> None:
    """Look at a saved state and hand it to ``take``.

    Raises:
        CheckpointError: it is no state of this version, or ``take`` cannot read it.
    """
    if not isinstance(state, Mapping) or state.get("version") != STATE_VERSION or not set(state) >= _PARTS:
        raise CheckpointError(
            f"a session state of version {state.get('version')!r} with {', '.join(map(str, state)) or 'nothing'}"
            if isinstance(state, Mapping)
            else f"{type(state).__name__} is given as a session state",
            where="AdaptiveSession.load_state_dict",
            accepted=f"what state_dict returned, version {STATE_VERSION}",
            fix="start afresh, without the state",
        )
    try:
        take(state)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"the session state cannot be taken up: {type(error).__name__}: {error}",
            where="AdaptiveSession.load_state_dict",
            accepted="what state_dict returned",
            fix="start afresh, without the state",
        ) from error
