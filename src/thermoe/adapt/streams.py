"""Which stream is read, and which of its texts: the state of one is live, in the model, the others are parked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from thermoe.adapt.fast_optimizer import FastOptimizer
from thermoe.adapt.reading import HeldText
from thermoe.adapt.stream_state import Learned, Stream, StreamState, most_texts
from thermoe.adapt.update import LEAST_LR_FRAC, Live

DEFAULT_STREAM = "default"


class Streams:
    """The streams of an adapter.

    Args:
        live: fast weights, optimiser and objective, which are those of the present text.
        lr: step size that a new text begins with.
        new_state: makes the state of a text that was not read yet.

    Attributes:
        name: of the present stream.
        by_name: all of them.
    """

    def __init__(self, live: Live, lr: float, new_state: Callable[[], StreamState]) -> None:
        self._live, self._lr, self._new_state = live, lr, new_state
        self._most = most_texts(live.model, live.fast)
        self.name = DEFAULT_STREAM
        self.by_name: dict[str, Stream] = {self.name: Stream([new_state()])}

    @property
    def present(self) -> Stream:
        """The present stream."""
        return self.by_name[self.name]

    def turn_to(self, counts: Tensor) -> Callable[[], None]:
        """Take up the text that a batch with this profile belongs to; a new one begins with the trained routers.

        Returns:
            What undoes that, for a batch that cannot be read; to be called before anything is learned.
        """
        stream = self.present
        texts, at, reads, gone = list(stream.texts), stream.at, stream.reads, stream.gone.copy()
        place = stream.place_of(counts)
        if place != stream.at:
            self._park()
            stream.at = stream.make_room(self._new_state(), self._most) if place is None else place
            self._take_up()
        state, profile, last_read = stream.state, stream.state.profile, stream.state.last_read
        stream.note(counts)

        def undo() -> None:
            state.profile, state.last_read = profile, last_read
            if stream.at != at or stream.texts != texts:
                self._park()
                stream.texts, stream.at = texts, at
                self._take_up()
            stream.reads, stream.gone = reads, gone

        return undo

    def go_to(self, name: str) -> None:
        """Park the present stream and take up another."""
        if name == self.name:
            return
        self._park()
        self.name = name
        self.by_name.setdefault(name, Stream([self._new_state()]))
        self._take_up()

    def _park(self) -> None:
        live = self._live
        self.present.state.parked = Learned.of(live.fast, live.optimizer, live.objective)
        self._clear()

    def _take_up(self) -> None:
        live, state = self._live, self.present.state
        if state.parked is not None:
            state.parked.restore(live.fast, live.optimizer, live.objective)
            state.parked = None

    def _clear(self, lr: float | None = None) -> None:
        live = self._live
        for fast in live.fast.values():
            fast.reset()
        live.optimizer = FastOptimizer(live.fast, live.optimizer.kind, self._lr if lr is None else lr)
        live.objective.reset()

    def reset_text(self) -> None:
        """Return the present text to the trained routers exactly, to learn on with half the step size."""
        self._clear(max(self._live.optimizer.lr / 2, self._lr * LEAST_LR_FRAC))
        self.present.state.forget()

    def reset(self) -> None:
        """Return the present stream to the trained routers exactly, whatever its text."""
        self._clear()
        for text in self.present.texts:
            text.forget()

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of all streams."""
        live = self._live
        return {
            "stream": self.name,
            "streams": {name: stream.state_dict() for name, stream in self.by_name.items()},
            **Learned.of(live.fast, live.optimizer, live.objective).as_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], least_gain_per_j: float | None) -> None:
        """Take up what `state_dict` returned; raises what Python raises where it does not fit."""
        live = self._live
        if set(state["fast"]) != set(live.fast):
            raise ValueError(f"the layers are {', '.join(state['fast'])}")
        held = live.safeguards.judge_tokens_most
        streams = {}
        for name, one in state["streams"].items():
            texts = [StreamState.from_state(text, HeldText(held), least_gain_per_j) for text in one["texts"]]
            streams[name] = Stream(texts, int(one["at"]), int(one["reads"]), Counter(one["gone"]))
            if not 0 <= streams[name].at < len(texts):
                raise ValueError(f"stream {name!r} has {len(texts)} texts and reads number {streams[name].at}")
        if state["stream"] not in streams:
            raise ValueError(f"there is no stream {state['stream']!r}")
        now = Learned(state["fast"], state["optimizer"], state["objective"])
        now.restore(live.fast, live.optimizer, live.objective)
        self.name, self.by_name = state["stream"], streams
