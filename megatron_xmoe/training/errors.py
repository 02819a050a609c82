"""What a user caused, told in one line."""

import traceback

HINTS = {
    "OptimizerParamScheduler": ". Fix: give the options of the run that was saved, --override-opt-param-scheduler to "
    "use this run's instead, or --use-checkpoint-opt-param-scheduler to go on with the saved ones",
    "Could not find parameter group": ". Fix: --no-load-optim, if the parallel sizes of the experts have changed",
}
"""What to do about errors of Megatron's that say nothing of it, by a part of their text."""


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
        return text + next((hint for part, hint in HINTS.items() if part in text), "")
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return type(error).__name__
    place = f"{frames[-1].filename.rsplit('site-packages/', 1)[-1]}:{frames[-1].lineno}"
    return f"{type(error).__name__} in {place}: {frames[-1].line}"
