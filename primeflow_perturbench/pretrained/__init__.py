"""Trained models as folders of tensors and JSON, on disk or on the Hugging Face Hub. Reading one executes no code."""
