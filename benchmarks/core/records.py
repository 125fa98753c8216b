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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

import cfll

Record = dict[str, Any]


class Records:
    """An append-only file of JSON lines {"key": ..., "result": ..., "made": ...}, read once.

    `made` has the machines and versions of all lines. The first `add` makes file and folder.
    """

    def __init__(self, path: Path):
        self._path = path
        self._results: dict[str, Record] = {}
        self.made: list[dict[str, str]] = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the last line of a run that was killed while it wrote
                self._results[_canonical(entry["key"])] = entry["result"]
                self._remember(entry.get("made"))

    def get(self, key: Mapping[str, Any]) -> Record | None:
        """The result under this key, or None."""
        return self._results.get(_canonical(key))

    def add(self, key: Mapping[str, Any], result: Record) -> None:
        """Append and remember a result."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        torn = self._path.exists() and not self._path.read_bytes().endswith(b"\n")
        with self._path.open("a") as file:
            line = json.dumps({"key": key, "result": result, "made": made_here()})
            file.write("\n" * torn + line + "\n")
        self._results[_canonical(key)] = result
        self._remember(made_here())

    def _remember(self, made: dict[str, str] | None) -> None:
        if made and made not in self.made:
            self.made.append(made)


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
