"""Recorded readings: a recorder that writes what a source says, and a source that says it again.

A trace is a text file of one JSON object per line: a header, then one sample per line. Replayed numbers carry the label
``replayed``; what they were when recorded is kept beside it. A trace that has ended stays silent and
does not start over.
"""

from __future__ import annotations

import bisect
import json
import logging
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TextIO

from thermoe.errors import DataError
from thermoe.results import Provenance
from thermoe.telemetry.clock import SYSTEM_CLOCK, Clock
from thermoe.telemetry.source import Device, Sample, Source

SCHEMA = "thermoe.trace"
SCHEMA_VERSION = 1
_LOG = logging.getLogger("thermoe.telemetry")


def sample_to_json(sample: Sample) -> dict[str, Any]:
    """Return a sample as JSON can hold it, without what is empty."""
    # Told apart by identity: a count of 0 equals False and must be kept.
    row = {name: value for name, value in asdict(sample).items() if value is not None and value is not False}
    row = {name: value for name, value in row.items() if value != {}}
    if sample.throttle_reasons is not None:
        row["throttle_reasons"] = sorted(sample.throttle_reasons)
    return row


def sample_from_json(row: Mapping[str, Any]) -> Sample:
    """Return the sample that :func:`sample_to_json` wrote; unknown keys of a later version are passed over."""
    known = {field.name for field in fields(Sample)}
    values = {key: value for key, value in row.items() if key in known}
    if "throttle_reasons" in values:
        values["throttle_reasons"] = frozenset(values["throttle_reasons"])
    return Sample(**values)


class TraceRecorder:
    """A source that passes readings through and writes them down. A full disk ends the recording, not the run.

    Args:
        source: whose readings to record.
        path: file to write; its folder must exist.
        key: what the trace belongs to (board, driver, model), kept in the header.
    """

    def __init__(self, source: Source, path: str | os.PathLike[str], *, key: Mapping[str, Any] | None = None) -> None:
        self.source = source
        self.name = source.name
        self.provenance: Provenance = source.provenance
        self.reason: str | None = None
        self._lock = threading.Lock()
        self._stream: TextIO | None = None
        header = {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "source": source.name,
            "key": dict(key or {}),
            "absent": dict(source.absent),
            "devices": [asdict(device) for device in source.devices()],
        }
        try:
            self._stream = Path(path).open("w", encoding="utf-8")  # noqa: SIM115 - it stays open while readings are taken
        except OSError as error:
            self._give_up(error)
        self._write(header)
        clock = getattr(source, "clock", None)
        if clock is not None:
            self.clock = clock

    def _write(self, row: Mapping[str, Any]) -> None:
        with self._lock:
            if self._stream is None:
                return
            try:
                self._stream.write(json.dumps(row) + "\n")
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._stream = None
        self.reason = f"the trace is not written ({error})"
        _LOG.warning("%s", self.reason)

    @property
    def absent(self) -> Mapping[str, str]:
        """Why metrics are missing, as the source says."""
        return self.source.absent

    def devices(self) -> list[Device]:
        """Return the source's devices."""
        return self.source.devices()

    def metrics(self, device: Device) -> frozenset[str]:
        """Return the source's metrics."""
        return self.source.metrics(device)

    def read(self, device: Device, metrics: Iterable[str]) -> Sample:
        """Read through the source and write the sample down."""
        sample = self.source.read(device, metrics)
        self._write(sample_to_json(sample))
        return sample

    def close(self) -> None:
        """Close the file and the source."""
        with self._lock:
            if self._stream is not None:
                self._stream.close()
                self._stream = None
        self.source.close()


def _device_from_json(row: dict[str, Any]) -> Device:
    return Device(**{**row, "mig_uuids": tuple(row.get("mig_uuids", ()))})


def load_trace(path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[Sample]]:
    """Return the header and the samples of a trace, exactly as recorded; a torn last line is passed over.

    Raises:
        DataError: the file cannot be read, is no trace, or is of a newer schema.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise _no_trace(path, error.strerror or str(error)) from error
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number == len(lines) - 1 and number > 0:
                break
            raise _no_trace(path, f"line {number + 1} is no JSON") from error
    if not rows or rows[0].get("schema") != SCHEMA:
        raise _no_trace(path, "it has no trace header")
    if rows[0].get("schema_version", 0) > SCHEMA_VERSION:
        raise _no_trace(path, f"schema version {rows[0]['schema_version']} is newer than {SCHEMA_VERSION}")
    return rows[0], [sample_from_json(row) for row in rows[1:]]


def _no_trace(path: str | os.PathLike[str], why: str) -> DataError:
    return DataError(
        f"{os.fspath(path)} cannot be replayed: {why}",
        where="ReplayedSource(path=...)",
        accepted=f"a file written by TraceRecorder, schema version {SCHEMA_VERSION} or older",
        fix="record the trace again",
    )


class ReplayedSource:
    """Says again what a trace recorded, at the pace it was recorded or faster.

    Args:
        path: the trace.
        speed: seconds of the trace that pass in one second of the clock.
        clock: the clock; a virtual one replays at once.

    Raises:
        DataError: the file is no trace.
    """

    name = "replay"
    provenance: Provenance = "replayed"

    def __init__(self, path: str | os.PathLike[str], speed: float = 1.0, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self.header, samples = load_trace(path)
        self.clock = clock
        self.absent: Mapping[str, str] = self.header.get("absent", {})
        self._speed = speed
        self._began_s = clock.now_s()
        self._first_s = min((sample.t_s for sample in samples), default=0.0)
        self._by_device: dict[str, list[Sample]] = {}
        for sample in sorted(samples, key=lambda sample: sample.t_s):
            self._by_device.setdefault(sample.device_uuid, []).append(sample)
        self._devices = [_device_from_json(row) for row in self.header.get("devices", [])]

    def devices(self) -> list[Device]:
        """Return the devices that were recorded."""
        return list(self._devices)

    def metrics(self, device: Device) -> frozenset[str]:
        """Return every metric that was ever recorded of a device."""
        samples = self._by_device.get(device.uuid, [])
        return frozenset(metric for sample in samples for metric in sample.provenance)

    def read(self, device: Device, metrics: Iterable[str]) -> Sample:
        """Return what had been recorded by now; after the end of the trace everything is missing."""
        now_s = self.clock.now_s()
        wanted = set(metrics)
        trace_s = self._first_s + (now_s - self._began_s) * self._speed
        samples = self._by_device.get(device.uuid, [])
        position = bisect.bisect_right(samples, trace_s, key=lambda sample: sample.t_s)
        if not samples or trace_s > samples[-1].t_s + 1.0:
            return Sample.empty(device, now_s, wanted, "end of the trace")
        if position == 0:
            return Sample.empty(device, now_s, wanted, "the trace begins later")
        return self._relabelled(samples[position - 1], wanted, now_s)

    def _relabelled(self, recorded: Sample, wanted: set[str], now_s: float) -> Sample:
        kept = {metric: label for metric, label in recorded.provenance.items() if metric in wanted}
        dropped: dict[str, Any] = dict.fromkeys(set(recorded.provenance) - wanted)
        return replace(
            recorded,
            t_s=self._began_s + (recorded.t_s - self._first_s) / self._speed if kept else now_s,
            tick_s=None,
            provenance=dict.fromkeys(kept, "replayed"),
            recorded_provenance=kept,
            missing={metric: reason for metric, reason in recorded.missing.items() if metric in wanted},
            **dropped,
        )

    def close(self) -> None:
        """Do nothing: the trace was read at the start."""
