"""The ``primeflow`` command."""

import argparse
import importlib
import sys

COMMANDS = {
    "train": "train a model on an h5ad file, generate the held-out conditions and score them",
    "predict": "generate the conditions of a table with a trained model",
    "evaluate": "score predicted cells against measured ones, without a model",
    "share": "write a trained model as a folder of tensors and JSON that others can load",
    "data": "download the benchmark's data, preprocess counts, check whether a file will train",
    "sweep": "run many trainings: ablations, leaderboards, searches, on one machine or a cluster",
    "leaderboard": "make tables, statistics, figures and one page of finished runs",
}

EXAMPLES = """\
examples:
  primeflow train experiment=quickstart
  primeflow train experiment=devel/transfer data.data.filename=cells.h5ad
  primeflow data download norman19 && primeflow train experiment=primeflow/norman19
  primeflow predict ckpt_path=runs/NAME/checkpoints/last.ckpt prediction_dataframe_path=conditions.csv
  primeflow evaluate predicted.h5ad measured.h5ad --covariate-keys cell_type
  primeflow sweep ablation=guidance seed=0,1,2 && primeflow leaderboard runs/ --output leaderboard

The settings of train and predict are Hydra overrides: --help lists them, --cfg job prints a composed configuration.
"""


def main() -> None:
    """Entry point: hand over to the subcommand's module."""
    from primeflow_perturbench import __version__

    parser = argparse.ArgumentParser(
        prog="primeflow",
        description="PRiMeFlow: generate the cells that a perturbation would give.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    chosen = parser.parse_args(sys.argv[1:2])
    module = importlib.import_module(f"primeflow_perturbench.cli.{chosen.command}")
    # Each subcommand is a script of its own: a launcher of several processes repeats `python argv[0] argv[1:]`, and
    # would repeat `python -m primeflow_perturbench`, without the subcommand, of a main module that has a spec.
    sys.argv = [module.__file__, *sys.argv[2:]]
    sys.modules["__main__"].__spec__ = None
    module.main()
