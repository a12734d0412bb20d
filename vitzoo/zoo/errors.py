"""What goes wrong with weights, each with a sentence that says what to do."""

from vitzoo.errors import InputError


class WeightsError(InputError):
    """Weights could not be had or must not be used."""


class CorruptFileError(WeightsError):
    """A file's content is not what its source published, or no weights; it has been removed."""


class UnsafeFileError(WeightsError):
    """A pickle that holds more than tensors; it was not executed."""


class TransientError(Exception):
    """A failure that may pass: worth another try at the same source."""
