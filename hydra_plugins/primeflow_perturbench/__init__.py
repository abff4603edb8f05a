"""Makes PRiMeFlow's configurations available to PerturBench's own command line.

Hydra imports every module of the namespace package ``hydra_plugins`` in every Hydra application of the environment.
This one therefore imports nothing but Hydra and changes nothing in applications other than PerturBench's.
"""

from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

PERTURBENCH = "perturbench"
PROVIDER = "primeflow-perturbench"
CONFIGS = "pkg://primeflow_perturbench.configs"


class PRiMeFlowSearchPath(SearchPathPlugin):
    """Append our configurations to PerturBench's; of two with the same name, Hydra takes PerturBench's."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """See `SearchPathPlugin`."""
        main = next((entry.path for entry in search_path.get_path() if entry.provider == "main"), None)
        if main is not None and lies_in_perturbench(main):
            search_path.append(provider=PROVIDER, path=CONFIGS)


def lies_in_perturbench(path: str) -> bool:
    """Whether a search path, ``pkg://package`` or a folder, belongs to the package PerturBench."""
    scheme, _, rest = path.rpartition("://")
    if scheme == "pkg":
        # Hydra writes pkg://package/folder if it derives the path from the module of a console script.
        return rest.replace("/", ".").split(".")[0] == PERTURBENCH
    return any(folder.name == PERTURBENCH and (folder / "modelcore").is_dir() for folder in Path(rest).parents)
