"""Results on disk: one JSON line per finished piece of work, keyed by all that determines it.

An interrupted experiment goes on where it stopped, and a changed option never picks up an old
result.
"""

import datetime
import functools
import hashlib
import json
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

import cfll

Record = dict[str, Any]


class Records:
    """An append-only file of JSON lines {"key": ..., "result": ..., "made": ...}.

    Experiments share runs: what is not in the file may be in the others of the folder, read once.
    `made` has machines and versions of all results that were asked for. The first `add` makes file
    and folder.
    """

    def __init__(self, path: Path):
        self._path = path
        self._entries: dict[str, Record] = {}
        self.made: list[dict[str, str]] = []
        for file in sorted(path.parent.glob("*.jsonl"), key=lambda file: file == path):
            self._entries |= _entries_of(file)

    def get(self, key: Mapping[str, Any]) -> Record | None:
        """The result under this key, or None."""
        entry = self._entries.get(_canonical(key))
        if entry is None:
            return None
        if entry["made"] not in self.made:
            self.made.append(entry["made"])
        return entry["result"]

    def add(self, key: Mapping[str, Any], result: Record) -> None:
        """Append and remember a result."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        torn = self._path.exists() and not self._path.read_bytes().endswith(b"\n")
        with self._path.open("a") as file:
            entry = {"key": key, "result": result, "made": made_here()}
            file.write("\n" * torn + json.dumps(entry) + "\n")
        self._entries[_canonical(key)] = entry


def _entries_of(file: Path) -> dict[str, Record]:
    """The lines of a file by their keys."""
    entries = {}
    for line in file.read_text().splitlines():
        with suppress(json.JSONDecodeError):  # the last line of a run that was killed in writing
            entry = json.loads(line)
            entries[_canonical(entry["key"])] = entry
    return entries


@functools.cache
def made_here() -> dict[str, str]:
    """Machine and versions that a result comes from. Not part of its key: runs are resumed."""
    device = jax.devices()[0]
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{device.platform} {device.device_kind}, {os.cpu_count()} cores, "
        f"{platform.system()} {platform.machine()}",
        "cfll": cfll.__version__,
        **{name: version(name) for name in ("jax", "optax", "flax")},
    }


def name_of(key: Mapping[str, Any]) -> str:
    """A short file name for what belongs to a key."""
    return hashlib.sha256(_canonical(key).encode()).hexdigest()[:12]


def save_params(path: Path, params: Any) -> None:
    """Write a parameter tree's leaves as .npz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, *(np.asarray(leaf) for leaf in jax.tree.leaves(params)))
    partial.rename(path)


def load_params(path: Path, like: Any) -> Any:
    """Read leaves written by `save_params` into a tree of the same structure."""
    with np.load(path) as arrays:
        return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in arrays.files])


def _canonical(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
