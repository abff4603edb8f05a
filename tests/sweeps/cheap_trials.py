"""A Hydra application whose trials do not train: they write a number, or do what the setting ``fates`` says."""

import os
import signal
import time
from pathlib import Path

import hydra
from omegaconf import DictConfig

from primeflow_perturbench.sweeps.trials import run_trial


def work(cfg: DictConfig, console) -> float:
    """Write a table. ``fates`` maps ``seed0`` and so on to ``fails``, ``killed``, ``killed once`` or ``sleeps``."""
    folder = Path(cfg.paths.output_dir)
    if (folder / "table.csv").is_file():
        return float(cfg.seed)
    fate = (cfg.get("fates") or {}).get(f"seed{cfg.seed}")
    with (folder / "begun.txt").open("a") as begun:
        begun.write(f"{os.getpid()}\n")
    console.print(f"seed {cfg.seed}")
    first = len((folder / "begun.txt").read_text().split()) == 1
    if fate == "fails":
        raise ValueError(f"seed {cfg.seed} fails\nand says so at length")
    if fate == "killed" or (fate == "killed once" and first):
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    if fate == "sleeps":
        time.sleep(60)
    (folder / "table.csv").write_text(f",PRiMeFlow\nrmse_average,{cfg.seed}\n")
    return float(cfg.seed)


@hydra.main(version_base="1.3", config_path="pkg://primeflow_perturbench.configs", config_name="train")
def main(cfg: DictConfig) -> float | None:
    from cheap_trials import work

    return run_trial(cfg, work)


if __name__ == "__main__":
    main()
