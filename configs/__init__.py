"""Hydra configuration groups.

Whoever reads them, our command line or PerturBench's own, imports this package on the way and so gets the
resolvers that they use.
"""

from primeflow_perturbench.training import resolvers

resolvers.register()
