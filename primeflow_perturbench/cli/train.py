"""``primeflow train``: train, generate the held-out conditions and score them. A Hydra application."""

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console

from primeflow_perturbench.cli.application import run_application
from primeflow_perturbench.cli.common import answering, make_console, quieten_lightning
from primeflow_perturbench.sweeps.trials import objective_value, run_trial


def train(cfg: DictConfig, console: Console) -> float | None:
    """Train and test; return the objective of settings that have one."""
    from primeflow_perturbench.training.run import train_run

    quieten_lightning()
    summary = train_run(cfg, console)
    return objective_value(summary, cfg.objective) if summary is not None and cfg.get("objective") else None


def application(cfg: DictConfig) -> float | None:
    """Run one training, or a trial of a multirun; a sweeper of Hydra receives the trial's objective."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return run_trial(cfg, train)
    console = make_console()
    answering(lambda: train(cfg, console))
    return None


def main() -> None:
    """Run the command."""
    run_application(application, "train")


if __name__ == "__main__":
    main()
