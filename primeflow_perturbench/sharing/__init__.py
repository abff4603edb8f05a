"""Trained models as folders that others can load: tensors and JSON, and nothing that runs when it is read."""
