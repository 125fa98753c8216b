"""What a process has compiled."""

from pathlib import Path

import jax


def forget_in_time():
    """Drop compiled functions in time: each maps memory, and Linux allows 65,530 maps."""
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > 20_000:
        jax.clear_caches()
