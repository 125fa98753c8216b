"""The command line: `python -m benchmarks --help`."""

import sys
from typing import Any

from benchmarks.runtime import prepare_process


def main() -> None:
    """Run one experiment."""
    prepare_process()

    # Only now: these import JAX, and with it libraries that read their settings once.
    import tyro

    from benchmarks.experiments import classification
    from benchmarks.experiments.bfloat16 import bfloat16
    from benchmarks.experiments.burgers import burgers
    from benchmarks.experiments.dfiv import dfiv
    from benchmarks.experiments.imagenet import imagenet
    from benchmarks.experiments.landscape import landscape
    from benchmarks.experiments.numerics import numerics
    from benchmarks.experiments.proxy import proxy
    from benchmarks.experiments.quickstart import quickstart
    from benchmarks.experiments.results import results
    from benchmarks.experiments.rules import rules
    from benchmarks.experiments.speed import speed
    from benchmarks.experiments.theory import theory
    from benchmarks.experiments.uncertainty import uncertainty

    commands: dict[str, Any] = {
        "quickstart": quickstart,
        "landscape": landscape,
        "burgers": burgers,
        "dfiv": dfiv,
        "proxy": proxy,
        "cifar10": classification.cifar10,
        "cifar100": classification.cifar100,
        "sensitivity": classification.sensitivity,
        "algorithms": classification.algorithms,
        "ablations": classification.ablations,
        "imagenet": imagenet,
        "rules": rules,
        "theory": theory,
        "speed": speed,
        "numerics": numerics,
        "bfloat16": bfloat16,
        "uncertainty": uncertainty,
        "results": results,
    }
    try:
        tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="python -m benchmarks",
            description="Experiments with closed-form last layers. See also: <command> --help.",
        )
    except KeyboardInterrupt:
        sys.exit("Stopped. Finished runs are kept: the same command goes on from here.")


if __name__ == "__main__":
    main()
