"""What a user caused, told in one line."""


class UsageError(ValueError):
    """A command line, a file or a checkpoint that cannot work: the message holds the value, the rule and the fix."""


def is_users(error: BaseException, in_preparation: bool) -> bool:
    """Whether an error is the user's, to be told without a traceback.

    Args:
        error: what was raised.
        in_preparation: before the training started, Megatron's validation speaks through these types as well.
    """
    if isinstance(error, UsageError):
        return True
    return in_preparation and isinstance(error, AssertionError | ValueError | OSError | RuntimeError | KeyError)


def one_line(error: BaseException) -> str:
    """The message of an error on a single line, with the place it comes from when it has no message."""
    text = " ".join(str(error).split())
    if text:
        return text
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    if frame is None:
        return type(error).__name__
    code = frame.tb_frame.f_code
    return f"{type(error).__name__} in {code.co_filename.rsplit('site-packages/', 1)[-1]}:{frame.tb_lineno}"
