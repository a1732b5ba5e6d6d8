"""The errors qjax raises on purpose.

Each message names the thing, the value, the allowed set and the next step. The CLI turns
any of them into one sentence on stderr and exit code 2.
"""


class QJaxError(ValueError):
    """Base of every error that a caller's input can cause."""


class ConfigError(QJaxError):
    """A recipe is wrong: unknown preset, key or format, or a rule that fits nothing."""


class DataError(QJaxError):
    """Arrays, prompts or texts are wrong: not finite, empty, too long, missing."""


class CheckpointError(QJaxError):
    """A checkpoint is missing, foreign, damaged, or newer than this version reads."""


def one_of(what: str, value: object, allowed: object, error: type[QJaxError] = ConfigError) -> str:
    """Return `value` if it is one of `allowed` (a collection of names), else raise.

    Args:
      what: what the value is, for the message: 'format', 'preset'.
      value: the name given.
      allowed: the names that exist.
      error: the class to raise.

    Raises:
      QJaxError: of class `error`, listing what is allowed.
    """
    names = sorted(str(name) for name in allowed)  # type: ignore[attr-defined]
    if isinstance(value, str) and value in names:
        return value
    raise error(f"unknown {what} {value!r}; choose one of: {', '.join(names)}")
