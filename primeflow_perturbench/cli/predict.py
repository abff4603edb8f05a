"""``primeflow predict``: generate the conditions of a table with a trained model. A Hydra application."""

from omegaconf import DictConfig

from primeflow_perturbench.cli.application import run_application
from primeflow_perturbench.cli.common import answering, make_console, quieten_lightning


def predict(cfg: DictConfig) -> None:
    """Run what the settings say."""
    console = make_console()

    def work() -> None:
        from primeflow_perturbench.sampling.predict import predict_run

        quieten_lightning()
        predict_run(cfg, console)

    answering(work)


def main() -> None:
    """Run the command."""
    run_application(predict, "predict")


if __name__ == "__main__":
    main()
