"""Cost profiles in the user's cache folder: which there are, of what device, how old; a broken file is only named."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROFILE_SCHEMA, NEWEST_VERSION = "thermoe.cost_profile", 1


def profiles_folder(environment: Mapping[str, str] | None = None) -> Path:
    """Return where cost profiles are kept: ``thermoe/profiles`` in the user's cache folder; nothing is created."""
    environment = os.environ if environment is None else environment
    home = Path(environment.get("HOME") or environment.get("USERPROFILE") or "~").expanduser()
    if platform.system() == "Windows":
        cache = Path(environment.get("LOCALAPPDATA") or home / "AppData" / "Local")
    else:
        cache = Path(environment.get("XDG_CACHE_HOME") or home / ".cache")
    return cache / "thermoe" / "profiles"


def find_profiles(
    folder: str | os.PathLike[str] | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    now_s: float | None = None,
) -> list[dict[str, Any]]:
    """Return one entry per profile file, by name.

    Args:
        folder: where to look; the user's cache folder by default.
        environment: where the cache folder is looked up.
        now_s: wall time an age is counted to, in seconds since 1970.

    Returns:
        For each file ``file``, ``usable``, ``reason`` (why not), ``age_s``, ``device_uuid``, ``device_name``,
        ``basis``, ``quality`` and ``schema_version``; ``None`` for what it does not tell. It never raises.
    """
    place = profiles_folder(environment) if folder is None else Path(folder)
    now_s = time.time() if now_s is None else now_s
    try:
        files = sorted(path for path in place.glob("*.json") if path.is_file())
    except OSError:
        return []
    return [_entry(path, now_s) for path in files]


def _entry(path: Path, now_s: float) -> dict[str, Any]:
    entry: dict[str, Any] = dict.fromkeys(
        ("reason", "age_s", "device_uuid", "device_name", "basis", "quality", "schema_version")
    )
    entry |= {"file": path.name, "usable": False}
    try:
        entry["age_s"] = max(0.0, now_s - path.stat().st_mtime)
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return {**entry, "reason": f"not readable ({type(error).__name__})"}
    if not isinstance(content, dict) or content.get("schema") != PROFILE_SCHEMA:
        return {**entry, "reason": "not a cost profile"}
    key, fit, version = content.get("key"), content.get("fit"), content.get("schema_version")
    entry["schema_version"], entry["basis"] = version, content.get("basis")
    if isinstance(key, dict):
        entry |= {"device_uuid": key.get("device_uuid"), "device_name": key.get("device_name")}
    if isinstance(fit, dict):
        entry["quality"] = fit.get("quality")
    if not isinstance(version, int) or version > NEWEST_VERSION:
        return {**entry, "reason": f"written by a newer thermoe (schema {version}); update thermoe to use it"}
    return {**entry, "usable": True}
