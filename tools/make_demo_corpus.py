#!/usr/bin/env python3
"""Builds a small text corpus from what every Python installation has: its own standard library.

The corpus is for trying the tools and the training loop where nothing can be downloaded. It holds the
library's sources, the language reference that `pydoc` carries, and the licence and other text files next to
them. The same interpreter always gives the same bytes.
"""

import argparse
import json
import os
import sys
import sysconfig
from collections.abc import Iterator

from command_line import OneLineErrorParser, UserError, finished_files, positive_number, run_tool

PROG = "tools/make_demo_corpus.py"
TEXT_SUFFIXES = (".py", ".txt", ".rst")
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
TOPICS_FILE = "pydoc_data/topics.py"
BYTES_PER_MEGABYTE = 1_000_000


def library_files(root: str) -> list[str]:
    """Lists the text files under `root`, as sorted paths relative to it."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        for name in names:
            # _sysconfigdata holds the paths and compiler flags of this machine, not prose or code.
            if name.endswith(TEXT_SUFFIXES) and not name.startswith("_sysconfigdata"):
                found.append(os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/"))
    return sorted(found)


def reference_topics() -> Iterator[tuple[str, str]]:
    """Yields the chapters of the language reference that `pydoc` shows, each as (source, text)."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # a stripped-down installation
        return
    for name in sorted(topics):
        yield f"{TOPICS_FILE}#{name}", topics[name]


def library_documents(root: str) -> Iterator[tuple[str, str]]:
    """Yields (source, text) of every document in a fixed order; a file that is not UTF-8 is left out."""
    for relative in library_files(root):
        if relative == TOPICS_FILE:
            # The file is one huge dict literal: its values are the text.
            yield from reference_topics()
            continue
        try:
            with open(os.path.join(root, relative), encoding="utf-8", newline="") as file:
                text = file.read()
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip():
            yield relative, text


def write_corpus(path: str, root: str, limit: int) -> tuple[int, int]:
    """Writes the documents that fit in `limit` bytes as JSON lines and returns (documents, bytes written)."""
    documents = size = 0
    with finished_files(path) as (unfinished,), open(unfinished, "wb") as file:
        for source, text in library_documents(root):
            line = (json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n").encode()
            if size + len(line) > limit:
                break
            file.write(line)
            documents += 1
            size += len(line)
        if not documents:
            raise UserError(
                f"no document of {root} fits in {limit} bytes: raise --max-megabytes, or use a Python "
                "that has its standard library as .py files"
            )
    return documents, size


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    example = f"""example:
  python {PROG} --output demo
  python tools/train_tokenizer.py --input demo/corpus.jsonl --output demo/tokenizer --vocab-size 4096"""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = OneLineErrorParser(prog=PROG, description=__doc__, epilog=example, formatter_class=formatter)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of corpus.jsonl")
    parser.add_argument(
        "--max-megabytes",
        type=positive_number(float),
        default=12,
        metavar="N",
        help="stop before corpus.jsonl exceeds N * 10^6 bytes (default: 12, about the whole library)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Entry point; raises UserError for what the user can fix."""
    args = parse_arguments(argv)
    os.makedirs(args.output, exist_ok=True)
    path = os.path.join(args.output, "corpus.jsonl")
    limit = int(args.max_megabytes * BYTES_PER_MEGABYTE)
    documents, size = write_corpus(path, sysconfig.get_path("stdlib"), limit)
    print(f"{path}: {documents} documents, {size} bytes")


if __name__ == "__main__":
    sys.exit(run_tool(PROG, main))
