"""``primeflow evaluate``: score a file of predicted cells against a file of measured ones."""

import argparse

from primeflow_perturbench.cli.common import answering, make_console


def parse() -> argparse.Namespace:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(
        prog="primeflow evaluate",
        description="Score predicted cells against measured ones with PerturBench's metrics.",
    )
    parser.add_argument("predicted", help="h5ad of predicted cells")
    parser.add_argument("measured", help="h5ad of measured cells of the same conditions, with controls")
    parser.add_argument("--perturbation-key", default="condition", help="column of obs (default: %(default)s)")
    parser.add_argument("--covariate-keys", nargs="*", default=[], help="columns of obs (default: none)")
    parser.add_argument("--control", default="control", help="label of control cells (default: %(default)s)")
    parser.add_argument(
        "--pipelines",
        choices=["paper", "default", "mmd"],
        default="paper",
        help="the paper's metrics, or PerturBench's default or mmd set (default: %(default)s)",
    )
    parser.add_argument("--synthetic-controls", action="store_true", help="keep the predicted control cells")
    parser.add_argument("--output", help="folder for summary.csv, summary_by_cov.csv and per_condition.parquet")
    return parser.parse_args()


def main() -> None:
    """Score the files of the command line and print the table."""
    chosen = parse()
    from primeflow_perturbench.runs import evaluate_files

    console = make_console()

    def work() -> None:
        columns = {
            "perturbation_key": chosen.perturbation_key,
            "covariate_keys": chosen.covariate_keys,
            "perturbation_control_value": chosen.control,
        }
        evaluate_files(
            chosen.predicted,
            chosen.measured,
            columns,
            chosen.pipelines,
            console,
            synthetic_controls=chosen.synthetic_controls,
            output=chosen.output,
        )

    answering(work)
