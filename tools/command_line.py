"""What the data tools' command lines share: errors in one line, output that is whole or absent, a clean end."""

import argparse
import contextlib
import math
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import NoReturn


class UserError(Exception):
    """Something the user can fix; the message gives the value, the rule and the fix."""


class OneLineErrorParser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line, without the usage."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive_number(kind: type) -> Callable[[str], float]:
    """Returns an argparse type for numbers above zero."""

    def parse(text: str) -> float:
        if not 0 < (value := kind(text)) < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
        return value

    parse.__name__ = kind.__name__  # argparse shows it when `kind` cannot read the text
    return parse


def output_folder(path: str) -> str:
    """Returns the folder an output file goes to; raises UserError if there is none."""
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is not a folder: the output goes there, so make it first")
    return folder


@contextlib.contextmanager
def finished_files(*paths: str) -> Iterator[list[str]]:
    """Yields a temporary path for each of `paths` (of one folder) and renames them if the block succeeds."""
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=output_folder(paths[0])) as temporary:
        unfinished = [os.path.join(temporary, os.path.basename(path)) for path in paths]
        yield unfinished
        for source, path in zip(unfinished, paths, strict=True):
            os.replace(source, path)


def run_tool(prog: str, main: Callable[[list[str] | None], int | None], argv: list[str] | None = None) -> int:
    """Runs a tool's `main` and returns its exit code: 2 and one line on stderr for what the user can fix.

    `main` may return an exit code of its own; None means 0.
    """
    # A batch system ends a job with SIGTERM: clean up as for Ctrl-C.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = main(argv)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; nothing was written", file=sys.stderr)
        return 130
    except (UserError, OSError) as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        signal.signal(signal.SIGTERM, previous)
    return code or 0
