"""The command line: `python -m benchmarks --help`."""

import sys
from collections.abc import Sequence

from benchmarks.core.runtime import prepare_process


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one experiment, or write RESULTS.md."""
    prepare_process()

    # Only now: these import JAX, and with it libraries that read their settings once.
    import tyro

    from benchmarks.experiments import discover
    from benchmarks.report import results

    commands = {one.name: one.run for one in discover()}
    try:
        tyro.extras.subcommand_cli_from_dict(
            commands | {"results": results},
            prog="python -m benchmarks",
            description="Experiments with closed-form last layers. Stop one when you like: "
            "the same command goes on where it stopped. See also: <command> --help.",
            args=arguments,
        )
    except KeyboardInterrupt:
        sys.exit("Stopped. Finished runs are kept: the same command goes on from here.")


if __name__ == "__main__":
    main()
