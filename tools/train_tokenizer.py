#!/usr/bin/env python3
"""Trains a SentencePiece tokenizer that gives every text back exactly, for Megatron's SentencePieceTokenizer.

Text is never normalised: spaces, indentation, tabs and blank lines survive, and characters the vocabulary
lacks are spelled in bytes. The exception is U+2581, SentencePiece's own space mark, which becomes a space.
Pieces 0 to 3 are <unk>, <s>, </s>, <pad>; Megatron's end-of-document token is </s>.
"""

import argparse
import io
import os
import re
import signal
import sys
from collections.abc import Iterator

from command_line import OneLineErrorParser, UserError, finished_files, output_folder, positive_number, run_tool
from documents import BadDocument, Document, check_inputs, document_text, read_documents

PROG = "tools/train_tokenizer.py"
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM)
LINE_CHARACTERS = 4000
MAX_LINE_BYTES = 4 * LINE_CHARACTERS + 1
SAMPLE_DOCUMENTS = 200
SAMPLE_CHARACTERS = 20_000
SPACE_MARK = "\u2581"
PROBE = "def f(x):\n\tif x:\n\n        return  x \r\n# \u00e9 \u6f22 \U0001f600 \x00 <s> </s> <0x0A>\n\n   "


class TrainingLines:
    """Iterates over the lines SentencePiece trains on.

    Lines keep their line ends. SentencePiece drops overlong ones, so those are cut. It turns an exception of
    its iterator into text, so `failure` keeps the original. `sample` collects texts for the final check.
    """

    def __init__(self, paths: list[str], json_key: str, skip_bad_lines: bool):
        self.paths, self.json_key, self.skip_bad_lines = paths, json_key, skip_bad_lines
        self.failure: BaseException | None = None
        self.sample = [PROBE]
        self.count = self.bad = 0

    def __iter__(self) -> Iterator[str]:
        try:
            for path in self.paths:
                for document in read_documents(path, "line"):
                    yield from self.lines_of(document)
        except BaseException as error:
            self.failure = error
            raise
        # Python sees no signal while SentencePiece trains; nothing is on disk yet, so let it end the process.
        for number in ENDING_SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    def lines_of(self, document: Document) -> Iterator[str]:
        """Yields the lines of one document."""
        try:
            # "file": a line of plain text keeps its end, which is part of what is learned.
            text = document_text(document, self.json_key, "file")
        except BadDocument:
            if not self.skip_bad_lines:
                raise
            self.bad += 1
            return
        if len(self.sample) <= SAMPLE_DOCUMENTS and SPACE_MARK not in text:
            self.sample.append(text[:SAMPLE_CHARACTERS])
        for line in text.splitlines(keepends=True):
            for start in range(0, len(line), LINE_CHARACTERS):
                self.count += 1
                yield line[start : start + LINE_CHARACTERS]


def explain_failure(error: RuntimeError, vocab_size: int) -> str:
    """Turns SentencePiece's message into one that names the argument to change."""
    message = str(error)
    if found := re.search(r"value <= (\d+)", message):
        return f"--vocab-size {vocab_size} is too large for this text: use at most {found[1]} or more text"
    if found := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"--vocab-size {vocab_size} is too small: bytes and characters alone take {found[1]} pieces; "
            "raise it or lower --character-coverage"
        )
    if "sentences_.empty()" in message:
        return "--input has no text: every document is empty or only line ends"
    return f"SentencePiece failed: {message}"


def train(lines: TrainingLines, args: argparse.Namespace) -> bytes:
    """Trains on `lines` and returns the serialised SentencePiece model."""
    import sentencepiece

    model = io.BytesIO()
    handlers = {number: signal.getsignal(number) for number in ENDING_SIGNALS}
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=args.model_type,
            vocab_size=args.vocab_size,
            character_coverage=args.character_coverage,
            num_threads=args.threads,
            max_sentence_length=MAX_LINE_BYTES,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            # Indentation becomes pieces of its own, and a line end or a tab one piece instead of a byte.
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n", "\t"],
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise lines.failure or UserError(explain_failure(error, args.vocab_size)) from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return model.getvalue()


def bytes_per_token(processor, sample: list[str]) -> float:
    """Checks that every text of the sample comes back exactly and returns the mean bytes of a token."""
    tokens = 0
    for text in sample:
        ids = processor.encode(text)
        if (decoded := processor.decode(ids)) != text:
            raise UserError(f"the trained model changes text: {text[:60]!r} came back as {decoded[:60]!r}")
        tokens += len(ids)
    return sum(len(text.encode()) for text in sample) / tokens


def write_vocabulary(path: str, processor) -> None:
    """Writes one piece and its score a line, to be read by people."""
    with open(path, "w", encoding="utf-8") as file:
        for piece in range(processor.get_piece_size()):
            name = processor.id_to_piece(piece).replace("\n", "\\n").replace("\t", "\\t")
            file.write(f"{name}\t{processor.get_score(piece):g}\n")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    example = f"""example:
  python {PROG} --input demo/corpus.jsonl --output demo/tokenizer --vocab-size 4096
then train with
  --tokenizer-type SentencePieceTokenizer --tokenizer-model demo/tokenizer.model"""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = OneLineErrorParser(prog=PROG, description=__doc__, epilog=example, formatter_class=formatter)
    whole, fraction = positive_number(int), positive_number(float)
    coverage_help = "share of characters that get a piece, 0.98 to 1; others become bytes (default: 0.9995)"
    add = parser.add_argument_group("input and output").add_argument
    add("--input", required=True, nargs="+", metavar="FILE", help="JSONL, or plain text named *.txt")
    add("--json-key", default="text", metavar="KEY", help="key of the text in a JSON line (default: text)")
    add("--skip-bad-lines", action="store_true", help="leave out and count lines that cannot be read")
    add("--output", required=True, metavar="PREFIX", help="writes or replaces PREFIX.model and PREFIX.vocab")
    add = parser.add_argument_group("training").add_argument
    add("--vocab-size", required=True, type=whole, metavar="N", help="number of pieces, above 262")
    add("--model-type", default="bpe", choices=("bpe", "unigram"), help="algorithm (default: bpe)")
    add("--character-coverage", type=fraction, default=0.9995, metavar="SHARE", help=coverage_help)
    add("--threads", type=whole, default=os.cpu_count(), metavar="N",
        help=f"threads (default: all cores, here {os.cpu_count()})")  # fmt: skip
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Entry point; raises UserError for what the user can fix."""
    args = parse_arguments(argv)
    if not 0.98 <= args.character_coverage <= 1:
        raise UserError(f"--character-coverage {args.character_coverage} is outside 0.98 to 1")
    check_inputs(args.input)
    model_path, vocab_path = args.output + ".model", args.output + ".vocab"
    output_folder(model_path)
    lines = TrainingLines(args.input, args.json_key, args.skip_bad_lines)
    model = train(lines, args)
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=model)
    mean_bytes = bytes_per_token(processor, lines.sample)
    with finished_files(model_path, vocab_path) as (unfinished_model, unfinished_vocab):
        with open(unfinished_model, "wb") as file:
            file.write(model)
        write_vocabulary(unfinished_vocab, processor)
    pieces = processor.get_piece_size()
    print(f"{model_path}: {pieces} pieces from {lines.count} lines, {mean_bytes:.2f} bytes a token")
    if lines.bad:
        print(f"skipped: {lines.bad} bad lines")
    print(f"use it with --tokenizer-type SentencePieceTokenizer --tokenizer-model {model_path}")


if __name__ == "__main__":
    sys.exit(run_tool(PROG, main))
