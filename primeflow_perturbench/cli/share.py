"""``primeflow share``: write a trained model as a folder that others can load."""

import argparse
import math
from pathlib import Path
from typing import Any

from primeflow_perturbench.cli.common import Parser, answering, make_console, quieten_lightning


def parse() -> argparse.Namespace:
    """Arguments of the command line."""
    parser = Parser(
        prog="primeflow share",
        description="Write a trained model as a folder of tensors and JSON, for PRiMeFlow.from_pretrained, "
        "primeflow predict ckpt_path=FOLDER, or the Hugging Face Hub.",
    )
    parser.add_argument("checkpoint", type=Path, help="checkpoint of a run, such as runs/NAME/checkpoints/last.ckpt")
    parser.add_argument("--output", dest="folder", type=Path, required=True, help="folder to write")
    parser.add_argument("--license", help="identifier of the model's license, such as bsd-3-clause")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder of a shared model")
    parser.add_argument(
        "--trust-checkpoint", action="store_true", help="load any object in the checkpoint, which can execute code"
    )
    return parser.parse_args()


def main() -> None:
    """Run the command."""
    chosen = parse()
    console = make_console()

    def work() -> None:
        quieten_lightning()
        share_checkpoint(**vars(chosen))
        console.print(f"The model is in {chosen.folder}")

    answering(work)


def share_checkpoint(
    checkpoint: Path,
    folder: Path,
    overwrite: bool = False,
    license: str | None = None,
    trust_checkpoint: bool = False,
) -> None:
    """Write the model of a checkpoint as a folder, with the data and metrics of its run.

    Parameters
    ----------
    checkpoint
        Checkpoint of a run; its averaged weights are used if there are any.
    folder, overwrite, license
        As for `pretrained.save.save_model`.
    trust_checkpoint
        Whether to unpickle objects of any class, which can execute code.

    Raises
    ------
    InputError, DataError
        If the checkpoint is missing or not a PRiMeFlow model, or the folder cannot be replaced.
    """
    from primeflow_perturbench.errors import InputError
    from primeflow_perturbench.model import PRiMeFlow
    from primeflow_perturbench.pretrained.checkpoint import build_model, config_beside, read_checkpoint

    if checkpoint.is_dir():
        raise InputError(f"{checkpoint} is a folder, expected a checkpoint; a shared model can be copied as it is")
    content = read_checkpoint(checkpoint, trust_checkpoint)
    if "primeflow" not in content:
        raise InputError(
            f"{checkpoint} is not a PRiMeFlow model, and only PRiMeFlow can be shared; give another checkpoint"
        )
    model = build_model(PRiMeFlow, checkpoint, content)
    run = config_beside(checkpoint).parent
    model.save_pretrained(folder, overwrite=overwrite, license=license, data=run_data(run), metrics=run_metrics(run))


def run_data(run: Path) -> dict[str, Any] | None:
    """The record of its data in a run's ``environment.json``; ``None`` if there is none."""
    from primeflow_perturbench.files import read_json

    path = run / "environment.json"
    record = read_json(path) if path.is_file() else {}
    return record.get("data") if isinstance(record, dict) else None


def run_metrics(run: Path) -> dict[str, float] | None:
    """The finite metrics in a run's ``summary.csv``; ``None`` if there are none."""
    import pandas as pd

    path = run / "summary.csv"
    if not path.is_file():
        return None
    summary = pd.read_csv(path, index_col=0).iloc[:, 0]
    return {str(name): float(value) for name, value in summary.items() if math.isfinite(value)}


if __name__ == "__main__":
    main()
