"""Errors of the embedded benchmark."""


class DataError(ValueError):
    """Bad input data or settings, said in one sentence for the person at the keyboard."""
