"""A command that is stopped after three records and started again."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.core.records import Records


def stop_and_resume(
    run: Callable[[], None], path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Run, stop, run again; what was finished is kept and nothing is done twice.

    Args:
      run: the command.
      path: of its records.
      monkeypatch: pytest's.

    Returns:
      The lines of the records in the end.
    """
    add = Records.add

    def stop_after_three(records, key, result):
        add(records, key, result)
        if len(path.read_text().splitlines()) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Records, "add", stop_after_three)
        with pytest.raises(KeyboardInterrupt):
            run()
    first = path.read_text().splitlines()
    run()
    lines = path.read_text().splitlines()
    assert lines[:3] == first
    keys = [json.dumps(json.loads(line)["key"], sort_keys=True) for line in lines]
    assert len(set(keys)) == len(keys)
    return lines
