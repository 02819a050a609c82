"""Reading documents from JSONL and plain text files, with the place of every one that cannot be read."""

import json
import os
from collections.abc import Iterator
from typing import NamedTuple

from command_line import UserError


class BadDocument(UserError):
    """A document that cannot be read; the message starts with `file:line:`."""


class Document(NamedTuple):
    """A document as it stands in its file: `line` is the number of its first line, counted from 1."""

    path: str
    line: int
    raw: bytes


def check_inputs(paths: list[str]) -> None:
    """Raises UserError for an input that is missing, is a folder or has no bytes."""
    for path in paths:
        if not os.path.isfile(path):
            raise UserError(f"--input {path} is not a file: give JSONL or .txt files")
        if not os.path.getsize(path):
            raise UserError(f"--input {path} is empty: leave it out or fill it")


def is_plain_text(path: str) -> bool:
    """Tells a plain text file from JSONL by its name."""
    return path.endswith(".txt")


def read_documents(path: str, txt_document: str) -> Iterator[Document]:
    """Yields a file's documents in order: the lines of JSONL; plain text whole, by line or by paragraph."""
    with open(path, "rb") as file:
        if is_plain_text(path) and txt_document == "file":
            yield Document(path, 1, file.read())
            return
        by_line = not is_plain_text(path) or txt_document == "line"
        first, block = 1, []
        for number, line in enumerate(file, start=1):
            if by_line:
                yield Document(path, number, line)
            elif line.strip():
                first = first if block else number
                block.append(line)
            elif block:
                yield Document(path, first, b"".join(block))
                block = []
        if block:
            yield Document(path, first, b"".join(block))


def document_text(document: Document, json_key: str, txt_document: str) -> str:
    """Returns the text of a document, "" for a blank line; raises BadDocument with file, line and reason."""
    raw = document.raw.removeprefix(b"\xef\xbb\xbf") if document.line == 1 else document.raw
    try:
        decoded = raw.decode()
    except UnicodeDecodeError as error:
        line = document.line + raw.count(b"\n", 0, error.start)
        raise BadDocument(f"{document.path}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8") from None
    if is_plain_text(document.path):
        return decoded if txt_document == "file" else decoded.rstrip("\r\n")
    return json_text(decoded, json_key, f"{document.path}:{document.line}") if decoded.strip() else ""


def json_text(line: str, json_key: str, place: str) -> str:
    """Returns the string under `json_key` of a JSON object; `place` opens the message of BadDocument."""
    try:
        record = json.loads(line.strip())
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise BadDocument(f"{place}: not JSON ({reason}); plain text needs a name ending in .txt") from None
    if not isinstance(record, dict):
        raise BadDocument(f"{place}: JSON {type(record).__name__}, not an object with the key {json_key!r}")
    if json_key not in record:
        keys = ", ".join(sorted(record)[:8])
        raise BadDocument(f"{place}: no key {json_key!r} but {keys or 'none'}; set --json-key")
    text = record[json_key]
    if not isinstance(text, str):
        raise BadDocument(f"{place}: {json_key!r} holds {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadDocument(f"{place}: half a surrogate pair at character {error.start}") from None
    return text
