"""Every error this package raises on purpose, under one base class.

Each message is one readable sentence: what went wrong, where, and what to do about it.
"""


class AttnResError(Exception):
    """Base class of all errors raised by attnres_compile."""


class ConfigError(AttnResError, ValueError):
    """The options contradict each other or do not fit the model."""


class InputError(AttnResError, ValueError):
    """The model or its example inputs cannot be used as given."""


class CaptureError(AttnResError, RuntimeError):
    """The model could not be captured whole as one graph."""


class NothingToConvertError(AttnResError, ValueError):
    """The model has no residual stream that can be converted; the refusals say why."""


class AlreadyConvertedError(AttnResError, ValueError):
    """The model has Attention Residuals already."""


class MismatchError(AttnResError, RuntimeError):
    """A captured graph does not contain exactly the sites of the plan."""


class UnconvertedPathError(AttnResError, RuntimeError):
    """A path was taken on which the unconverted network would have been computed."""


class BackendError(AttnResError, RuntimeError):
    """The `attnres` compile backend cannot do what it was asked."""


class CheckpointError(AttnResError, ValueError):
    """A saved file is damaged, foreign, or does not belong to the model."""


class UnsafeFileError(CheckpointError):
    """Opening a saved file would run code, or leave the folder that it may use."""


class OutputError(AttnResError):
    """A file or directory cannot be written."""


class OutputExistsError(OutputError):
    """An output exists already, and nobody asked to replace it."""


def in_words(error: BaseException, longest: int = 200) -> str:
    """What somebody else's exception says, as the end of a sentence of ours.

    Example:
        >>> in_words(KeyError("gone")), in_words(RuntimeError("no such thing\\nat line 3"))
        ("KeyError: 'gone'.", 'no such thing at line 3.')
    """
    text = " ".join(str(error).split())
    if isinstance(error, KeyError) or not text:
        text = f"{type(error).__name__}: {text}"
    shown = text if len(text) <= longest else f"{text[: longest - 3]}..."
    return shown.rstrip(".: ") + "."
