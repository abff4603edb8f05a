"""``primeflow share``: write a trained model as a folder that others can load."""

import argparse
from pathlib import Path

from primeflow_perturbench.cli.common import answering, make_console, quieten_lightning


def parse() -> argparse.Namespace:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(
        prog="primeflow share",
        description="Write a trained model as a folder of tensors and JSON, for PRiMeFlow.from_pretrained, "
        "primeflow predict ckpt_path=FOLDER, or the Hugging Face hub.",
    )
    parser.add_argument("checkpoint", type=Path, help="checkpoint of a run, such as runs/NAME/checkpoints/last.ckpt")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--license", help="identifier of its licence, such as bsd-3-clause")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder of a shared model")
    return parser.parse_args()


def main() -> None:
    """Share the checkpoint of the command line."""
    chosen = parse()
    console = make_console()

    def work() -> None:
        from primeflow_perturbench.pretrained.from_run import share_checkpoint

        quieten_lightning()
        share_checkpoint(chosen.checkpoint, chosen.output, chosen.overwrite, chosen.license)
        console.print(f"The model is in {chosen.output}", highlight=False, soft_wrap=True, markup=False)

    answering(work)


if __name__ == "__main__":
    main()
