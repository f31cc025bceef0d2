"""Which boards this process uses: the forms of ``CUDA_VISIBLE_DEVICES``, and what a caller may name as a device.

CUDA and the vendor's library number boards differently (fastest first against bus order), so a board is known by its
UUID, then by its PCI address, and by its index only when nothing else is left; the result says which it was.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from thermoe.errors import ConfigError
from thermoe.telemetry.source import HOST_UUID, Device

_HEX = re.compile(r"^[0-9a-fA-F]{8}(-[0-9a-fA-F]{1,12})*-?$")
_INDEX = re.compile(r"^[0-9]{1,9}$", re.ASCII)
_OLD_MIG = re.compile(r"^MIG-(GPU-[0-9a-fA-F-]+)/[0-9]+/[0-9]+$", re.ASCII)
_PCI = re.compile(r"^(?:([0-9a-f]{1,8}):)?([0-9a-f]{1,2}):([0-9a-f]{1,2})\.([0-9a-f])$", re.ASCII)


@dataclass(frozen=True, slots=True)
class VisibleDevices:
    """The boards a process may use, and what was odd about how they were named.

    Attributes:
        devices: the boards in the order CUDA numbers them, each with ``mapped_by`` and ``provisional`` set.
        notes: one text per entry that was passed over, and why.
    """

    devices: tuple[Device, ...]
    notes: tuple[str, ...] = ()


def normalise_uuid(text: str) -> str:
    """Return a UUID as the driver writes it: ``GPU-`` or ``MIG-`` in capitals, the rest small; the prefix is added."""
    stripped = text.strip()
    head = stripped[:4].upper()
    if head in ("GPU-", "MIG-"):
        return head + stripped[4:].lower()
    return "GPU-" + stripped.lower()


def normalise_pci(text: str) -> str | None:
    """Return ``dddddddd:bb:dd.f`` for any usual way of writing a PCI address; ``None`` when it is not one."""
    found = _PCI.match(text.strip().lower())
    if found is None:
        return None
    domain, bus, slot, function = found.groups()
    return f"{int(domain or '0', 16):08x}:{int(bus, 16):02x}:{int(slot, 16):02x}.{function}"


def visible_devices(boards: Sequence[Device], environment: Mapping[str, str]) -> VisibleDevices:
    """Return the boards that ``CUDA_VISIBLE_DEVICES`` leaves visible; it never raises, whatever the text.

    As CUDA does, the list ends at the first entry that names no board (``-1``, out of range, unknown UUID). A board
    named twice is kept once, so that nothing is counted twice.
    """
    text = environment.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return VisibleDevices(tuple(replace(board, mapped_by="all", provisional=True) for board in boards))
    by_bus = environment.get("CUDA_DEVICE_ORDER", "").strip().upper() == "PCI_BUS_ID"
    # Boards of one model are ordered by bus in either numbering; only a mixed machine can be numbered two ways.
    index_is_sure = by_bus or len({board.name for board in boards}) <= 1
    chosen: dict[str, Device] = {}
    notes: list[str] = []
    entries = [entry.strip() for entry in text.split(",")] if text.strip() else []
    for entry in entries:
        board, how, shared = _match_entry(entry, boards)
        if board is None:
            notes.append(f"CUDA_VISIBLE_DEVICES ends at {entry!r}: {how}")
            break
        if board.uuid in chosen:
            notes.append(f"CUDA_VISIBLE_DEVICES names {board.uuid} twice; it is counted once")
            continue
        mapped_by = "uuid" if how == "uuid" or index_is_sure else "index"
        chosen[board.uuid] = replace(board, mapped_by=mapped_by, provisional=True, shared=board.shared or shared)
    return VisibleDevices(tuple(chosen.values()), tuple(notes))


def _match_entry(entry: str, boards: Sequence[Device]) -> tuple[Device | None, str, bool]:
    """Return the board an entry names, how it named it (or why it names none), and whether it named a slice."""
    if _INDEX.match(entry):
        position = int(entry)
        if position < len(boards):
            return boards[position], "index", False
        return None, f"there are {len(boards)} boards", False
    if entry.lstrip("-").isdigit():
        return None, "a negative index hides the rest", False
    old = _OLD_MIG.match(entry)
    if old:
        parent = normalise_uuid(old.group(1))
        return _unique([b for b in boards if b.uuid == parent], "slice of an unknown board"), "uuid", True
    wanted = normalise_uuid(entry) if entry[:4].upper() in ("GPU-", "MIG-") else ""
    if wanted.startswith("MIG-"):
        owners = [b for b in boards if any(normalise_uuid(m).startswith(wanted) for m in b.mig_uuids)]
        return (owners[0], "uuid", True) if len(owners) == 1 else (None, "no board has this slice", True)
    if not wanted and _HEX.match(entry):
        wanted = normalise_uuid(entry)
    if len(wanted) <= len("GPU-"):
        return None, "it is neither an index nor a UUID", False
    matches = [b for b in boards if normalise_uuid(b.uuid).startswith(wanted)]
    if len(matches) == 1:
        return matches[0], "uuid", False
    return None, "no board has this UUID" if not matches else "several boards begin with it", False


def _unique(found: list[Device], _reason: str) -> Device | None:
    return found[0] if len(found) == 1 else None


def select_devices(available: Iterable[Device], wanted: Any) -> list[Device]:
    """Return the devices a caller asked for, out of those a source offers.

    Args:
        available: what the source offers, GPUs in the order the process numbers them.
        wanted: ``None`` for all of them; an index, ``"cuda"``, ``"cuda:1"``, ``"cpu"``, a UUID with or without its
            prefix, a PCI address, an object with ``uuid`` or ``type`` and ``index`` (a torch device or its
            properties), or a list of these.

    Raises:
        ConfigError: something asked for is not among them, and there are GPUs to choose from. On a machine without a
            GPU the result is empty, so that the same program runs there and reports nothing measured.
    """
    offered = list(available)
    if wanted is None:
        return offered
    gpus = [device for device in offered if device.kind == "gpu"]
    host = [device for device in offered if device.kind == "host"]
    chosen: dict[str, Device] = {}
    for item in wanted if isinstance(wanted, (list, tuple, set, frozenset)) else [wanted]:
        for device in _devices_named(item, gpus, host):
            chosen[device.uuid] = device
    for device in host:  # host memory is read whatever the GPU
        chosen.setdefault(device.uuid, device)
    return list(chosen.values())


def _devices_named(item: Any, gpus: list[Device], host: list[Device]) -> list[Device]:
    uuid = getattr(item, "uuid", None)
    if uuid is not None:
        named = normalise_uuid(str(uuid))
        return [replace(d, mapped_by="uuid", provisional=False) for d in gpus if normalise_uuid(d.uuid) == named] or (
            _refuse(item, gpus)
        )
    kind, position = getattr(item, "type", None), getattr(item, "index", None)
    text = str(item).strip() if not isinstance(kind, str) else f"{kind}:{position}" if position is not None else kind
    if text in ("cpu", "mps", HOST_UUID) or text.startswith(("cpu:", "mps:")):
        return host
    if text == "cuda":
        return gpus
    found = re.match(r"^(?:cuda:)?([0-9]{1,9})$", text, re.ASCII)
    if found:
        number = int(found.group(1))
        return [gpus[number]] if number < len(gpus) else _refuse(item, gpus)
    address = normalise_pci(text)
    if address is not None:
        by_address = [d for d in gpus if d.pci_bus_id is not None and normalise_pci(d.pci_bus_id) == address]
        return [replace(d, mapped_by="pci", provisional=False) for d in by_address] or _refuse(item, gpus)
    by_uuid = [d for d in gpus if normalise_uuid(d.uuid) == normalise_uuid(text)]
    by_slice = [d for d in gpus if any(normalise_uuid(m) == normalise_uuid(text) for m in d.mig_uuids)]
    return (
        [replace(d, mapped_by="uuid", provisional=False) for d in by_uuid]
        or [replace(d, mapped_by="uuid", provisional=False, shared=True) for d in by_slice]
        or _refuse(item, gpus)
    )


def _refuse(item: Any, gpus: list[Device]) -> list[Device]:
    if not gpus:
        return []
    raise ConfigError(
        f"no measured device is called {item!r}",
        where="EnergyMeter(devices=...)",
        accepted="; ".join(f"{d.index} = {d.uuid} ({d.name})" for d in gpus),
        fix="name one of these by UUID or by index, or leave devices out to measure all of them",
    )
