"""A run is a folder: `manifest.json`, `rows.jsonl`, checkpoints, plots. This module writes and reads it, without torch.

Rows are dictionaries with a `kind`; a number that was not measured is `None`, never 0, and a number of energy, power,
temperature or memory carries its provenance beside it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from thermoe.errors import RunFolderError

Provenance = Literal["measured", "estimated", "simulated", "replayed"]
#: From the weakest to the strongest; a sum is only as good as its weakest part.
PROVENANCE_ORDER: tuple[Provenance, ...] = ("simulated", "replayed", "estimated", "measured")
SCHEMA_VERSION = 1


def save_whole(folder: Path, write: Callable[[Path], Any]) -> None:
    """Call ``write`` on a temporary folder beside ``folder`` and rename it: nothing half-written is left behind.

    Args:
        folder: absent or empty.
        write: writes into the folder it is given, and may create it.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    absent = [parent for parent in folder.parents if not parent.exists()]
    try:
        write(partial)
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in absent:
            with contextlib.suppress(OSError):  # never made, or in use by another by now
                parent.rmdir()
        raise


def weakest_provenance(parts: Iterable[Provenance | None]) -> Provenance | None:
    """Return the weakest label among ``parts``; ``None`` if any part is ``None`` or there is none."""
    labels = list(parts)
    if not labels or any(p is None for p in labels):
        return None
    return min((p for p in labels if p is not None), key=PROVENANCE_ORDER.index)


def _plain(value: Any) -> Any:
    """Make a value JSON can hold: NaN and infinities become strings, which a reader sees and a parser survives."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON to ``path`` through a temporary file, so that a crash leaves the old file or the new."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(_plain(value), indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


class RunFolder:
    """One run on disk.

    Use :meth:`create` to start or resume a run and :meth:`open` to read one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: str | os.PathLike[str], *, resume: bool = False) -> RunFolder:
        """Make the folder, or take up an earlier run in it.

        Raises:
            RunFolderError: the path is a file, or the folder holds something and ``resume`` is false.
        """
        folder = Path(path)
        if folder.exists() and not folder.is_dir():
            raise RunFolderError(
                f"{folder} is a file", where="--out", accepted="a folder", fix="name another output folder"
            )
        if folder.exists() and any(folder.iterdir()) and not resume:
            raise RunFolderError(
                f"the run folder {folder} is not empty",
                where="--out",
                accepted="a new or empty folder, or a run to take up again",
                fix="name another folder with --out, or add --resume to go on with this run",
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(
                f"the run folder {folder} cannot be made: {error.strerror}",
                where="--out",
                accepted="a folder that may be written to",
                fix="name another output folder",
            ) from error
        run = cls(folder)
        if (folder / "rows.jsonl").is_file():  # a row torn by a crash must not run into the next one
            run.drop_rows(lambda row: False)
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunFolder:
        """Open a run for reading.

        Raises:
            RunFolderError: there is no manifest in the folder.
        """
        folder = Path(path)
        if not (folder / "manifest.json").is_file():
            raise RunFolderError(
                f"{folder} holds no run",
                where=str(folder / "manifest.json"),
                accepted="a folder written by a thermoe command",
                fix="check the path, or make a run with: thermoe demo --out FOLDER",
            )
        return cls(folder)

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest as written; empty when there is none yet."""
        path = self.path / "manifest.json"
        if not path.is_file():
            return {}
        try:
            loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunFolderError(
                f"{path} is not readable JSON: {error}",
                where=str(path),
                accepted="the file as thermoe wrote it",
                fix="start a new run in another folder",
            ) from error
        return loaded

    def write_manifest(self, **entries: Any) -> None:
        """Merge ``entries`` into the manifest."""
        merged = {"schema_version": SCHEMA_VERSION, **self.manifest, **entries}
        write_json(self.path / "manifest.json", merged)

    def holds_run_of(self, config: Mapping[str, Any], *, ignore: Iterable[str] = ()) -> bool:
        """Return whether an earlier run of the same configuration is in the folder; false when there is none.

        Args:
            config: as it goes into the manifest.
            ignore: top-level keys that may differ.

        Raises:
            RunFolderError: the folder holds a run of another configuration, or something else.
        """
        manifest = self.manifest
        if not manifest:
            strangers = sorted(path.name for path in self.path.iterdir() if path.name != "manifest.json.partial")
            if strangers:
                raise RunFolderError(
                    f"{self.path} holds {strangers[0]!r} and no run to take up",
                    where="--out",
                    accepted="the folder of an interrupted run, or a new or empty folder",
                    fix="check the path, or name another folder with --out",
                )
            return False
        before = manifest.get("config") if isinstance(manifest, dict) else None
        changed = [
            key
            for key in config
            if key not in ignore and (not isinstance(before, dict) or before.get(key) != config[key])
        ]
        if not changed:
            return True
        raise RunFolderError(
            f"{self.path} holds a run of another configuration (it differs in {', '.join(changed)})",
            where=str(self.path / "manifest.json"),
            accepted="the configuration the run was started with",
            fix="use the same options to resume, or name another folder with --out",
        )

    def append(self, kind: str, **fields: Any) -> None:
        """Append one row and flush it to the disk, so that a crash loses at most the row being written."""
        line = json.dumps(_plain({"kind": kind, **fields}), allow_nan=False) + "\n"
        with (self.path / "rows.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())

    def rows(self, kind: str | None = None) -> Iterator[dict[str, Any]]:
        """Yield the rows in the order written, all or of one ``kind``; a torn last line is passed over."""
        path = self.path / "rows.jsonl"
        if not path.is_file():
            return
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines):
            try:
                row = json.loads(line)
            except ValueError as error:
                if number == len(lines) - 1:  # the process died while writing it
                    return
                raise RunFolderError(
                    f"line {number + 1} of {path} is not a row: {error}",
                    where=str(path),
                    accepted="one JSON object a line",
                    fix="restore the file, or start a new run in another folder",
                ) from error
            if kind is None or row.get("kind") == kind:
                yield row

    def drop_rows(self, unwanted: Any) -> None:
        """Rewrite the rows without those for which ``unwanted(row)`` is true (an arm cut short is run again whole)."""
        kept = [row for row in self.rows() if not unwanted(row)]
        path = self.path / "rows.jsonl"
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        partial.replace(path)
