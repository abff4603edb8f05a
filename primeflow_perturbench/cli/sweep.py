"""``primeflow sweep``: many trainings by one command, which goes on where it stopped."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from primeflow_perturbench.cli.common import answering, make_console

if TYPE_CHECKING:
    from rich.console import Console

# Statuses of a program some of whose trials failed, and of one ended by SIGINT.
SOME_FAILED = 1
INTERRUPTED = 130

EXAMPLES = """\
examples:
  primeflow sweep experiment=ablation/space seed=0,1,2 data=norman19_no_controls
  primeflow sweep experiment=ablation/network hydra/launcher=joblib hydra.launcher.n_jobs=4
  primeflow sweep experiment=leaderboard/norman19 hydra/launcher=submitit_slurm hydra.launcher.partition=gpu
  primeflow sweep experiment=search/primeflow_fast data=norman19_no_controls

The same command goes on where it stopped: a finished trial is not run again.
"""


def parse() -> argparse.Namespace:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(
        prog="primeflow sweep",
        description="Run the trials of an experiment, one for each value that is swept.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="settings as of train; several values sweep")
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder of all sweeps (default: %(default)s)")
    parser.add_argument(
        "--attempts",
        type=int,
        default=2,
        help="how often a trial is begun whose worker is killed (default: %(default)s)",
    )
    parser.add_argument("--retry-failed", action="store_true", help="run trials again that are recorded as failed")
    parser.add_argument("--dry-run", action="store_true", help="list the trials and end")
    chosen = parser.parse_intermixed_args()
    if chosen.attempts < 1:
        parser.error(f"--attempts must be at least 1, got {chosen.attempts}")
    return chosen


def main() -> None:
    """Do what the command line says."""
    chosen = parse()
    console = make_console()
    answering(lambda: work(chosen, console))


def work(chosen: argparse.Namespace, console: "Console") -> None:
    """Run the sweep, say what came of it and end with its status."""
    from primeflow_perturbench.sweeps.command import sweep

    try:
        failures = sweep(
            chosen.overrides,
            chosen.output,
            console,
            attempts=chosen.attempts,
            retry_failed=chosen.retry_failed,
            dry_run=chosen.dry_run,
        )
    except KeyboardInterrupt:
        console.print("Interrupted. The same command goes on where it stopped.")
        sys.exit(INTERRUPTED)
    if failures:
        sys.exit(SOME_FAILED)


if __name__ == "__main__":
    main()
