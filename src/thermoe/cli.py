"""The command line: thin, with heavy imports inside the commands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from thermoe import __version__
from thermoe.errors import MachineError, ThermoeError

app = typer.Typer(
    name="thermoe",
    help="Mixture-of-Experts language models that route by the joule.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
if TYPE_CHECKING:
    from rich.console import Console

    from thermoe.results import RunFolder

_state = {"debug": False}


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"thermoe {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    _state["debug"] = debug


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run folder; must be new or empty.")] = Path("runs/demo"),
    preset: Annotated[
        str, typer.Option(help="Which configuration to start from: demo (minutes) or smoke (seconds).")
    ] = "demo",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; may be repeated.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    telemetry: Annotated[
        str | None, typer.Option(help="Telemetry source: auto, off, or a name; simulated is never chosen by itself.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Take up an interrupted run in the same folder.")] = False,
    show_config: Annotated[bool, typer.Option("--show-config", help="Print every setting and stop.")] = False,
) -> None:
    """Convert, route, train, adapt and compare on real text, and write a report.

    Trains a small dense GPT-2 on the embedded prose, converts it to a Mixture-of-Experts, and reads the stream
    prose -> code -> prose with the dense model, the baseline router, the energy-aware router, and the energy-aware
    router with test-time training. Needs no network.
    """
    import yaml

    from thermoe.compare.spec import load_spec

    overrides = list(set_ or [])
    if device is not None:
        overrides.append(f"device={device}")
    if telemetry is not None:
        overrides.append(f"telemetry={telemetry}")
    spec = load_spec(preset, overrides)
    if show_config:
        typer.echo(yaml.safe_dump(spec.as_dict(), sort_keys=False).rstrip())
        return
    _quiet_libraries()
    from rich.console import Console

    from thermoe.compare.runner import run_comparison
    from thermoe.progress import Reporter

    console = Console()
    reporter = Reporter(console)
    reporter.say(
        "This trains a small GPT-2 on prose, converts it to a Mixture-of-Experts, and compares four ways to run it on "
        "prose, then code, then prose again.\n"
    )
    try:
        run = run_comparison(spec, out, command="demo", resume=resume, reporter=reporter)
    except KeyboardInterrupt:  # typer ends the program with exit code 130
        typer.echo("interrupted; give the same command with --resume to go on", err=True)
        raise
    _show_results(console, run)


@app.command()
def compare(
    preset: Annotated[str, typer.Option(help="A name from `thermoe list presets`.")] = "collapse",
    out: Annotated[Path | None, typer.Option(help="Run folder; must be new or empty. [default: runs/PRESET]")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; may be repeated.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Take up an interrupted run in the same folder.")] = False,
    show_config: Annotated[bool, typer.Option("--show-config", help="Print every setting and stop.")] = False,
) -> None:
    """Compare arms: a study (collapse, shift), or the arms of a stream (demo, smoke), and write a report.

    The study `collapse` trains one small MoE with no cure and with each cure of routing collapse, from a balanced and
    from a collapsed start, over several seeds, and holds what happens against what the theory predicts. The study
    `shift` reads a stream whose domain changes with routers frozen, adapted, and adapted under a budget of energy, and
    with all weights adapted.
    """
    from thermoe.compare.shift_spec import ShiftSpec, load_shift, shift_names
    from thermoe.compare.study_spec import load_study, study_names

    folder = out or Path("runs") / preset
    if preset not in (*study_names(), *shift_names()):
        demo(out=folder, preset=preset, set_=set_, resume=resume, show_config=show_config)
        return
    import yaml

    spec = load_shift(preset, set_) if preset in shift_names() else load_study(preset, set_)
    if show_config:
        typer.echo(yaml.safe_dump(spec.as_dict(), sort_keys=False).rstrip())
        return
    _quiet_libraries()
    from rich.console import Console

    from thermoe.compare.shift import run_shift
    from thermoe.compare.study import run_study
    from thermoe.progress import Reporter

    console = Console()
    try:
        if isinstance(spec, ShiftSpec):
            run = run_shift(spec, folder, name=preset, resume=resume, reporter=Reporter(console))
        else:
            run = run_study(spec, folder, name=preset, resume=resume, reporter=Reporter(console))
    except KeyboardInterrupt:  # typer ends the program with exit code 130
        typer.echo("interrupted; give the same command with --resume to go on", err=True)
        raise
    _show_results(console, run)


@app.command()
def train(
    preset: Annotated[
        str | None, typer.Option(help="cpu-small (minutes, the default), smoke, recovery or gpu-convergence.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file in the place of a preset.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; may be repeated.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/train"),
    resume: Annotated[str, typer.Option(help="auto goes on with an interrupted run in the folder; never.")] = "auto",
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the text, instead of steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    report_to: Annotated[str | None, typer.Option(help="none, tensorboard, wandb, trackio or all installed.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    telemetry: Annotated[str | None, typer.Option(help="Telemetry source: auto, off, or a name.")] = None,
    show_config: Annotated[bool, typer.Option("--show-config", help="Print every setting and stop.")] = False,
) -> None:
    """Train a model with experts, or a dense one, on local text; convert one and recover it.

    Logs losses, perplexity, bits per byte, collapse and joules to rows.jsonl and, with --report-to, to a dashboard. An
    interrupted run goes on from its last checkpoint and ends with the same weights.
    """
    import yaml

    from thermoe.errors import UnknownNameError
    from thermoe.training.spec import load_spec

    if resume not in ("auto", "never"):
        raise UnknownNameError.of("way to resume", resume, ("auto", "never"), where="--resume")
    given = {
        "training.steps": steps,
        "training.epochs": epochs,
        "seed": seed,
        "report_to": report_to,
        "device": device,
        "telemetry": telemetry,
    }
    overrides = [*(set_ or []), *(f"{key}={value}" for key, value in given.items() if value is not None)]
    if steps is not None and epochs is None:
        overrides.append("training.epochs=null")
    spec = load_spec(preset, config, overrides)
    if show_config:
        typer.echo(yaml.safe_dump(spec.as_dict(), sort_keys=False).rstrip())
        return
    _quiet_libraries()
    from rich.console import Console

    from thermoe.progress import Reporter
    from thermoe.report import build_report, summary_table
    from thermoe.training.run import run_training

    console = Console()
    try:
        run = run_training(spec, out, resume=resume, reporter=Reporter(console))  # type: ignore[arg-type]
    except KeyboardInterrupt:  # typer ends the program with exit code 130
        typer.echo("interrupted; give the same command again, with --resume auto, to go on", err=True)
        raise
    page = build_report(run.path)
    console.print(summary_table(run.path, width=console.width))
    _print_path(console, "model: ", run.path / "model")
    _print_path(console, "report:", page)
    _print_path(console, "rows:  ", run.path / "rows.jsonl")


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="A folder written by save_pretrained, or a name on the hub.")],
    out: Annotated[Path, typer.Argument(help="Folder for the MoE model; must be new or empty.")],
    method: Annotated[str, typer.Option(help="partition, copy or virtual.")] = "partition",
    experts: Annotated[int, typer.Option(help="Experts per layer.")] = 8,
    top_k: Annotated[int | None, typer.Option(help="Experts per token; half of them for partition by default.")] = None,
    layers: Annotated[str | None, typer.Option(help="Blocks to convert, such as 0,2,5-7; all by default.")] = None,
    router: Annotated[str, typer.Option(help="A name from `thermoe list routers`.")] = "topk",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Such as neurons=clustered, or a router's option; repeats."),
    ] = None,
    tokenizer: Annotated[bool, typer.Option(help="Save the tokenizer with the model.")] = True,
    seed: Annotated[int, typer.Option(help="Of new weights and of the probe.")] = 0,
) -> None:
    """Convert a dense checkpoint to a Mixture-of-Experts, check that it is exact, and save it.

    Writes weights, configuration, tokenizer and a model card; OUT appears when everything is written.
    """
    from rich.console import Console

    _quiet_libraries()
    from thermoe.models.command import parse_options, run_convert

    console = Console()
    folder = run_convert(
        console,
        model,
        out,
        method=method,
        num_experts=experts,
        top_k=top_k,
        layers=layers,
        router=router,
        options=parse_options(set_ or []),
        tokenizer=tokenizer,
        seed=seed,
    )
    _print_path(console, "saved:", folder)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A folder written by save_pretrained, or a name on the hub.")],
    prompt: Annotated[str, typer.Option(help="Text to go on with.")],
    budget_j_per_token: Annotated[float | None, typer.Option(help="Joules per token, for each phase.")] = None,
    power_cap_w: Annotated[float | None, typer.Option(help="Mean power, in watts.")] = None,
    temp_cap_c: Annotated[float | None, typer.Option(help="Temperature, in degrees Celsius.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Write so many continuations of the prompt at once.")] = 1,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token, sample none.")] = False,
    adapt: Annotated[
        bool, typer.Option("--adapt", help="Let the routers learn from the prompt first; the budget is for both.")
    ] = False,
    telemetry: Annotated[str, typer.Option(help="Telemetry source: auto, off, or a name.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the sampled text.")] = 0,
) -> None:
    """Generate text with a Mixture-of-Experts while a budget is held, and show live what it costs.

    Without a budget the price is 0, also where the model was saved with another, and the numbers are shown all the
    same. Joules are measured where there is a sensor, else modelled; each carries its label.
    """
    from rich.console import Console

    _quiet_libraries()
    from thermoe.adapt.command import run_generate

    limits = {"j_per_token": budget_j_per_token, "power_w": power_cap_w, "temp_c": temp_cap_c}
    run_generate(
        Console(),
        model,
        prompt=prompt,
        budget={name: value for name, value in limits.items() if value is not None},
        max_new_tokens=max_new_tokens,
        batch=batch,
        greedy=greedy,
        adapt=adapt,
        telemetry=telemetry,
        device=device,
        seed=seed,
    )


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="A run folder; several trainings make learning curves.")],
    out: Annotated[Path, typer.Option(help="Folder for the learning curves of several runs.")] = Path("runs/learning"),
) -> None:
    """Write report.html again from a run folder alone; from several trainings, learning curves with bands."""
    from rich.console import Console

    console = Console()
    if len(runs) > 1:
        from thermoe.report.learning import write_learning_report

        _print_path(console, "learning curves:", write_learning_report(runs, out))
        return
    from thermoe.report import build_report, summary_table

    path = build_report(runs[0])
    console.print(summary_table(runs[0], width=console.width))
    _print_path(console, "report:", path)


@app.command()
def calibrate(
    experts: Annotated[int, typer.Option(help="Experts per layer.")] = 64,
    hidden: Annotated[int, typer.Option(help="Model width.")] = 2048,
    width: Annotated[int, typer.Option(help="Width of one expert.")] = 1024,
    layers: Annotated[int, typer.Option(help="Layers with weights of their own; fewer where memory is short.")] = 8,
    gated: Annotated[bool, typer.Option(help="SwiGLU experts, or the ungated ones of GPT-2.")] = True,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    window_s: Annotated[float, typer.Option(help="Measured seconds per operating point.")] = 2.5,
    telemetry: Annotated[str, typer.Option(help="Telemetry source.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder for the profile; the user's cache by default.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, routing and the order of cells.")] = 0,
) -> None:
    """Measure what expert layers cost on this machine and fit the cost model (under two minutes on a GPU).

    Needs a device of its own: the fit is refused when the device is shared, throttled or too noisy. Without a sensor
    the prior is written, labelled as an estimate.
    """
    from rich.console import Console

    from thermoe.energy.command import run_calibration

    _quiet_libraries()
    run_calibration(
        Console(),
        shape=(experts, hidden, width, int(gated)),
        layers=layers,
        dtype=dtype,
        window_s=window_s,
        telemetry=telemetry,
        out=out,
        seed=seed,
    )


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; its schema is versioned.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show live readings once a second until Ctrl-C.")] = False,
    count: Annotated[int | None, typer.Option(min=1, help="With --watch: stop after this many readings.")] = None,
    load: Annotated[
        float | None, typer.Option(min=3, max=60, metavar="SECONDS", help="Load the GPU and check its sensors.")
    ] = None,
    require: Annotated[
        str | None, typer.Option(help="Exit 3 unless this is measured: energy, power, temperature or memory.")
    ] = None,
    torch: Annotated[bool, typer.Option("--torch", help="Ask PyTorch for its device numbers; starts CUDA.")] = False,
    source: Annotated[
        str, typer.Option(help="Telemetry source: auto, or a name from `thermoe list sources`.")
    ] = "auto",
) -> None:
    """Say what this machine measures, what it estimates, what is missing, and the one step that would mend it."""
    from rich.console import Console

    from thermoe import doctor as checks

    if count is not None and not watch:
        raise typer.BadParameter("--count goes with --watch")
    console = Console()
    if watch:
        checks.watch(source, console, count=count, as_json=as_json)
        return
    short = checks.run_doctor(console, source=source, as_json=as_json, with_torch=torch, load_s=load, require=require)
    if short is not None:
        raise MachineError(
            short,
            where=f"thermoe doctor --require {require}",
            accepted=f"a machine that measures {require}",
            fix="see the diagnosis above",
        )


_KINDS = {
    "routers": ("thermoe.routers.swap", "ROUTERS"),
    "losses": ("thermoe.moe.losses", "LOSSES"),
    "sources": ("thermoe.telemetry.source", "SOURCES"),
    "arms": ("thermoe.compare.arms", "ARMS"),
    "families": ("thermoe.models.families", "FAMILIES"),
    "presets": ("thermoe.compare.study_spec", "preset_kinds"),
    "training-presets": ("thermoe.training.spec", "preset_names"),
}


@app.command(name="list")
def list_(
    kind: Annotated[str, typer.Argument(help="routers, losses, sources, arms, families, presets or training-presets.")],
) -> None:
    """List what a name may be."""
    from importlib import import_module

    from thermoe.errors import UnknownNameError

    if kind not in _KINDS:
        raise UnknownNameError.of("kind of thing to list", kind, _KINDS, where="thermoe list")
    module, attribute = _KINDS[kind]
    found = getattr(import_module(module), attribute)
    for name in found() if callable(found) else found:
        typer.echo(name)


def _show_results(console: Console, run: RunFolder) -> None:
    """Write the report of a finished run; print its table, its verdicts and where everything lies."""
    from rich.markup import escape

    from thermoe.report import build_report, summary_table

    report = build_report(run.path)
    console.print()
    console.print(summary_table(run.path, width=console.width))
    for row in run.rows("verdict"):
        mark = {True: "[green]yes[/green]", False: "[red]no[/red] ", None: "-  "}[row["holds"]]
        console.print(f"{mark} {escape(row['text'])}", highlight=False)
    _print_path(console, "\nreport:", report)
    _print_path(console, "rows:  ", run.path / "rows.jsonl")


def _print_path(console: Console, label: str, path: Path) -> None:
    """Print a path whole: not wrapped, no brackets taken for markup, and whatever bytes its name has."""
    text = f"{label} {path}".encode("utf-8", "backslashreplace").decode("utf-8")
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _quiet_libraries() -> None:
    """Leave the screen to our own progress bars."""
    import os
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="torch.utils.data")


def main() -> None:
    """Run the command line; print an error as one message and exit 2 (usage) or 3 (this machine)."""
    try:
        app()
    except ThermoeError as error:
        if _state["debug"]:
            raise
        _fail(error)
    except OSError as error:  # a full disk, a folder that may not be written to
        if _state["debug"]:
            raise
        _fail(
            MachineError(
                f"a file cannot be read or written: {error.strerror or error}",
                where=str(error.filename or "unknown file"),
                accepted="files and folders that may be read and written, and room on the disk",
                fix="mend that, or name another folder; a run that was cut short goes on with --resume",
            )
        )


def _fail(error: ThermoeError) -> NoReturn:
    typer.echo(f"error: {error}".encode("utf-8", "backslashreplace").decode("utf-8"), err=True)
    sys.exit(error.exit_code)
