"""``python -m primeflow_perturbench`` is the ``primeflow`` command."""

from primeflow_perturbench.cli import main

main()
