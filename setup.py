"""Package list: `configs/` lies at the top of the repository and is installed inside the package."""

from setuptools import find_namespace_packages, find_packages, setup

setup(
    packages=[
        *find_packages(include=["primeflow_perturbench*"]),
        "primeflow_perturbench.configs",
        *find_namespace_packages(include=["hydra_plugins*"]),
    ]
)
