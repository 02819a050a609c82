"""tools/convert_checkpoint.py: what it counts and shows, its exit codes, and output that is whole or absent."""

import contextlib
import json
import resource
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from jobs import REPOSITORY, TOY, run_job, run_script, start_from
from safetensors.torch import load_file, save_file
from tiny_models import make

from megatron_xmoe.checkpoint import report
from megatron_xmoe.checkpoint.convert import ARGUMENTS, Options, hf_to_megatron
from megatron_xmoe.checkpoint.hf import HFReader
from megatron_xmoe.checkpoint.torch_dist import TorchDistReader
from megatron_xmoe.checkpoint.transforms import dequantize_blocks

sys.path.insert(0, str(REPOSITORY / "tools"))

import convert_checkpoint  # noqa: E402
from command_line import run_tool  # noqa: E402


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A DeepSeek-V3 checkpoint and its conversion: (model, Megatron's folder)."""
    folder = tmp_path_factory.mktemp("tool")
    model = make("deepseek_v3", folder / "hf")
    (model.directory / "tokenizer_config.json").write_text("{}")
    hf_to_megatron(model.directory, folder / "megatron", Options())
    return model, folder / "megatron"


@pytest.fixture
def tool(capsys):
    """Runs the tool in this process: function of its arguments -> (exit code, output, errors)."""

    def run(*arguments) -> tuple[int, str, str]:
        code = run_tool("tool", convert_checkpoint.main, [str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def row(output: str, name: str) -> list[int]:
    """The numbers of a line of the final table."""
    line = next(line for line in output.splitlines() if line.strip().startswith(name))
    return [int(word) for word in line.split() if word.isdigit()]


def test_every_tensor_and_byte_is_counted(tiny, tool, tmp_path):
    model, _ = tiny
    files = [load_file(path) for path in model.directory.glob("*.safetensors")]
    tensors = [tensor for file in files for tensor in file.values()]
    counts = [len(tensors), sum(tensor.nbytes for tensor in tensors)]
    code, output, _ = tool("hf-to-megatron", "--hf", model.directory, "--megatron", tmp_path / "out", "--verify")
    assert code == 0 and row(output, "read") == counts and "unmatched" not in output
    assert row(output, "written")[1] == counts[1] and "verified" in output
    reader = TorchDistReader(tmp_path / "out")
    assert row(output, "written")[1] == sum(
        torch.Size(reader.shape(key)).numel() * reader.dtype(key).itemsize for key in reader.model_keys()
    )


def test_a_dry_run_counts_the_same_and_writes_nothing(tiny, tool, tmp_path):
    model, megatron = tiny
    wet = tool("hf-to-megatron", "--hf", model.directory, "--megatron", tmp_path / "out")[1]
    code, dry, _ = tool("hf-to-megatron", "--hf", model.directory, "--megatron", tmp_path / "dry", "--dry-run")
    assert code == 0 and not (tmp_path / "dry").exists()
    assert row(dry, "read") == row(wet, "read") and row(dry, "to be written") == row(wet, "written")
    code, dry, _ = tool("megatron-to-hf", "--megatron", megatron, "--hf", tmp_path / "dry", "--dry-run")
    assert code == 0 and not (tmp_path / "dry").exists() and row(dry, "to be written") == row(wet, "read")


@pytest.mark.parametrize("command", ["hf-to-megatron", "megatron-to-hf"])
def test_nothing_is_replaced(command, tiny, tool, tmp_path):
    model, megatron = tiny
    folders = {"--hf": model.directory, "--megatron": megatron, f"--{command.split('-to-')[1]}": tmp_path / "out"}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    code, _, errors = tool(command, *(word for pair in folders.items() for word in pair))
    assert code == 2 and "exists" in errors
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_a_disk_that_is_too_small_is_told_before_writing(tiny, tool, tmp_path, monkeypatch):
    model, _ = tiny
    monkeypatch.setattr(report.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    code, _, errors = tool("hf-to-megatron", "--hf", model.directory, "--megatron", tmp_path / "out")
    assert code == 2 and "GiB free" in errors and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["hf-to-megatron", "megatron-to-hf"])
def test_a_disk_that_fills_up_leaves_nothing(command, tiny, tool, tmp_path):
    model, megatron = tiny
    folders = {"--hf": model.directory, "--megatron": megatron, f"--{command.split('-to-')[1]}": tmp_path / "out"}
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # a write beyond it fails as on a full disk
    try:
        code, _, errors = tool(command, *(word for pair in folders.items() for word in pair))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert code == 2 and "could not be written" in errors and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["hf-to-megatron", "megatron-to-hf"])
def test_an_interrupted_conversion_leaves_nothing(command, tiny, tool, tmp_path, monkeypatch):
    model, megatron = tiny
    folders = {"--hf": model.directory, "--megatron": megatron, f"--{command.split('-to-')[1]}": tmp_path / "out"}
    reads, source = [], HFReader if command == "hf-to-megatron" else TorchDistReader

    def read(self, *arguments, original=source.read):
        reads.append(arguments)
        if len(reads) == 40:
            assert list(tmp_path.iterdir()), "nothing had been written yet"
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(source, "read", read)
    code, _, errors = tool(command, *(word for pair in folders.items() for word in pair))
    assert code == 130 and "interrupted" in errors and list(tmp_path.iterdir()) == []


def test_another_data_type_there_and_back(tiny, tool, tmp_path):
    model, _ = tiny
    out, back = tmp_path / "out", tmp_path / "back"
    assert tool("hf-to-megatron", "--hf", model.directory, "--megatron", out, "--dtype", "bf16", "--verify")[0] == 0
    assert "--bf16" in (out / ARGUMENTS).read_text().split()
    assert tool("megatron-to-hf", "--megatron", out, "--hf", back, "--verify", "--shard-size", "0.00005")[0] == 0
    before, after = HFReader(model.directory), HFReader(back)
    assert len(list(back.glob("*.safetensors"))) > 1
    assert json.loads((back / "config.json").read_text())["dtype"] == "bfloat16"
    for name in before.names():
        bias = name.endswith("e_score_correction_bias")  # routing is decided by it, so it stays exact
        assert after.dtype(name) == (torch.float32 if bias else torch.bfloat16)
        assert torch.equal(before.read(name).to(after.dtype(name)), after.read(name))
    code, output, _ = tool("diff", model.directory, back)
    assert code == 1 and "torch.float32 and torch.bfloat16" in output


def test_differences_are_found_whatever_the_format(tiny, tool, tmp_path):
    model, megatron = tiny
    assert tool("diff", model.directory, megatron)[0] == 0
    assert tool("diff", megatron, megatron)[0] == 0
    shutil.copytree(model.directory, tmp_path / "other")
    path = sorted((tmp_path / "other").glob("*.safetensors"))[0]
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[3] += 0.5
    save_file(tensors, path)
    code, output, _ = tool("diff", megatron, tmp_path / "other")
    assert code == 1 and f"{name}: values differ by up to 0.5" in output and " 1 differ" in output


def test_frequencies_of_older_checkpoints_are_left_out_and_said(tiny, tool, tmp_path):
    model, megatron = tiny
    shutil.copytree(model.directory, tmp_path / "old")
    index = json.loads((tmp_path / "old" / "model.safetensors.index.json").read_text())
    path = sorted((tmp_path / "old").glob("*.safetensors"))[0]
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    frequencies = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    save_file(load_file(path) | {name: frequencies}, path)
    index["weight_map"][name] = path.name
    (tmp_path / "old" / "model.safetensors.index.json").write_text(json.dumps(index))
    code, output, _ = tool("hf-to-megatron", "--hf", tmp_path / "old", "--megatron", tmp_path / "out", "--verify")
    assert code == 0 and "1 left out: frequencies" in output
    assert tool("diff", megatron, tmp_path / "out")[0] == 0
    save_file(load_file(path) | {name: frequencies * 0.9}, path)
    code, _, errors = tool("hf-to-megatron", "--hf", tmp_path / "old", "--megatron", tmp_path / "other")
    assert code == 2 and f"{name} does not follow from" in errors and not (tmp_path / "other").exists()


def test_progress_is_counted_in_bytes_of_the_source(tiny, tool, tmp_path, monkeypatch):
    model, megatron = tiny
    bars = []

    class Bar(contextlib.nullcontext):
        def __init__(self, total, **_):
            super().__init__()
            self.total, self.n = total, 0
            bars.append(self)

        def update(self, n):
            self.n += n

    monkeypatch.setattr(report, "tqdm", Bar)
    size = sum(tensor.nbytes for path in model.directory.glob("*.safetensors") for tensor in load_file(path).values())
    half = ("--dtype", "bf16")
    assert tool("hf-to-megatron", "--hf", model.directory, "--megatron", tmp_path / "a", *half)[0] == 0
    assert tool("megatron-to-hf", "--megatron", megatron, "--hf", tmp_path / "b", *half)[0] == 0
    assert [(bar.total, bar.n) for bar in bars] == [(size, size)] * 2


def test_inspect_says_what_it_is(tiny, tool):
    model, megatron = tiny
    code, output, _ = tool("inspect", model.directory, "--tensors")
    assert code == 0 and "DeepSeek-V3" in output and "model.norm.weight [32] torch.float32" in output
    code, output, _ = tool("inspect", megatron)
    values = sum(torch.Size(HFReader(model.directory).shape(n)).numel() for n in HFReader(model.directory).names())
    assert code == 0 and "num_experts 8" in output and f"values {values}" in output


def test_logits_are_written_by_the_tool(tiny, tmp_path):
    model, megatron = tiny
    torch.save(model.tokens[:, :-1].int(), tmp_path / "tokens.pt")
    script = REPOSITORY / "tools" / "convert_checkpoint.py"
    run_script(
        script, "logits", "--megatron", megatron, "--tokens", tmp_path / "tokens.pt", "--out", tmp_path / "out.pt"
    )
    result = torch.load(tmp_path / "out.pt")
    assert result.dtype == torch.float32 and (result - model.logits).norm() < 1e-5 * model.logits.norm()


def test_tokens_that_cannot_be_are_refused(tiny, tool, tmp_path):
    _, megatron = tiny
    for content, rule in ((torch.zeros(2, 3), "integer"), (torch.full((1, 2), 128), "vocabulary"), ([1], "tensor")):
        torch.save(content, tmp_path / "tokens.pt")
        code, _, errors = tool(
            "logits", "--megatron", megatron, "--tokens", tmp_path / "tokens.pt", "--out", tmp_path / "o"
        )
        assert code == 2 and rule in errors


def test_logits_need_a_folder_before_anything_is_computed(tiny, tool, tmp_path):
    out = tmp_path / "nodir" / "x.pt"
    code, _, errors = tool("logits", "--megatron", tiny[1], "--tokens", tmp_path / "missing.pt", "--out", out)
    assert code == 2 and "nodir is not a folder" in errors


def test_names_of_transformer_engine(tiny, tool, tmp_path):
    """Without Transformer Engine its model cannot be built here: the names are those that its layer spec documents."""
    model, megatron = tiny
    out = tmp_path / "out"
    options = ("--transformer-impl", "transformer_engine", "--verify")
    assert tool("hf-to-megatron", "--hf", model.directory, "--megatron", out, *options)[0] == 0
    keys = set(TorchDistReader(out).model_keys())
    prefix = "decoder.layers."
    assert {f"{prefix}0.mlp.linear_fc1.layer_norm_weight", f"{prefix}1.pre_mlp_layernorm.weight",
            f"{prefix}1.self_attention.linear_q_up_proj.layer_norm_weight",
            f"{prefix}1.self_attention.linear_kv_up_proj.layer_norm_weight"} <= keys  # fmt: skip
    line = (out / ARGUMENTS).read_text()
    assert "--transformer-impl transformer_engine --dist-ckpt-strictness log_unexpected" in line
    assert not keys & {f"{prefix}1.self_attention.kv_layernorm.weight", f"{prefix}0.pre_mlp_layernorm.weight"}
    assert tool("megatron-to-hf", "--megatron", out, "--hf", tmp_path / "back")[0] == 0
    assert tool("diff", tmp_path / "back", model.directory)[0] == 0


def test_block_quantised_matrices_are_dequantised(tiny, tool, tmp_path):
    model, _ = tiny
    block, source = (16, 16), tmp_path / "fp8"
    shutil.copytree(model.directory, source)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": list(block)}
    (source / "config.json").write_text(json.dumps(config))
    expected, index = {}, json.loads((source / "model.safetensors.index.json").read_text())
    for path in source.glob("*.safetensors"):
        tensors = load_file(path)
        for name in [name for name in tensors if "_proj" in name]:
            rows, columns = tensors[name].shape
            scale = torch.rand(-(-rows // 16), -(-columns // 16)) + 0.5
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            whole = torch.empty(rows, columns)
            for i in range(rows):
                for j in range(columns):
                    whole[i, j] = tensors[name][i, j].float() * scale[i // 16, j // 16]
            expected[name] = whole.bfloat16()
            tensors[f"{name}_scale_inv"] = scale
            index["weight_map"][f"{name}_scale_inv"] = path.name
        save_file(tensors, path)
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    out, back = tmp_path / "out", tmp_path / "back"
    code, output, _ = tool("hf-to-megatron", "--hf", source, "--megatron", out, "--dtype", "bf16", "--verify")
    assert code == 0 and f"{len(expected)} block-quantised matrices" in output
    stored = [tensor for path in source.glob("*.safetensors") for tensor in load_file(path).values()]
    assert row(output, "read") == [len(stored), sum(tensor.nbytes for tensor in stored)]
    assert tool("megatron-to-hf", "--megatron", out, "--hf", back)[0] == 0
    after = HFReader(back)
    assert "quantization_config" not in after.config and set(after.names()) == set(HFReader(model.directory).names())
    assert expected and all(torch.equal(after.read(name), value) for name, value in expected.items())


def test_dequantisation_of_ragged_blocks():
    weight = torch.randn(5, 7).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2)
    result = dequantize_blocks(weight, scale, (2, 4), torch.float32)
    rows, columns = torch.meshgrid(torch.arange(5) // 2, torch.arange(7) // 4, indexing="ij")
    assert torch.equal(result, weight.float() * scale[rows, columns])


def test_a_stock_checkpoint_is_the_same_after_xmoe(tool, tmp_path):
    """Megatron saves, X-MoE loads and saves, Megatron loads that: not a bit differs."""
    options = "--micro-batch-size 1 --global-batch-size 12 --no-save-optim --save-interval 1 --train-iters 1".split()
    saved = {}
    for name, backend, load in (("a", "megatron", None), ("b", "xmoe", "a"), ("c", "megatron", "b")):
        saved[name] = tmp_path / name
        loading = [*start_from(saved[load]), "--lr", "0", "--weight-decay", "0"] if load else []
        run_job(TOY, f"--moe-backend {backend} --save {saved[name]}".split(), options, loading)
    for other in ("b", "c"):
        code, output, errors = tool("diff", saved["a"], saved[other])
        assert code == 0, output + errors
