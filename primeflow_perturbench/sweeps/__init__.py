"""Sweeps: from override grammar to trials, trials to run folders, whatever dies on the way."""
