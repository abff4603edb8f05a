"""The ``primeflow`` command."""

import argparse
import importlib
import sys

COMMANDS = {
    "train": "train a model on an h5ad file, generate the held-out conditions and score them",
    "predict": "generate cells of the conditions in a table with a trained model",
    "evaluate": "score a file of predicted cells against a file of measured cells",
    "share": "write a trained model as a folder of safetensors and JSON, to share with others",
    "data": "download benchmark data, preprocess counts, check whether a file is ready for training",
    "sweep": "run many trainings: ablations, leaderboards, searches, on one machine or a cluster",
    "leaderboard": "compare finished runs: tables, statistics, figures and one page",
}

EXAMPLES = """\
examples:
  primeflow train experiment=quickstart
  primeflow train experiment=devel/transfer data.data.filename=cells.h5ad
  primeflow data download norman19 && primeflow train experiment=primeflow/norman19
  primeflow predict ckpt_path=runs/NAME/checkpoints/last.ckpt prediction_dataframe_path=conditions.csv
  primeflow evaluate predicted.h5ad measured.h5ad --covariate-keys cell_type
  primeflow sweep ablation=guidance seed=0,1,2 && primeflow leaderboard runs/ --output leaderboard

Settings of train and predict are Hydra overrides: --help lists them, --cfg job prints the composed configuration.
"""


def main() -> None:
    """Parse the subcommand and run its module."""
    from primeflow_perturbench.cli.common import answering, exit_on_sigterm

    # Lightning handles the signal while it trains.
    if sys.argv[1:2] != ["train"]:
        exit_on_sigterm()
    answering(run)


def run() -> None:
    """Parse the subcommand and run its module."""
    from primeflow_perturbench import __version__
    from primeflow_perturbench.cli.common import Parser

    parser = Parser(
        prog="primeflow",
        description="PRiMeFlow generates the cells that a perturbation would produce.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    chosen = parser.parse_args(sys.argv[1:2])
    if chosen.command is None:
        parser.print_help()
        return
    module = importlib.import_module(f"primeflow_perturbench.cli.{chosen.command}")
    # Lightning's launcher starts further processes with `python argv[0] argv[1:]`, or with `python -m MODULE argv[1:]`
    # if the main module has a spec. Make the subcommand's file argv[0] and drop the spec, else the command gets lost.
    sys.argv = [module.__file__, *sys.argv[2:]]
    sys.modules["__main__"].__spec__ = None
    module.main()
