"""``primeflow sweep``: many trainings by one command, which continues where it stopped."""

import argparse
import sys
from pathlib import Path

from primeflow_perturbench.cli.common import INTERRUPTED, Parser, answering, exit_on_sigterm, make_console

# Exit status: some trials failed.
SOME_FAILED = 1

EXAMPLES = """\
examples:
  primeflow sweep ablation=space,solver seed=0,1,2 data=norman19_no_controls
  primeflow sweep experiment=ablations seed=0,1 data.data.filename=cells.h5ad data.splitter.split_path=split.csv
  primeflow sweep experiment=leaderboard/norman19 hydra/launcher=submitit_slurm hydra.launcher.partition=gpu
  primeflow sweep model=primeflow_fast model.lr=1e-3,1e-4 hydra/launcher=joblib hydra.launcher.n_jobs=4
  primeflow sweep experiment=search/primeflow_fast data=norman19_no_controls

The same command continues where it stopped: finished trials are not run again.
"""


def parse() -> argparse.Namespace:
    """Arguments of the command line."""
    parser = Parser(
        prog="primeflow sweep",
        description="Run the trials of ablations, of an experiment, or one for each value of swept settings.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="OVERRIDE", help="settings as of train, several values sweep; ablation=NAME,..."
    )
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder of all sweeps (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print the multiruns of Hydra and end")
    return parser.parse_intermixed_args()


def main() -> None:
    """Run the sweep and end with its status."""
    chosen, console = parse(), make_console()
    exit_on_sigterm()

    def work() -> None:
        from primeflow_perturbench.sweeps.launch import sweep

        try:
            failures = sweep(chosen.overrides, chosen.output, console, dry_run=chosen.dry_run)
        except KeyboardInterrupt:
            console.print("Interrupted. The same command continues where it stopped.")
            sys.exit(INTERRUPTED)
        if failures:
            sys.exit(SOME_FAILED)

    answering(work)


if __name__ == "__main__":
    main()
