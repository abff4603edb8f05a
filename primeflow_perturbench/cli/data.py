"""``primeflow data``: download the data of PerturBench, check a file, preprocess counts, split for finetuning."""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from primeflow_perturbench.cli.common import INTERRUPTED, Parser, answering, at_least, make_console

# Exit status: the checked file has errors.
WILL_NOT_TRAIN = 1


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(prog="primeflow data", description="Get and check data for training.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _add_download(commands)
    _add_check(commands)
    _add_preprocess(commands)
    _add_split(commands)
    chosen = parser.parse_args()
    if chosen.command is None:
        parser.print_help()
        sys.exit()
    return chosen


def main() -> None:
    """Run the subcommand."""
    chosen = parse()
    console = make_console()
    work = {"download": _download, "check": _check, "preprocess": _preprocess, "split": _split}[chosen.command]
    answering(lambda: work(chosen, console))


def _add_download(commands: argparse._SubParsersAction) -> None:
    text = "download, verify and unpack data sets of PerturBench; run it again to continue after an interruption"
    parser = commands.add_parser("download", help=text, description=text)
    parser.add_argument("names", nargs="*", metavar="NAME", help="names of data sets, or all")
    parser.add_argument("--list", action="store_true", help="list the data sets and exit")
    parser.add_argument("--folder", help="folder for the files (default: $PRIMEFLOW_DATA, or data)")
    parser.add_argument(
        "--revision",
        help="branch, tag or commit of the repository (default: the one in the folder's lock file, or main)",
    )
    parser.add_argument("--force", action="store_true", help="download files again that exist")
    parser.add_argument("--keep", action="store_true", help="also keep the compressed files")


def _add_check(commands: argparse._SubParsersAction) -> None:
    text = "check column by column whether a model can train on a file; exit status 1 if it cannot"
    parser = commands.add_parser("check", help=text, description=text)
    parser.add_argument(
        "file", help="h5ad file of log1p expression, or manifest of an atlas (.yaml), which names the columns itself"
    )
    _add_columns(parser)


def _add_preprocess(commands: argparse._SubParsersAction) -> None:
    text = "prepare raw counts for training: select variable genes, normalize, take log1p"
    parser = commands.add_parser("preprocess", help=text, description=text)
    parser.add_argument("source", help="h5ad file of raw counts")
    parser.add_argument("target", help="h5ad file to write")
    _add_columns(parser)
    parser.add_argument("--counts-layer", help="layer with the raw counts (default: X)")
    parser.add_argument(
        "--library-size-key",
        help="obs column with the total counts of each cell, for a panel of genes (default: the sum of its counts)",
    )
    parser.add_argument(
        "--n-top-genes",
        type=at_least(0),
        default=4000,
        help="number of highly variable genes to keep (default: %(default)s)",
    )
    parser.add_argument(
        "--n-de-genes",
        type=at_least(0),
        default=50,
        help="differentially expressed genes to keep per covariate group and perturbation (default: %(default)s)",
    )
    parser.add_argument(
        "--target-sum",
        type=float,
        default=1e4,
        help="total counts of a cell after normalization (default: %(default)s)",
    )


def _add_split(commands: argparse._SubParsersAction) -> None:
    text = "write a split file (data/splitter=saved) for finetuning to a context, or for pretraining without it"
    parser = commands.add_parser("split", help=text, description=text)
    parser.add_argument("file", help="h5ad file with cells of several contexts")
    parser.add_argument("target", help="CSV to write: cell and split, which is empty for unused cells")
    parser.add_argument(
        "--task",
        choices=["narrow", "set_apart"],
        default="narrow",
        help="narrow: train on the context, and on the test perturbations as measured in other contexts; set_apart: "
        "train on everything but the context (default: %(default)s)",
    )
    parser.add_argument(
        "--context",
        nargs="+",
        required=True,
        metavar="COLUMN=VALUE",
        help="context in which perturbations are to be predicted",
    )
    parser.add_argument(
        "--test-perturbations",
        metavar="CSV",
        help="narrow: labels to predict in the context: one per line, or a table with the perturbation column",
    )
    _add_labels(parser)
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=0.1,
        help="fraction of the context's other perturbations for validation (default: %(default)s)",
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="random seed (default: %(default)s)")


def _add_columns(parser: argparse.ArgumentParser) -> None:
    _add_labels(parser)
    parser.add_argument("--covariate-keys", nargs="*", default=[], help="covariate columns of obs (default: none)")


def _add_labels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--perturbation-key", default="condition", help="perturbation column of obs (default: %(default)s)"
    )
    parser.add_argument("--control", default="control", help="label of control cells (default: %(default)s)")
    parser.add_argument(
        "--delimiter",
        type=lambda text: text or None,
        default="+",
        help="text between the parts of a combination, or '' (default: %(default)s)",
    )


def _download(chosen: argparse.Namespace, console: Console) -> None:
    from primeflow_perturbench.data.download import dataset_table, download
    from primeflow_perturbench.errors import InputError

    if chosen.list:
        table, problem = dataset_table(chosen.folder, chosen.revision)
        console.print(table)
        if problem:
            console.print(f"No sizes: {problem}")
        return
    if not chosen.names:
        raise InputError("primeflow data download: found no names, expected data sets or all; --list shows them")
    try:
        download(
            chosen.names,
            chosen.folder,
            revision=chosen.revision,
            force=chosen.force,
            keep=chosen.keep,
            console=console,
        )
    except KeyboardInterrupt:
        console.print("Interrupted. The same command downloads the files that are missing.")
        sys.exit(INTERRUPTED)


def _check(chosen: argparse.Namespace, console: Console) -> None:
    from primeflow_perturbench.data.check_report import check_table
    from primeflow_perturbench.data.checks import check_anndata, read_h5ad

    if chosen.file.endswith((".yaml", ".yml")):
        from primeflow_perturbench.data.atlas.report import check_atlas

        table, errors = check_atlas(chosen.file)
        _report(console, chosen.file, table, errors, [])
        return
    columns = {
        "filename": chosen.file,
        "perturbation_key": chosen.perturbation_key,
        "perturbation_control_value": chosen.control,
        "covariate_keys": chosen.covariate_keys,
        "perturbation_combination_delimiter": chosen.delimiter,
    }
    adata = read_h5ad(chosen.file, backed=True)
    findings = check_anndata(adata, **columns)
    errors, warnings = (
        [finding.sentence for finding in findings if finding.level == level] for level in ("error", "warning")
    )
    _report(console, chosen.file, check_table(adata, findings, **columns), errors, warnings)


def _report(console: Console, file: str, table: Table, errors: Sequence[str], warnings: Sequence[str]) -> None:
    """Print a table, its messages and whether a model can train on the file; exit if it cannot."""
    from primeflow_perturbench.console import flagged
    from primeflow_perturbench.errors import counted

    console.print(table)
    for level, messages in (("error", errors), ("warning", warnings)):
        for message in messages:
            console.print(flagged(level, message))
    outcome = f"will not train: {counted(errors, 'error')}" if errors else "will train"
    if warnings and not errors:
        outcome += f", with {counted(warnings, 'warning')}"
    console.print(f"{file} {outcome}", style="bold")
    if errors:
        sys.exit(WILL_NOT_TRAIN)


def _preprocess(chosen: argparse.Namespace, console: Console) -> None:
    from primeflow_perturbench.data.preprocess import preprocess

    settings = vars(chosen)
    del settings["command"]
    preprocess(settings.pop("source"), settings.pop("target"), **settings, console=console)


def _split(chosen: argparse.Namespace, console: Console) -> None:
    from primeflow_perturbench.data.splits import read_context, read_labels, write_split
    from primeflow_perturbench.errors import InputError

    settings = vars(chosen)
    labels = settings.pop("test_perturbations")
    if chosen.task == "narrow":
        if labels is None:
            raise InputError(
                "primeflow data split --task narrow: found no --test-perturbations, expected a CSV of labels"
            )
        settings["test"] = read_labels(labels, chosen.perturbation_key)
    settings["context"] = read_context(chosen.context)
    del settings["command"]
    write_split(settings.pop("file"), settings.pop("target"), **settings, console=console)
