#!/usr/bin/env python3
"""Turns text into the token files Megatron trains on: PREFIX.bin, PREFIX.idx and PREFIX.json.

Input is JSONL (one object a line) or plain text (files named *.txt). PREFIX.json names the tokenizer, so that
training with another vocabulary can be refused. Blank documents are left out and counted. The output does not
depend on the number of workers, and nothing is written unless everything succeeds.
"""

import argparse
import contextlib
import hashlib
import json
import logging
import multiprocessing
import os
import signal
import sys
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

from command_line import OneLineErrorParser, UserError, finished_files, positive_number, run_tool
from documents import BadDocument, Document, check_inputs, document_text, read_documents

PROG = "tools/preprocess_data.py"
SIDECAR_FORMAT = "megatron_xmoe.data.v1"
BATCH_BYTES = 1 << 20
BAD_LINES_SHOWN = 10
EPILOG = f"""\
TYPE is SentencePieceTokenizer, HuggingFaceTokenizer, GPT2BPETokenizer, NullTokenizer or another one.
Megatron's other tokenizer arguments are taken as well and mean what they mean in training: --vocab-size (of
NullTokenizer), --vocab-file, --merge-file, --tokenizer-special-tokens, --tokenizer-hf-no-use-fast and so on.

example:
  python {PROG} --input demo/corpus.jsonl --output-prefix demo/data --workers 8 \\
    --tokenizer-type SentencePieceTokenizer --tokenizer-model demo/tokenizer.model
then train with
  --data-path demo/data --tokenizer-type SentencePieceTokenizer --tokenizer-model demo/tokenizer.model"""


@dataclass
class EncodedBatch:
    """Tokens of some documents, one after another in the array `ids`; `lengths` counts each document's."""

    ids: Any
    lengths: list[int]
    empty: int
    bad: list[str]
    bytes_read: int


@dataclass
class Totals:
    """What was written and what was left out."""

    documents: int = 0
    tokens: int = 0
    max_token_id: int = 0
    bytes_read: int = 0
    empty: int = 0
    bad: list[str] = field(default_factory=list)

    def add(self, batch: EncodedBatch) -> None:
        """Counts a batch in."""
        self.documents += len(batch.lengths)
        self.tokens += len(batch.ids)
        self.max_token_id = max(self.max_token_id, int(batch.ids.max(initial=0)))
        self.bytes_read += batch.bytes_read
        self.empty += batch.empty
        self.bad += batch.bad


def build_tokenizer(args: argparse.Namespace):
    """Builds Megatron's tokenizer from the tool's arguments; raises UserError when Megatron cannot."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer as build

    try:
        return build(args.tokenizer)
    except Exception as error:  # Megatron, transformers and sentencepiece raise all kinds
        message = f"--tokenizer-type {args.tokenizer_type} cannot be built: {error or repr(error)}"
        raise UserError(message) from None


def end_of_document(tokenizer) -> int | None:
    """Returns the id that ends a document, or None when the tokenizer has none."""
    eod = getattr(tokenizer, "eod", None)
    return None if eod is None or eod < 0 else int(eod)


class Encoder:
    """Tokenizes batches of documents; every worker process has one."""

    def __init__(self, tokenizer, args: argparse.Namespace):
        from megatron.core.datasets.indexed_dataset import DType

        self.tokenizer, self.args = tokenizer, args
        self.vocab_size = tokenizer.vocab_size
        self.dtype = DType.optimal_dtype(self.vocab_size)
        self.eod = end_of_document(tokenizer) if args.append_eod else None

    def encode(self, batch: list[Document]) -> EncodedBatch:
        """Tokenizes a batch of documents and lists the bad ones."""
        import numpy

        ids, lengths, bad, empty = [], [], [], 0
        for document in batch:
            try:
                tokens = self.document_tokens(document)
            except BadDocument as error:
                bad.append(str(error))
                continue
            empty += not tokens
            if tokens:
                ids.extend(tokens)
                lengths.append(len(tokens))
        bytes_read = sum(len(document.raw) for document in batch)
        return EncodedBatch(numpy.array(ids, dtype=self.dtype), lengths, empty, bad, bytes_read)

    def document_tokens(self, document: Document) -> list[int]:
        """Returns the tokens of a document, [] for a blank one."""
        text = document_text(document, self.args.json_key, self.args.txt_document)
        if not text.strip():
            return []
        place = f"{document.path}:{document.line}"
        try:
            tokens = self.tokenizer.tokenize(text)
        except Exception as error:
            if self.args.tokenizer_type == "NullTokenizer":
                rule = f"NullTokenizer reads numbers with single spaces between them ({error})"
                raise BadDocument(f"{place}: {rule}") from None
            raise UserError(f"{place}: the tokenizer failed: {error or repr(error)}") from None
        # A HuggingFace post-processor may have ended the document already.
        if tokens and self.eod is not None and tokens[-1] != self.eod:
            tokens = [*tokens, self.eod]
        for token in (min(tokens, default=0), max(tokens, default=0)):
            if not 0 <= token < self.vocab_size:
                raise BadDocument(f"{place}: token id {token} is outside the vocabulary of {self.vocab_size}")
        return tokens


_worker: Encoder | None = None


def start_worker(args: argparse.Namespace) -> None:
    """Prepares a worker process: its tokenizer is built once."""
    global _worker
    # Ctrl-C reaches every process of the terminal; the parent alone decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    silence_libraries()
    _worker = Encoder(build_tokenizer(args), args)


def encode_in_worker(batch: list[Document]) -> EncodedBatch:
    """Tokenizes a batch with the worker's own encoder."""
    assert _worker is not None
    return _worker.encode(batch)


def batches(paths: list[str], txt_document: str) -> Iterator[list[Document]]:
    """Groups the documents of all files, in order, into batches of about BATCH_BYTES bytes."""
    batch, size = [], 0
    for path in paths:
        for document in read_documents(path, txt_document):
            batch.append(document)
            size += len(document.raw)
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def encoded_batches(encoder: Encoder, args: argparse.Namespace) -> Iterator[EncodedBatch]:
    """Yields the encoded batches in input order, made by this process or by `args.workers` others."""
    todo = batches(args.input, args.txt_document)
    if args.workers == 1:
        yield from map(encoder.encode, todo)
        return
    # fork: Megatron takes seconds to import, and the children inherit it; no thread of ours runs yet.
    # An executor: a multiprocessing.Pool waits forever for a worker that was killed.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(args.workers, mp_context=context, initializer=start_worker, initargs=(args,))
    pending = deque()
    try:
        for batch in todo:
            pending.append(pool.submit(encode_in_worker, batch))
            if len(pending) > 2 * args.workers:  # bounds the memory
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        message = f"one of {args.workers} workers died, perhaps for lack of memory: use fewer --workers"
        raise UserError(message) from None
    finally:
        pool.shutdown(cancel_futures=True)


def write_tokens(encoder: Encoder, args: argparse.Namespace, bin_path: str, idx_path: str) -> Totals:
    """Writes all input as an indexed dataset and returns the totals."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from tqdm import tqdm

    totals = Totals()
    tqdm.monitor_interval = 0  # its thread would be there when the workers fork
    builder = IndexedDatasetBuilder(bin_path, dtype=encoder.dtype)
    progress = tqdm(total=sum(map(os.path.getsize, args.input)), unit="B", unit_scale=True, disable=None)
    with progress, contextlib.closing(encoded_batches(encoder, args)) as encoded:
        for batch in encoded:
            if batch.bad and not args.skip_bad_lines:
                raise UserError(f"{batch.bad[0]}; correct it, or leave it out with --skip-bad-lines")
            start = 0
            for length in batch.lengths:
                builder.add_document(batch.ids[start : start + length], [length])
                start += length
            totals.add(batch)
            progress.update(batch.bytes_read)
    if not totals.documents:
        left_out = f"{totals.empty} blank, {len(totals.bad)} bad"
        raise UserError(f"no document with text in --input {' '.join(args.input)} ({left_out}): give another")
    builder.finalize(idx_path)
    return totals


def model_sha256(path: str | None) -> str | None:
    """Returns the SHA-256 of a model file or of a HuggingFace folder's tokenizer.json, else None."""
    if path and os.path.isdir(path):
        path = os.path.join(path, "tokenizer.json")
    if not path or not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sidecar(path: str, tokenizer, totals: Totals, args: argparse.Namespace) -> None:
    """Writes what training has to know about the tokens."""
    model = args.tokenizer_model
    record = {
        "format": SIDECAR_FORMAT,
        "tokenizer_type": args.tokenizer_type,
        "tokenizer_model": os.path.basename(os.path.normpath(model)) if model else None,
        "tokenizer_sha256": model_sha256(model),
        "vocab_size": tokenizer.vocab_size,
        "eod": end_of_document(tokenizer),
        "documents": totals.documents,
        "tokens": totals.tokens,
        "max_token_id": totals.max_token_id,
    }
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(record, indent=2) + "\n")


def check_files(args: argparse.Namespace, outputs: list[str]) -> None:
    """Raises UserError for missing input and for output that must not be replaced."""
    check_inputs(args.input)
    for path in filter(os.path.exists, outputs):
        if any(os.path.samefile(path, source) for source in args.input):
            raise UserError(f"{path} is the input: choose another --output-prefix than {args.output_prefix}")
        if not args.overwrite:
            raise UserError(f"{path} exists: choose another --output-prefix or pass --overwrite")


def check_tokenizer_arguments(args: argparse.Namespace) -> None:
    """Raises UserError where Megatron's own message would not say which argument is at fault."""
    kind, model = args.tokenizer_type, args.tokenizer_model
    if kind == "NullTokenizer" and not args.tokenizer.vocab_size:
        raise UserError("--tokenizer-type NullTokenizer needs --vocab-size")
    if model is None and kind.startswith(("SentencePiece", "GPTSentence", "Llama2", "Tik", "HuggingFace")):
        raise UserError(f"--tokenizer-type {kind} needs --tokenizer-model")
    # A HuggingFace model may also be a name on its hub, which is not a path.
    is_path = model and (kind != "HuggingFaceTokenizer" or model.startswith(("/", ".")))
    if is_path and not os.path.exists(model):
        raise UserError(f"--tokenizer-model {model} does not exist")


def silence_libraries() -> None:
    """Hides what torch, Megatron and transformers say about missing accelerators and long texts."""
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Parses the tool's own arguments and returns them with the rest, which is Megatron's."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = OneLineErrorParser(prog=PROG, description=__doc__, epilog=EPILOG, formatter_class=formatter)
    cores = min(8, len(os.sched_getaffinity(0)))
    eod_help = "end every document with the tokenizer's end-of-document token (default: yes)"
    txt_help = "what a document is in plain text; paragraphs end at blank lines (default: file)"
    add = parser.add_argument_group("input and output").add_argument
    add("--input", required=True, nargs="+", metavar="FILE", help="JSONL, or plain text named *.txt")
    add("--output-prefix", required=True, metavar="PREFIX", help="path of the output without a suffix")
    add = parser.add_argument_group("tokenizer").add_argument
    add("--tokenizer-type", required=True, metavar="TYPE", help="kind of tokenizer, see below")
    add("--tokenizer-model", metavar="PATH",
        help="model file, or HuggingFace folder (default: none, for types that need none)")  # fmt: skip
    add = parser.add_argument_group("documents").add_argument
    add("--json-key", default="text", metavar="KEY", help="key of the text in a JSON line (default: text)")
    add("--txt-document", default="file", choices=("file", "line", "paragraph"), help=txt_help)
    add("--append-eod", default=True, action=argparse.BooleanOptionalAction, help=eod_help)
    add("--skip-bad-lines", action="store_true", help="leave out and count documents that cannot be read")
    add = parser.add_argument_group("run").add_argument
    add("--workers", type=positive_number(int), default=cores, metavar="N", help=f"processes (default here: {cores})")
    add("--overwrite", action="store_true", help="replace existing output")
    return parser.parse_known_args(argv)


def parse_tokenizer_arguments(args: argparse.Namespace, rest: list[str]) -> argparse.Namespace:
    """Parses `rest` with Megatron's own tokenizer arguments."""
    from megatron.training.arguments import _add_tokenizer_args

    parser = _add_tokenizer_args(OneLineErrorParser(prog=PROG))
    tokenizer = parser.parse_args([*rest, "--tokenizer-type", args.tokenizer_type])
    tokenizer.tokenizer_model = args.tokenizer_model
    tokenizer.pad_vocab_size = False  # padding belongs to the model, and needs its parallel sizes
    return tokenizer


def print_summary(totals: Totals, args: argparse.Namespace) -> None:
    """Prints what was written and what was left out."""
    bin_path, index_cache = args.output_prefix + ".bin", os.path.join(args.output_prefix, "cache")
    per_document = totals.tokens / totals.documents
    print(f"{bin_path}: {os.path.getsize(bin_path)} bytes from {totals.bytes_read} bytes of input")
    print(f"documents {totals.documents}, tokens {totals.tokens}, tokens per document {per_document:.1f}")
    print(f"skipped: {totals.empty} blank documents, {len(totals.bad)} bad lines")
    for message in totals.bad[:BAD_LINES_SHOWN]:
        print(f"  {message}")
    if os.path.isdir(index_cache):
        print(f"note: {index_cache} holds Megatron's index of the old data: delete it before training")


def main(argv: list[str] | None = None) -> None:
    """Entry point; raises UserError for what the user can fix."""
    args, rest = parse_arguments(argv)
    outputs = [args.output_prefix + suffix for suffix in (".bin", ".idx", ".json")]
    check_files(args, outputs)
    args.tokenizer = parse_tokenizer_arguments(args, rest)
    check_tokenizer_arguments(args)
    tokenizer = build_tokenizer(args)
    if args.append_eod and end_of_document(tokenizer) is None:
        raise UserError(
            f"--tokenizer-type {args.tokenizer_type} has no end-of-document token to append: give it one "
            '("eos_token" in the tokenizer_config.json of a HuggingFace folder) or pass --no-append-eod'
        )
    with finished_files(*outputs) as (bin_path, idx_path, sidecar_path):
        totals = write_tokens(Encoder(tokenizer, args), args, bin_path, idx_path)
        write_sidecar(sidecar_path, tokenizer, totals, args)
    print_summary(totals, args)


if __name__ == "__main__":
    silence_libraries()
    sys.exit(run_tool(PROG, main))
