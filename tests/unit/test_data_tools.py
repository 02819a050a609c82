"""Tests of tools/make_demo_corpus.py, tools/train_tokenizer.py and tools/preprocess_data.py."""

import hashlib
import importlib
import json
import os
import subprocess
import sys
import sysconfig
from argparse import Namespace
from pathlib import Path

import numpy
import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
PYTHON_SOURCE = (
    "class A:\n\tdef f(self):\n\t\treturn  1\n\n\n    if x:\n        y = 'é 漢字 😀 \u200b'\r\n\n"
    "  <s> </s> <0x0A> \x00 trailing  \n \n"
)
VOCAB_SIZE = 700


@pytest.fixture(scope="module")
def tools():
    """The three scripts as modules; they import one another, as they do when run as scripts."""
    sys.path.insert(0, str(TOOLS))
    try:
        names = ("make_demo_corpus", "train_tokenizer", "preprocess_data")
        yield Namespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(TOOLS))


def run_script(name: str, *arguments) -> subprocess.CompletedProcess:
    """Runs a tool as a user does."""
    command = [sys.executable, str(TOOLS / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    result = run_script("make_demo_corpus.py", "--output", folder, "--max-megabytes", "0.5")
    assert result.returncode == 0, result.stderr
    return folder / "corpus.jsonl"


@pytest.fixture(scope="module")
def model(corpus, tmp_path_factory) -> Path:
    prefix = tmp_path_factory.mktemp("tokenizer") / "demo"
    result = run_script(
        "train_tokenizer.py", "--input", corpus, "--output", prefix, "--vocab-size", VOCAB_SIZE
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return prefix.with_suffix(".model")


@pytest.fixture
def preprocess(tools, tmp_path, model, capsys):
    """Returns a function that runs preprocess_data.py in this process: (exit code, stdout, stderr)."""

    def run(source, *arguments, tokenizer=("SentencePieceTokenizer", model), workers=1, out="out"):
        kind, path = tokenizer
        argv = ["--input", source, "--output-prefix", tmp_path / out, "--workers", workers]
        argv += ["--tokenizer-type", kind, *(["--tokenizer-model", path] if path else []), *arguments]
        tool = tools.preprocess_data
        code = tool.run_tool(tool.PROG, tool.main, list(map(str, argv)))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def write_jsonl(path: Path, texts) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def read_tokens(prefix: Path) -> list[list[int]]:
    """Reads the documents back with Megatron's own reader."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    assert list(dataset.document_indices) == list(range(len(dataset) + 1))
    return [dataset[i].tolist() for i in range(len(dataset))]


def sentencepiece_tokenizer(model: Path):
    from megatron.core.tokenizers import MegatronTokenizer

    return MegatronTokenizer.from_pretrained(
        str(model), metadata_path={"library": "sentencepiece"}, legacy=False
    )


def assert_one_line_error(code: int, err: str, fragment: str) -> None:
    assert code == 2, err
    assert err.startswith("tools/") and ": error: " in err, err
    assert err.count("\n") == 1 and err.endswith("\n"), err
    assert fragment in err


def only_file(folder: Path, source: Path) -> bool:
    """Tells whether `source` is all there is in `folder`, hidden names included."""
    return os.listdir(folder) == [source.name]


def test_demo_corpus_is_the_library_and_deterministic(corpus, tmp_path):
    again = run_script("make_demo_corpus.py", "--output", tmp_path, "--max-megabytes", "0.5")
    assert (tmp_path / "corpus.jsonl").read_bytes() == corpus.read_bytes()
    records = [json.loads(line) for line in corpus.read_text(encoding="utf-8").split("\n")[:-1]]
    size = corpus.stat().st_size
    assert 300_000 < size <= 500_000
    assert f"{len(records)} documents, {size} bytes" in again.stdout
    sources = [record["source"] for record in records]
    assert sources == sorted(sources) and len(set(sources)) == len(sources) > 10
    library = Path(sysconfig.get_path("stdlib"))
    assert records[-1]["text"].encode() == (library / records[-1]["source"]).read_bytes()


def test_demo_corpus_leaves_out_tests_and_undecodable_files(tools, tmp_path):
    for name in ("b.py", "a/x.py", "site-packages/p.py", "test/t.py", "a/tests/t.py", "c.so", "LICENSE.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}\r\n", newline="")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "empty.py").write_text("\n")
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data/topics.py").write_text("topics = {}\n")
    documents = dict(tools.make_demo_corpus.library_documents(str(tmp_path)))
    topics = [source for source in documents if source.startswith("pydoc_data/")]
    assert "pydoc_data/topics.py#assert" in topics and "assert" in documents["pydoc_data/topics.py#assert"]
    assert [source for source in documents if source not in topics] == ["LICENSE.txt", "a/x.py", "b.py"]
    assert documents["b.py"] == "text of b.py\r\n"


def test_demo_corpus_without_room_is_an_error(tools, tmp_path, capsys):
    tool = tools.make_demo_corpus
    arguments = ["--output", str(tmp_path), "--max-megabytes", "0.000001"]
    code = tool.run_tool(tool.PROG, tool.main, arguments)
    assert_one_line_error(code, capsys.readouterr().err, "--max-megabytes")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "GPTSentencePieceTokenizer"])
def test_tokenizer_returns_python_source_exactly(tools, model, corpus, kind):
    parsed = tools.preprocess_data.parse_tokenizer_arguments(
        Namespace(tokenizer_type=kind, tokenizer_model=str(model)), []
    )
    tokenizer = tools.preprocess_data.build_tokenizer(Namespace(tokenizer=parsed, tokenizer_type=kind))
    texts = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").split("\n")[:20] if line]
    for text in [PYTHON_SOURCE, "\n", " ", "\t\t", *texts]:
        ids = tokenizer.tokenize(text)
        assert tokenizer.detokenize(ids) == text
        assert tokenizer.unk not in ids and tokenizer.eod not in ids
    assert tokenizer.vocab_size == VOCAB_SIZE


def test_tokenizer_has_special_and_whitespace_pieces(model):
    tokenizer = sentencepiece_tokenizer(model)
    assert (tokenizer.unk, tokenizer.bos, tokenizer.eod, tokenizer.pad) == (0, 1, 2, 3)
    assert tokenizer.tokenize("\n\t\n") == [4, 5, 4]
    for text in ("    ", "        "):
        assert len(tokenizer.tokenize(text)) == 1, repr(text)
    assert model.with_suffix(".vocab").read_text(encoding="utf-8").count("\n") == VOCAB_SIZE


@pytest.mark.parametrize(
    ("content", "arguments", "fragment"),
    [
        (
            b'{"text": "a few words"}\n',
            ["--vocab-size", "5000"],
            "--vocab-size 5000 is too large for this text",
        ),
        (b'{"text": "a few words"}\n', ["--vocab-size", "100"], "--vocab-size 100 is too small"),
        (b'{"text": "a"}\n{"text": 1}\n', ["--vocab-size", "300"], "in.jsonl:2: 'text' holds int"),
        (b'{"text": "\\n"}\n\n', ["--vocab-size", "300"], "no text"),
        (b"", ["--vocab-size", "300"], "is empty"),
        (None, ["--vocab-size", "300"], "in.jsonl is not a file"),
        (
            b'{"text": "a"}\n',
            ["--vocab-size", "300", "--character-coverage", "0.5"],
            "--character-coverage 0.5",
        ),
    ],
)
def test_tokenizer_errors(tools, tmp_path, capsys, content, arguments, fragment):
    source = tmp_path / "in.jsonl"
    if content is not None:
        source.write_bytes(content)
    tool = tools.train_tokenizer
    arguments = ["--input", str(source), "--output", str(tmp_path / "new"), *arguments]
    assert_one_line_error(tool.run_tool(tool.PROG, tool.main, arguments), capsys.readouterr().err, fragment)
    assert os.listdir(tmp_path) == ([] if content is None else ["in.jsonl"])


def test_tokenizer_skips_bad_lines_when_told(tools, tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"text": "a few words"}\n{\n\xff\n')
    tool = tools.train_tokenizer
    arguments = ["--input", str(source), "--output", str(tmp_path / "new"), "--vocab-size", "275"]
    assert tool.run_tool(tool.PROG, tool.main, arguments) == 2
    assert tool.run_tool(tool.PROG, tool.main, [*arguments, "--skip-bad-lines"]) == 0
    assert "skipped: 2 bad lines" in capsys.readouterr().out


def test_tokenizer_from_plain_text_cuts_long_lines(tools, tmp_path, capsys):
    source = tmp_path / "in.txt"
    source.write_text("ab cd\n" + "needle " * 5000, encoding="utf-8")
    tool = tools.train_tokenizer
    arguments = ["--input", str(source), "--output", str(tmp_path / "new"), "--vocab-size", "285"]
    assert tool.run_tool(tool.PROG, tool.main, arguments) == 0, capsys.readouterr().err
    # SentencePiece would have left the long line out, and with it the only source of this word.
    assert "needle" in (tmp_path / "new.vocab").read_text(encoding="utf-8")


def test_preprocess_command_line(corpus, model, tmp_path):
    """Every document comes back as it was, with an end-of-document token; the sidecar tells the rest."""
    arguments = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model, "--workers", 2]
    result = run_script(
        "preprocess_data.py", "--input", corpus, "--output-prefix", tmp_path / "out", *arguments
    )
    assert (result.returncode, result.stderr) == (0, "")
    tokenizer = sentencepiece_tokenizer(model)
    documents = read_tokens(tmp_path / "out")
    lines = corpus.read_text(encoding="utf-8").split("\n")[:-1]
    assert len(documents) == len(lines)
    for ids, line in zip(documents, lines, strict=True):
        assert ids[-1] == tokenizer.eod
        assert tokenizer.detokenize(ids[:-1]) == json.loads(line)["text"]
    tokens = sum(map(len, documents))
    assert json.loads((tmp_path / "out.json").read_text()) == {
        "format": "megatron_xmoe.data.v1",
        "tokenizer_type": "SentencePieceTokenizer",
        "tokenizer_model": model.name,
        "tokenizer_sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
        "vocab_size": VOCAB_SIZE,
        "eod": tokenizer.eod,
        "documents": len(lines),
        "tokens": tokens,
        "max_token_id": max(map(max, documents)),
    }
    assert (tmp_path / "out.bin").stat().st_size == 2 * tokens  # uint16
    assert f"documents {len(lines)}, tokens {tokens}," in result.stdout
    assert sorted(os.listdir(tmp_path)) == ["out.bin", "out.idx", "out.json"]


def test_preprocess_command_line_error(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"text": "1 2"}\n{"text": \n')
    arguments = ["--tokenizer-type", "NullTokenizer", "--vocab-size", 10, "--workers", 2]
    result = run_script(
        "preprocess_data.py", "--input", source, "--output-prefix", tmp_path / "out", *arguments
    )
    assert_one_line_error(result.returncode, result.stderr, "in.jsonl:2: not JSON")
    assert only_file(tmp_path, source)


@pytest.mark.parametrize("name", ["make_demo_corpus", "train_tokenizer", "preprocess_data"])
def test_help_and_unknown_choices(tools, name, capsys):
    tool = getattr(tools, name)
    with pytest.raises(SystemExit, match="0"):
        tool.main(["--help"])
    help_text = capsys.readouterr().out
    assert "example:" in help_text and tool.PROG in help_text
    with pytest.raises(SystemExit, match="2"):
        tool.main([])
    assert_one_line_error(2, capsys.readouterr().err, "required")


def test_output_does_not_depend_on_workers(tools, preprocess, tmp_path, monkeypatch):
    monkeypatch.setattr(tools.preprocess_data, "BATCH_BYTES", 300)  # many batches of this small input
    texts = ["word " * (i * 7 % 40) + str(i) for i in range(200)]
    source = write_jsonl(tmp_path / "in.jsonl", ["", *texts])
    for workers in (1, 3):
        code, _, err = preprocess(source, workers=workers, out=f"workers{workers}")
        assert code == 0, err
    for suffix in (".bin", ".idx", ".json"):
        assert (tmp_path / f"workers1{suffix}").read_bytes() == (tmp_path / f"workers3{suffix}").read_bytes()
    assert len(read_tokens(tmp_path / "workers3")) == 200


def test_megatron_trains_on_the_output(preprocess, model, tmp_path):
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    source = write_jsonl(tmp_path / "in.jsonl", [f"def f{i}():\n    return {i}\n" for i in range(50)])
    assert preprocess(source)[0] == 0
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=32,
        blend=([str(tmp_path / "out")], None),
        split="1,0,0",
        path_to_cache=str(tmp_path / "cache"),
        tokenizer=sentencepiece_tokenizer(model),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    train = BlendedMegatronDatasetBuilder(GPTDataset, [20, 0, 0], lambda: True, config).build()[0]
    sample = train[0]
    assert sample["tokens"].shape == (32,)
    stream = [token for ids in read_tokens(tmp_path / "out") for token in ids]
    assert set(sample["tokens"].tolist()) <= set(stream)
    assert config.tokenizer.eod in sample["tokens"].tolist()
    assert numpy.array_equal(sample["tokens"][1:], sample["labels"][:-1])


BAD_LINES = [
    (b'{"text": ', "not JSON (Expecting value at column 9)"),
    (b"[" * 100_000, "not JSON"),
    (b'{"txt": "x"}', "no key 'text' but txt"),
    (b'["x"]', "JSON list, not an object"),
    (b'{"text": null}', "'text' holds NoneType"),
    (b'{"text": "\\ud800"}', "half a surrogate pair"),
    (b'{"text": "\xff"}', "byte 0xff is not UTF-8"),
]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("line", "reason"), BAD_LINES[:1] + BAD_LINES[-1:])
def test_bad_line_stops_with_its_number(preprocess, tmp_path, line, reason, workers):
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": 5}\n')
    code, _, err = preprocess(source, workers=workers)
    assert_one_line_error(code, err, f"{source}:3: {reason}")
    assert "--skip-bad-lines" in err
    assert only_file(tmp_path, source)


def test_skip_bad_lines_counts_and_shows_them(preprocess, model, tmp_path):
    source = tmp_path / "in.jsonl"
    good = [b'{"text": "one"}', b'{"text": "  \\n"}', b'{"text": ""}', b"", b'\xef\xbb\xbf{"text": "last"}']
    lines = [good[-1], *(line for line, _ in BAD_LINES), *good[:-1]]
    source.write_bytes(b"\n".join(lines))
    code, out, err = preprocess(source, "--skip-bad-lines")
    assert code == 0, err
    assert f"skipped: 2 blank documents, {len(BAD_LINES)} bad lines" in out
    for number, (_, reason) in enumerate(BAD_LINES, start=2):
        assert f"{source}:{number}: {reason}" in out
    tokenizer = sentencepiece_tokenizer(model)
    assert [tokenizer.detokenize(ids) for ids in read_tokens(tmp_path / "out")] == ["last", "one"]


def test_input_without_documents_is_an_error(preprocess, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", ["", " "])
    assert_one_line_error(*preprocess(source)[::2], "no document with text")
    source.write_bytes(b"")
    assert_one_line_error(*preprocess(source)[::2], "is empty")
    assert only_file(tmp_path, source)


def test_existing_output_is_kept_unless_told(preprocess, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", ["new text"])
    old = tmp_path / "out.idx"
    old.write_text("old")
    assert_one_line_error(*preprocess(source)[::2], "--overwrite")
    assert old.read_text() == "old" and not (tmp_path / "out.bin").exists()
    assert preprocess(source, "--overwrite")[0] == 0
    assert len(read_tokens(tmp_path / "out")) == 1
    own = tmp_path / "out.json"
    before = own.read_bytes()
    assert_one_line_error(*preprocess(own, "--overwrite")[::2], "is the input")
    assert own.read_bytes() == before


def test_failed_overwrite_keeps_the_old_output(preprocess, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", ["text"])
    assert preprocess(source)[0] == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "x"}\n{\n')
    assert preprocess(bad, "--overwrite")[0] == 2
    bad.unlink()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("mode", "documents"),
    [
        ("file", ["a\r\n\tb\n\n \n\nc d\n"]),
        ("line", ["a", "\tb", "c d"]),
        ("paragraph", ["a\r\n\tb", "c d"]),
    ],
)
def test_plain_text(preprocess, model, tmp_path, mode, documents):
    source = tmp_path / "in.txt"
    source.write_bytes(b"\xef\xbb\xbfa\r\n\tb\n\n \n\nc d\n")
    assert preprocess(source, "--txt-document", mode)[0] == 0
    tokenizer = sentencepiece_tokenizer(model)
    assert [tokenizer.detokenize(ids[:-1]) for ids in read_tokens(tmp_path / "out")] == documents


@pytest.mark.parametrize("mode", ["file", "line", "paragraph"])
def test_plain_text_names_the_bad_line(preprocess, tmp_path, mode):
    source = tmp_path / "in.txt"
    source.write_bytes(b"a\n\nb\nc \xe9\nd\n")
    assert_one_line_error(
        *preprocess(source, "--txt-document", mode)[::2], "in.txt:4: byte 0xe9 is not UTF-8"
    )


def test_no_append_eod_and_json_key(preprocess, model, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "wrong", "body": "right"}\n')
    assert preprocess(source, "--json-key", "body", "--no-append-eod")[0] == 0
    assert read_tokens(tmp_path / "out") == [sentencepiece_tokenizer(model).tokenize("right")]


@pytest.fixture(scope="module")
def huggingface_folder(tmp_path_factory) -> Path:
    """A byte-level BPE tokenizer, saved the HuggingFace way with and without an end-of-sentence token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=["<end>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["def f(x):\n    return x\n"] * 4, trainer)
    folder = tmp_path_factory.mktemp("huggingface")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(
        folder / "with_eos"
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "without_eos")
    return folder


def test_huggingface_tokenizer(preprocess, huggingface_folder, tmp_path):
    from transformers import AutoTokenizer

    source = write_jsonl(tmp_path / "in.jsonl", [PYTHON_SOURCE, "def f(x):\n"])
    folder = huggingface_folder / "with_eos"
    code, _, err = preprocess(source, tokenizer=("HuggingFaceTokenizer", folder))
    assert code == 0, err
    tokenizer = AutoTokenizer.from_pretrained(folder)
    documents = read_tokens(tmp_path / "out")
    assert [ids[-1] for ids in documents] == [tokenizer.eos_token_id] * 2
    assert [tokenizer.decode(ids[:-1]) for ids in documents] == [PYTHON_SOURCE, "def f(x):\n"]
    sidecar = json.loads((tmp_path / "out.json").read_text())
    assert sidecar["tokenizer_model"] == "with_eos" and sidecar["vocab_size"] == len(tokenizer)
    assert sidecar["tokenizer_sha256"] == hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()


def test_huggingface_tokenizer_without_eos(preprocess, huggingface_folder, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", ["x"])
    tokenizer = ("HuggingFaceTokenizer", huggingface_folder / "without_eos")
    code, _, err = preprocess(source, tokenizer=tokenizer)
    assert_one_line_error(code, err, "pass --no-append-eod")
    assert only_file(tmp_path, source)
    assert preprocess(source, "--no-append-eod", tokenizer=tokenizer)[0] == 0
    assert json.loads((tmp_path / "out.json").read_text())["eod"] is None


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(64, 2), (70_000, 4)])
def test_null_tokenizer(preprocess, tmp_path, vocab_size, itemsize):
    source = write_jsonl(tmp_path / "in.jsonl", ["5 6", "7"])
    code, _, err = preprocess(source, "--vocab-size", vocab_size, tokenizer=("NullTokenizer", None))
    assert code == 0, err
    assert read_tokens(tmp_path / "out") == [[5, 6, vocab_size - 1], [7, vocab_size - 1]]
    assert (tmp_path / "out.bin").stat().st_size == 5 * itemsize
    sidecar = json.loads((tmp_path / "out.json").read_text())
    assert sidecar["tokenizer_model"] is sidecar["tokenizer_sha256"] is None


@pytest.mark.parametrize("text", ["5 64", "5 -1", "five"])
def test_null_tokenizer_refuses_what_is_no_token(preprocess, tmp_path, text):
    source = write_jsonl(tmp_path / "in.jsonl", ["5", text])
    code, _, err = preprocess(source, "--vocab-size", 64, tokenizer=("NullTokenizer", None))
    assert_one_line_error(code, err, "in.jsonl:2: ")


@pytest.mark.parametrize(
    ("tokenizer", "fragment"),
    [
        (("NullTokenizer", None), "NullTokenizer needs --vocab-size"),
        (("SentencePieceTokenizer", None), "SentencePieceTokenizer needs --tokenizer-model"),
        (("SentencePieceTokenizer", "missing.model"), "missing.model does not exist"),
        (("SentencePieceTokenizer", __file__), "SentencePieceTokenizer cannot be built"),
        (("HuggingFaceTokenizer", "./missing"), "./missing does not exist"),
    ],
)
def test_unusable_tokenizer(preprocess, tmp_path, tokenizer, fragment):
    source = write_jsonl(tmp_path / "in.jsonl", ["x"])
    assert_one_line_error(*preprocess(source, tokenizer=tokenizer)[::2], fragment)
    assert only_file(tmp_path, source)


def test_dead_worker_is_an_error(tools, preprocess, tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "in.jsonl", ["x"])
    monkeypatch.setattr(tools.preprocess_data.Encoder, "encode", lambda self, batch: os._exit(1))
    assert_one_line_error(*preprocess(source, workers=2)[::2], "one of 2 workers died")
    assert only_file(tmp_path, source)


def test_failing_tokenizer_names_the_document(tools, preprocess, tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "in.jsonl", ["x"])
    build = tools.preprocess_data.build_tokenizer

    def broken(args):
        tokenizer = build(args)
        monkeypatch.setattr(tokenizer, "tokenize", lambda text: 1 / 0, raising=False)
        return tokenizer

    monkeypatch.setattr(tools.preprocess_data, "build_tokenizer", broken)
    code, _, err = preprocess(source, "--skip-bad-lines", workers=2)
    assert_one_line_error(code, err, "in.jsonl:1: the tokenizer failed: division by zero")


def test_interruption_leaves_nothing(tools, preprocess, tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "in.jsonl", ["x"])

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(tools.preprocess_data, "write_sidecar", interrupt)
    code, _, err = preprocess(source)
    assert code == 130 and "interrupted" in err
    assert only_file(tmp_path, source)
