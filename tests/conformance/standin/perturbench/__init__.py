"""A stand-in for PerturBench with its interface and nothing else.

Made for tests: its parts come from the embedded subset, but what that offers on top is hidden, so that a model
which leans on it fails here as it would in a real installation.
"""
