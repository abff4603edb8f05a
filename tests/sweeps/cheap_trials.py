"""A worker of a sweep whose trials are no trainings: they write a number, or do what their setting says."""

import os
import signal
import time
from pathlib import Path

import hydra
from omegaconf import DictConfig


def work(cfg: DictConfig, console) -> None:
    """Write a table; ``fates`` says what befalls a seed."""
    fates = cfg.get("fates") or {}
    fate, folder = fates.get(f"seed{cfg.seed}"), Path(cfg.paths.output_dir)
    with (folder / "begun.txt").open("a") as begun:
        begun.write(f"{os.getpid()}\n")
    console.print(f"seed {cfg.seed}")
    first = len((folder / "begun.txt").read_text().split()) == 1
    if fate == "fails":
        raise ValueError(f"seed {cfg.seed} is one that fails\nand says so at length")
    if fate == "killed" or (fate == "killed once" and first):
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    if cfg.train:
        (folder / "checkpoints").mkdir(exist_ok=True)
        (folder / "checkpoints" / "last.ckpt").write_text(f"{cfg.seed}")
    if cfg.test:
        value = float(cfg.seed) if cfg.train else float(Path(cfg.ckpt_path).read_text()) + 0.5
        (folder / "table.csv").write_text(f",PRiMeFlow\nrmse_average,{value}\n")


@hydra.main(version_base="1.3", config_path="pkg://primeflow_perturbench.configs", config_name="train")
def main(cfg: DictConfig) -> float | None:
    from cheap_trials import work

    from primeflow_perturbench.sweeps.worker import run_trial

    return run_trial(cfg, work)


if __name__ == "__main__":
    main()
