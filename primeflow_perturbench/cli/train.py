"""``primeflow train``: train, generate the held-out conditions and score them: a Hydra application."""

import hydra
from omegaconf import DictConfig

from primeflow_perturbench.cli.common import answering, make_console, quieten_lightning


@hydra.main(version_base="1.3", config_path="pkg://primeflow_perturbench.configs", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Run what the settings say; a sweeper of Hydra's gets the objective of settings that have one."""
    console = make_console()
    objective = None

    def work() -> None:
        nonlocal objective
        from primeflow_perturbench.sweeps.objective import objective_value
        from primeflow_perturbench.training.run import train_run

        quieten_lightning()
        summary = train_run(cfg, console)
        if summary is not None and cfg.get("objective"):
            objective = objective_value(summary, cfg.objective)

    answering(work)
    return objective


if __name__ == "__main__":
    main()
