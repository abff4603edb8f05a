"""Errors meant for the person at the keyboard."""


class InputError(ValueError):
    """Bad input, said in one sentence for the person at the keyboard.

    The sentence names the file, the column or the gene, what was found, what was expected and the mend.
    A command line shows it without a traceback.
    """
