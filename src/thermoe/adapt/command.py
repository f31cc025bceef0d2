"""`thermoe generate`: writes text under a budget, learning from the prompt if asked, and shows live what it costs."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from thermoe.adapt.session import AdaptiveSession
from thermoe.adapt.tally import millijoules
from thermoe.adapt.test_time import AdaptStep
from thermoe.errors import CheckpointError, ConfigError, MachineError
from thermoe.models.attach import attach_router
from thermoe.models.command import find_model, load_tokenizer, unreadable
from thermoe.moe.layer import routed_modules
from thermoe.runtime import choose_device, seed_everything
from thermoe.telemetry.meter import EnergyMeter
from thermoe.telemetry.source import check_by_name

#: Forwards from one step of the session to the next: the display follows, and the device waits that often.
STEP_EVERY = 8


def load_moe(model: str, device: str) -> PreTrainedModel:
    """Load a causal language model whose routers a session can price.

    Raises:
        CheckpointError: it cannot be read, or lacks weights.
        RoutingError: it has no experts.
        ConfigError: the path is wrong.
        MachineError: the hub cannot be reached, or there is not enough memory.
    """
    source = find_model(model)
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True)
    except Exception as error:
        raise unreadable(error, "checkpoint", model) from error
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise CheckpointError(
            f"the checkpoint lacks {len(names)} weights of {type(loaded).__name__}, such as {names[0]}",
            where=model,
            accepted="a checkpoint with every weight of a causal language model; what is missing would be random",
            fix="copy or download it whole",
        )
    if next(routed_modules(loaded), None) is None:
        attach_router(loaded, verbose=False)  # a Hugging Face MoE; a dense model is refused before it is moved
    try:
        return loaded.eval().to(device)
    except torch.OutOfMemoryError as error:
        raise MachineError(
            f"{device} has not enough memory for {model}",
            where="--device",
            accepted="a device that the model fits on",
            fix="use --device cpu, or a smaller model",
        ) from error


class _View(BaseStreamer):
    """Takes the tokens of the first sequence as they come and shows them above a line of numbers.

    On a terminal both are redrawn in place; elsewhere the text is written as it comes, and the numbers at the end.
    """

    def __init__(self, console: Console, tokenizer: Any, live: Live | None) -> None:
        self._console, self._tokenizer, self._live = console, tokenizer, live
        self._ids: list[int] = []
        self._prompt = True
        self._written = 0
        self._numbers: dict[str, Any] = {}

    def put(self, value: Tensor) -> None:
        """Take the prompt, then one token of each sequence."""
        self._ids += value[0].flatten().tolist() if value.ndim > 1 else [int(value[0])]
        if self._prompt:
            self._prompt = False
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if self._live is not None:
            self._live.update(self._drawn(text))
        elif not text.endswith("\ufffd"):  # half of a character
            self._write(text)

    def end(self) -> None:
        """End the text."""
        if self._live is None:
            self._write(self._tokenizer.decode(self._ids, skip_special_tokens=True))
            self._console.print()

    def show(self, metrics: dict[str, Any]) -> None:
        """Take the numbers of a step."""
        self._numbers = metrics
        if self._live is not None:
            self._live.update(self._drawn(self._tokenizer.decode(self._ids, skip_special_tokens=True)))

    def _write(self, text: str) -> None:
        self._console.print(text[self._written :], end="", markup=False, highlight=False, soft_wrap=True)
        self._written = max(self._written, len(text))

    def _drawn(self, text: str) -> Group:
        rows = max(3, self._console.size.height - 6)
        lines = text.splitlines()[-rows:]
        return Group(Text("\n".join(lines)), Text(status_line(self._numbers), style="reverse"))


def status_line(metrics: dict[str, Any]) -> str:
    """Return the numbers of a step in one line: decode's where there are some, else those of the prompt."""
    if not metrics:
        return "reading the prompt"
    phase = "decode" if metrics["decode/tokens"] else metrics["phase"]
    get = {name.partition("/")[2]: value for name, value in metrics.items() if name.startswith(f"{phase}/")}
    measured = get["j_per_token_measured"]
    modelled = get["j_per_token_modelled"]
    if measured is None and modelled is None:
        return f"{get['state']} | reading the prompt"
    joules = (
        f"{millijoules(modelled)} {metrics['provenance_modelled']}"
        if measured is None
        else f"{millijoules(measured)} {get['provenance']}"
    )
    parts = [str(get["state"]), f"price {get['price']:.3g} nats/J"]
    if get["distinct_experts"] is not None:
        parts.append(f"{get['distinct_experts']:.1f} experts open, {get['experts_per_token']:.2f} per token")
    parts.append(joules)
    units = {"power_w": "W", "temp_c": "C"}
    sensed = [f"{metrics[name]:.0f} {unit}" for name, unit in units.items() if metrics[name] is not None]
    if sensed:
        parts.append(f"{', '.join(sensed)} {metrics['provenance_sensors']}")
    return " | ".join(parts)


def run_generate(
    console: Console,
    model: str,
    *,
    prompt: str,
    budget: dict[str, float],
    max_new_tokens: int = 128,
    batch: int = 1,
    greedy: bool = False,
    adapt: bool = False,
    telemetry: str = "auto",
    device: str = "auto",
    seed: int = 0,
) -> dict[str, Any]:
    """Generate and return the metrics of the last step; see `thermoe generate --help`.

    Raises:
        ConfigError: an option or the budget is outside its range, or there is no tokenizer.
        CheckpointError: MODEL cannot be read, or not wholly.
        RoutingError: MODEL has no experts.
        MachineError: the hub or the device cannot be had.
    """
    check_by_name(telemetry)
    chosen = choose_device(device)
    words = load_tokenizer(find_model(model))
    if words is None:
        raise ConfigError(
            "there is no tokenizer beside the model",
            where="MODEL",
            accepted="a folder with a tokenizer, or a model on the hub that has one",
            fix="save it there: AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER)",
        )
    loaded = load_moe(model, chosen.name)
    seed_everything(seed)
    rows = words([prompt] * batch, return_tensors="pt", add_special_tokens=True)
    ids, longest = rows.input_ids.to(chosen.name), getattr(loaded.config, "max_position_embeddings", None)
    if not ids.shape[1] or (longest is not None and ids.shape[1] + max_new_tokens > longest):
        raise ConfigError(
            f"the prompt has {ids.shape[1]} tokens, and {max_new_tokens} are to follow",
            where="--prompt",
            accepted="at least 1 token" + (f", and no more than {longest} in all" if longest else ""),
            fix="give another prompt, or lower --max-new-tokens",
        )
    if adapt and ids.shape[1] < 2:
        raise ConfigError(
            "there is nothing to learn from in a prompt of 1 token",
            where="--adapt",
            accepted="a prompt of at least 2 tokens; of a few hundred for learning to be of use",
            fix="give a longer prompt, or leave --adapt out",
        )
    on_boards = None if chosen.name == "cpu" else [loaded.device]
    with EnergyMeter(telemetry, devices=on_boards if telemetry in ("auto", "nvml") else None) as meter:
        live = Live(console=console, refresh_per_second=8) if console.is_terminal else None
        view = _View(console, words, live)
        session = AdaptiveSession(
            loaded, budget or None, meter=meter, auto_step=STEP_EVERY, on_step=view.show, learn=adapt
        )
        read: AdaptStep | None = None
        try:
            with session:
                if live is not None:
                    live.start()
                try:
                    if adapt:  # one row: the others are the same text, and it is not to be judged by itself
                        read = session.read(ids[:1], served=False)
                    loaded.generate(
                        ids,
                        attention_mask=torch.ones_like(ids),
                        max_new_tokens=max_new_tokens,
                        do_sample=not greedy,
                        streamer=view,
                        pad_token_id=words.pad_token_id if words.pad_token_id is not None else words.eos_token_id,
                    )
                    if session.pending:
                        session.step()
                finally:
                    if live is not None:
                        live.stop()
        except KeyboardInterrupt:  # typer ends the program with exit code 130
            console.print("\ninterrupted")
            if session.tally.steps:
                console.print(_summary(session, chosen.reason, read))
            raise
        console.print(_summary(session, chosen.reason, read))
    return session.metrics


def learning_lines(read: AdaptStep) -> list[tuple[str, str]]:
    """Return what learning from the prompt came to: its loss before, and what is known of the difference."""
    tokens = int(read.tokens.sum())
    rows = [("prompt", f"{float(read.sequence_nll.sum()) / tokens:.4g} nats/token before learning, {tokens} tokens")]
    if read.judged is not None:
        found = read.judged
        error = "" if found.se is None else f"standard error {found.se:.2g}, "
        told = f"{found.mean:+.4g} nats/token by learning ({error}{found.tokens} tokens)"
        rows.append(("  held-back part", told))
    rows.append(("  update", read.verdict + (f": {read.reason}" if read.reason else "")))
    return rows


def _summary(session: AdaptiveSession, device: str, read: AdaptStep | None) -> Table:
    table = Table(title="what it took", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("device", Text(device))
    for line in session.report().splitlines():
        name, _, value = line.partition(": ")
        table.add_row(Text(name), Text(value))
    for name, value in [] if read is None else learning_lines(read):
        table.add_row(Text(name), Text(value))
    return table
