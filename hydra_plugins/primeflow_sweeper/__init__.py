"""A sweeper that hands a written list of trials to the launcher of the configuration.

Hydra imports every module of the namespace package ``hydra_plugins`` in every Hydra application of the
environment, so this one imports nothing but Hydra.
"""

import json
from pathlib import Path

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class ListSweeper(Sweeper):
    """Launches trials that need not be a product of choices.

    Parameters
    ----------
    trials
        JSON file, a list of the overrides of each trial.
    params
        Ignored: the trials have been made of them.
    """

    def __init__(self, trials: str, params: DictConfig | None = None):
        self.trials = Path(trials)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """See `Sweeper`."""
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> object:
        """Launch the trials, each with the arguments of the command line too."""
        trials = [[*arguments, *overrides] for overrides in json.loads(self.trials.read_text())]
        return self.launcher.launch(trials, initial_job_idx=0)
