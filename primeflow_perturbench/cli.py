"""The ``primeflow`` command."""

import argparse
import sys
from collections.abc import Callable

COMMANDS = {
    "train": "train a model on an h5ad file, generate the held-out conditions and score them",
    "predict": "generate the conditions of a table with a trained model",
    "evaluate": "score predicted cells against measured ones, without a model",
}

EXAMPLES = """\
examples:
  primeflow train experiment=quickstart
  primeflow train experiment=devel/transfer data.data.filename=cells.h5ad
  primeflow predict ckpt_path=runs/NAME/checkpoints/last.ckpt prediction_dataframe_path=conditions.csv
  primeflow evaluate predicted.h5ad measured.h5ad --covariate-keys cell_type

Settings are Hydra overrides (`primeflow train --help` lists them; `--cfg job` prints a composed configuration).
"""


def main() -> None:
    """Entry point: hand over to the subcommand."""
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
    sys.argv = [f"primeflow {chosen.command}", *sys.argv[2:]]
    {"train": _train, "predict": _predict, "evaluate": _evaluate}[chosen.command]()


def _train() -> None:
    _hydra("train")


def _predict() -> None:
    _hydra("predict")


def _hydra(name: str) -> None:
    """Run a Hydra application of ours by its root configuration."""
    import hydra

    from primeflow_perturbench import resolvers

    resolvers.register()

    @hydra.main(version_base="1.3", config_path="pkg://primeflow_perturbench.configs", config_name=name)
    def application(cfg):
        from primeflow_perturbench import runs

        console = _console()
        run = {"train": runs.train_run, "predict": runs.predict_run}[name]
        _answering(lambda: run(cfg, console))

    application()


def _console():
    """Console for people; quiet libraries, our warnings in plain sentences."""
    import logging
    import warnings

    from rich.console import Console
    from rich.logging import RichHandler

    console = Console()
    handler = RichHandler(console=console, show_time=False, show_path=False, markup=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    for library in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    return console


def _answering(work: Callable[[], object]) -> None:
    """Do the work; bad input ends with one sentence and status 2, an interruption with a hint."""
    from hydra.errors import InstantiationException
    from omegaconf.errors import MissingMandatoryValue

    from primeflow_perturbench.benchmark.embedded.errors import DataError
    from primeflow_perturbench.errors import InputError

    try:
        work()
    except MissingMandatoryValue as error:
        _refuse(f"{error.full_key} must be given: add {error.full_key}=VALUE")
    except InstantiationException as error:
        # A wrong value or an unknown name in the settings; anything else is a fault of ours and shows its trace.
        if isinstance(error.__cause__, ValueError | TypeError):
            _refuse(str(error.__cause__))
        raise
    except (InputError, DataError) as error:
        _refuse(str(error))


def _refuse(sentence: str) -> None:
    from rich.console import Console

    Console(stderr=True).print(f"[bold red]error:[/bold red] {sentence}", highlight=False, soft_wrap=True)
    sys.exit(2)


def _evaluate() -> None:
    """Score a file of predicted cells against a file of measured ones."""
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
    chosen = parser.parse_args(sys.argv[1:])
    from primeflow_perturbench import runs

    console = _console()
    columns = {
        "perturbation_key": chosen.perturbation_key,
        "covariate_keys": chosen.covariate_keys,
        "perturbation_control_value": chosen.control,
    }
    _answering(
        lambda: runs.evaluate_files(
            chosen.predicted,
            chosen.measured,
            columns,
            chosen.pipelines,
            console,
            synthetic_controls=chosen.synthetic_controls,
            output=chosen.output,
        )
    )


if __name__ == "__main__":
    main()
