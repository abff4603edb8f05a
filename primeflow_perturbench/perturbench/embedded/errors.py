"""The error of the embedded subset."""


class DataError(ValueError):
    """Invalid data or settings; the message is one sentence for the user."""
