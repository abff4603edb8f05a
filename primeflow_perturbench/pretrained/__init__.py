"""Folders of models to share: save, load, hub and model card."""
