"""``primeflow evaluate``: score a file of predicted cells against a file of measured cells."""

import argparse
from typing import Any

from primeflow_perturbench.cli.common import Parser, answering, make_console
from primeflow_perturbench.console import PlainConsole


def parse() -> argparse.Namespace:
    """Arguments of the command line."""
    parser = Parser(
        prog="primeflow evaluate",
        description="Score predicted cells against measured cells with PerturBench's metrics, or a challenge's.",
    )
    parser.add_argument("predicted", help="h5ad of predicted cells, or with --label a run of PerturBench")
    parser.add_argument("measured", help="h5ad of measured cells of the same conditions, with controls")
    parser.add_argument("--perturbation-key", default="condition", help="column of obs (default: %(default)s)")
    parser.add_argument("--covariate-keys", nargs="*", default=[], help="columns of obs (default: none)")
    parser.add_argument("--control", default="control", help="label of control cells (default: %(default)s)")
    parser.add_argument(
        "--pipelines",
        choices=["paper", "default", "mmd", "shape"],
        default="paper",
        help="metrics of the paper, PerturBench's default or mmd set, or those of the paper and of shape "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--synthetic-controls",
        action="store_true",
        help="score against the predicted control cells instead of the measured ones",
    )
    parser.add_argument("--output", help="folder for tables of the scores: means, by covariate, by condition")
    entry = parser.add_argument_group("leaderboard", "leave a run that `primeflow leaderboard` takes beside others")
    entry.add_argument("--label", help="row of the cells; `measured` is then the data file of the other runs")
    entry.add_argument("--split", help="CSV of cell and split (default: that of the run of PerturBench)")
    entry.add_argument("--seed", type=int, default=0, help="seed of the model (default: %(default)s)")
    entry.add_argument(
        "--delimiter", default="+", help="text between the parts of a combination (default: %(default)s)"
    )
    challenge = parser.add_argument_group(
        "Virtual Cell Challenge", "metrics of a year's own library (extra `vcc`), each row in a process of its own"
    )
    challenge.add_argument(
        "--profile",
        choices=["vcc2025", "vcc2026"],
        help="cell-eval's metrics of 2025, on log1p expression, or cell-eval2's of 2026, on raw counts",
    )
    challenge.add_argument("--predicted-layer", help="layer of the predicted file that holds these (default: X)")
    challenge.add_argument("--measured-layer", help="layer of the measured file that holds these (default: X)")
    challenge.add_argument(
        "--timeout", type=float, default=3600.0, help="seconds for each row of the table (default: %(default)g)"
    )
    return parser.parse_args()


def enter_run(chosen: argparse.Namespace, columns: dict[str, Any], console: PlainConsole) -> None:
    """Score predicted cells as a run of a leaderboard."""
    from pathlib import Path

    from primeflow_perturbench.data.checks import read_h5ad
    from primeflow_perturbench.errors import InputError
    from primeflow_perturbench.leaderboard.entry import Entry, enter, perturbench_entry

    path = Path(chosen.predicted)
    if chosen.output is None or (chosen.split is None and not path.is_dir()):
        raise InputError("--label leaves a run; give its folder with --output and the split with --split")
    if chosen.pipelines != "paper" or chosen.synthetic_controls or chosen.profile is not None:
        raise InputError(
            "--label scores with the metrics of our runs; remove --pipelines, --synthetic-controls and --profile"
        )
    if path.is_dir():
        entry = perturbench_entry(path, chosen.label, chosen.split)
    else:
        named = columns | {"perturbation_combination_delimiter": chosen.delimiter}
        entry = Entry(path, read_h5ad(path), chosen.label, chosen.seed, Path(chosen.split), named)
    enter(entry, chosen.measured, chosen.output, console)


def main() -> None:
    """Score the files of the command line and print the table."""
    chosen = parse()
    console = make_console()
    columns = {
        "perturbation_key": chosen.perturbation_key,
        "covariate_keys": chosen.covariate_keys,
        "perturbation_control_value": chosen.control,
    }

    def challenge() -> None:
        from primeflow_perturbench.errors import InputError
        from primeflow_perturbench.evaluation.challenge.scoring import evaluate_profile

        if chosen.covariate_keys:
            raise InputError(
                f"--profile {chosen.profile} scores one context at a time and knows no --covariate-keys; give a file "
                "of each context"
            )
        evaluate_profile(
            chosen.predicted,
            chosen.measured,
            columns,
            chosen.profile,
            console,
            layers=(chosen.predicted_layer, chosen.measured_layer),
            synthetic_controls=chosen.synthetic_controls,
            timeout=chosen.timeout,
            output=chosen.output,
        )

    def work() -> None:
        from primeflow_perturbench.evaluation.score import evaluate_files

        evaluate_files(
            chosen.predicted,
            chosen.measured,
            columns,
            chosen.pipelines,
            console,
            synthetic_controls=chosen.synthetic_controls,
            output=chosen.output,
        )

    if chosen.label is not None:
        answering(lambda: enter_run(chosen, columns, console))
    else:
        answering(work if chosen.profile is None else challenge)
