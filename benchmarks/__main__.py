"""The command line: `python -m benchmarks --help`."""

import sys

from benchmarks.runtime import prepare_process


def main() -> None:
    """Run one experiment."""
    prepare_process()

    # Only now: these import JAX, and with it libraries that read their settings once.
    import tyro

    from benchmarks.experiments.quickstart import quickstart

    try:
        tyro.extras.subcommand_cli_from_dict(
            {"quickstart": quickstart},
            prog="python -m benchmarks",
            description="Experiments with closed-form last layers. See also: <command> --help.",
        )
    except KeyboardInterrupt:
        sys.exit("Stopped. Finished runs are kept: the same command goes on from here.")


if __name__ == "__main__":
    main()
