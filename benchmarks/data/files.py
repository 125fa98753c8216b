"""Files that the user provides: nothing is downloaded at run time.

A loader says what it wants, this says what is missing.
"""

from pathlib import Path


def require(path: Path, layout: str, source: str) -> Path:
    """The path, if there is something at it.

    Else a FileNotFoundError that names the file, its layout, its source and the option `--data`.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing. Expected: {layout}. Public copy: {source}. "
            "Get it once and say where it is with --data FOLDER; nothing is downloaded here."
        )
    return path
