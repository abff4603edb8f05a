"""A stand-in for PerturBench: its names, its interface and its limits.

Made for tests. Readers, draws and scores come from the embedded subset, but everything that the subset offers beyond
PerturBench is hidden, and what PerturBench refuses is refused here, so that code which leans on more fails as it would
in a real installation.
"""
