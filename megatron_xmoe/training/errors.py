"""What a user caused, told in one line."""

import traceback


class UsageError(ValueError):
    """A command line, a file or a checkpoint that cannot work: the message holds the value, the rule and the fix."""


def is_users(error: BaseException, before_training: bool) -> bool:
    """Whether an error is to be told without a traceback.

    Args:
        error: what was raised.
        before_training: until the first forward pass, Megatron's own checks speak through these types.
    """
    if isinstance(error, UsageError):
        return True
    return before_training and isinstance(error, AssertionError | ValueError | OSError | RuntimeError | KeyError)


def one_line(error: BaseException) -> str:
    """The message of an error on a single line; of an error without one, the place and the code that raised it."""
    text = " ".join(str(error).split())
    if text:
        return text
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return type(error).__name__
    place = f"{frames[-1].filename.rsplit('site-packages/', 1)[-1]}:{frames[-1].lineno}"
    return f"{type(error).__name__} in {place}: {frames[-1].line}"
