"""Shows the configurations of PRiMeFlow to PerturBench's own command line.

Hydra imports every module of the namespace package ``hydra_plugins`` in every Hydra application of the
environment, so this one imports nothing but Hydra and keeps away from applications other than PerturBench's.
"""

from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

HOST = "perturbench"
PROVIDER = "primeflow-perturbench"
CONFIGS = "pkg://primeflow_perturbench.configs"


class PRiMeFlowSearchPath(SearchPathPlugin):
    """Appends our configurations where the application's own are PerturBench's; theirs win where names are equal."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """See `SearchPathPlugin`."""
        main = next((entry.path for entry in search_path.get_path() if entry.provider == "main"), None)
        if main is not None and of_host(main):
            search_path.append(provider=PROVIDER, path=CONFIGS)


def of_host(path: str) -> bool:
    """Whether a folder of configurations, as a package ``pkg://...`` or a path, lies in the package PerturBench."""
    scheme, _, rest = path.rpartition("://")
    if scheme == "pkg":
        # Hydra writes pkg://package/folder where it derives the path from the module of a console script.
        return rest.replace("/", ".").split(".")[0] == HOST
    parents = Path(rest).parents
    return any(folder.name == HOST and (folder / "modelcore").is_dir() for folder in parents)
