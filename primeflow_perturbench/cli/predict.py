"""``primeflow predict``: generate the conditions of a table with a trained model. A Hydra application."""

import hydra
from omegaconf import DictConfig

from primeflow_perturbench.cli.common import answering, make_console, quieten_lightning


@hydra.main(version_base="1.3", config_path="pkg://primeflow_perturbench.configs", config_name="predict")
def main(cfg: DictConfig) -> None:
    """Run what the settings say."""
    console = make_console()

    def work() -> None:
        from primeflow_perturbench.sampling.predict import predict_run

        quieten_lightning()
        predict_run(cfg, console)

    answering(work)


if __name__ == "__main__":
    main()
