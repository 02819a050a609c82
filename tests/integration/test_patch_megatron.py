"""patches/: the patched script trains with X-MoE as pretrain_xmoe.py does, and is the stock script otherwise."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import REPOSITORY, TOY, run_job, run_script

PATCHES = REPOSITORY / "patches"
STAND_IN = Path(__file__).with_name("stock_script.py")
VERSION = "MAJOR = 0\nMINOR = {minor}\nPATCH = 1\nPRE_RELEASE = ''\n"
TRAIN = [*TOY, "--train-iters", "3"]
# what stock Megatron must be told without a GPU, Transformer Engine and Apex; our scripts find out by themselves
WITHOUT_A_GPU = """--distributed-backend gloo --transformer-impl local --no-persist-layer-norm --no-rope-fusion
    --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion
    --no-create-attention-mask-in-dataloader --eval-interval 1000 --moe-token-dispatcher-type alltoall""".split()
NO_PATCH = ["--spec", "megatron_xmoe.specs", "xmoe_decoder_block_spec"]


def checkout(folder: Path, script: str | None = None, minor: int = 19) -> Path:
    """A folder that looks like a checkout of Megatron-LM, as far as the tool looks."""
    (folder / "megatron" / "core").mkdir(parents=True)
    (folder / "megatron" / "core" / "package_info.py").write_text(VERSION.format(minor=minor))
    (folder / "pretrain_gpt.py").write_text(STAND_IN.read_text() if script is None else script)
    return folder


def patch(*arguments) -> subprocess.CompletedProcess:
    """Run the tool."""
    command = [sys.executable, PATCHES / "patch_megatron.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def losses_of(output: str) -> list[str]:
    """The losses as they were printed."""
    return [part.split("|")[0].strip() for part in output.split("lm loss: ")[1:]]


def test_lines_are_inserted_and_taken_out_again(tmp_path):
    script = checkout(tmp_path) / "pretrain_gpt.py"
    script.chmod(0o755)
    before = script.read_bytes()
    check = patch("--check", tmp_path)
    assert check.returncode == 1 and script.read_bytes() == before
    first = patch(tmp_path)
    after = script.read_bytes()
    assert first.returncode == 0 and first.stdout == check.stdout
    added = [line for line in first.stdout.splitlines() if line.startswith("+") and not line.startswith("+++")]
    assert len(added) == 3 and all(line.endswith("  # megatron_xmoe") for line in added)
    assert not [line for line in first.stdout.splitlines() if line.startswith("-") and not line.startswith("---")]
    assert stat.S_IMODE(script.stat().st_mode) == 0o755 and os.listdir(tmp_path) == ["megatron", "pretrain_gpt.py"]
    again, check = patch(tmp_path), patch("--check", tmp_path)
    assert again.returncode == check.returncode == 0 and not again.stdout and script.read_bytes() == after
    assert patch("--undo", tmp_path).returncode == 0 and script.read_bytes() == before
    assert patch("--undo", tmp_path).returncode == 0 and script.read_bytes() == before


def test_lines_of_another_version_are_replaced(tmp_path):
    script = checkout(tmp_path) / "pretrain_gpt.py"
    patch(tmp_path)
    expected = script.read_text()
    old = expected.replace("use_moe_backend(model_cfg)", "an_older_name(model_cfg)")
    script.write_text(old)
    assert patch("--check", tmp_path).returncode == 1
    assert patch(tmp_path).returncode == 0 and script.read_text() == expected


def test_line_endings_and_indentation_are_kept(tmp_path):
    text = STAND_IN.read_text().replace("    ", "\t").replace("\n", "\r\n")
    script = checkout(tmp_path) / "pretrain_gpt.py"
    script.write_bytes(text.encode())
    assert patch(tmp_path).returncode == 0
    lines = script.read_bytes().splitlines(keepends=True)
    assert all(line.endswith(b"\r\n") for line in lines)
    assert b"\tuse_moe_backend(model_cfg)  # megatron_xmoe\r\n" in lines
    assert patch("--undo", tmp_path).returncode == 0 and script.read_bytes() == text.encode()


@pytest.mark.parametrize(("changes", "rule"), [
    ({"minor": 20}, "is Megatron-Core 0.20.1; known are the releases 0.19"),
    ({"script": "print()\n"}, "has 0 statements `args = parse_and_validate_args(` (the parsing of the arguments)"),
    ({"script": STAND_IN.read_text().replace("full_config", "config")}, "(the model's configuration)"),
    ({"script": STAND_IN.read_text() * 2}, "has 2 statements `args = parse_and_validate_args("),
])  # fmt: skip
def test_an_unknown_script_is_refused_by_name(changes, rule, tmp_path):
    script = checkout(tmp_path, **changes) / "pretrain_gpt.py"
    before = script.read_bytes()
    for arguments in ((tmp_path,), ("--check", tmp_path)):
        done = patch(*arguments)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and rule in done.stderr
    assert script.read_bytes() == before


def test_a_folder_without_the_script_is_refused(tmp_path):
    done = patch(tmp_path)
    assert done.returncode == 2 and "Fix: give the folder of a Megatron-LM checkout" in done.stderr


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """The patched stand-in."""
    folder = checkout(tmp_path_factory.mktemp("checkout"))
    assert patch(folder).returncode == 0
    return folder / "pretrain_gpt.py"


@pytest.fixture(scope="module")
def expected():
    """The losses of pretrain_xmoe.py with the same options."""
    return {backend: losses_of(run_job(TRAIN, "--moe-backend", backend).output) for backend in ("megatron", "xmoe")}


def test_the_patched_script_trains_with_xmoe(patched, expected):
    job = run_script(patched, *TRAIN, "--moe-backend", "xmoe", "--of-the-script", "a value")
    assert "layers: {'XMoELayer': 4}" in job.output and "of the script: a value" in job.output
    assert "backend      xmoe (XMoELayer) for 12 experts, top-3" in job.output
    assert "set for you  --transformer-impl local" in job.output
    assert len(expected["xmoe"]) == 3 and losses_of(job.output) == expected["xmoe"]


def test_the_patched_script_is_the_stock_script_otherwise(patched, expected):
    stock = run_script(STAND_IN, *TRAIN, *WITHOUT_A_GPU)
    job = run_script(patched, *TRAIN, *WITHOUT_A_GPU)
    assert "layers: {'MoELayer': 4}" in stock.output and "layers: {'MoELayer': 4}" in job.output
    assert "set for you" not in job.output and losses_of(job.output) == losses_of(stock.output)
    assert len(losses_of(stock.output)) == 3


@pytest.mark.parametrize(
    "options",
    [
        "--moe-pad-expert-input-to-capacity --moe-backend xmoe --moe-expert-capacity-factor 1",
        "--xmoe-kernels reference",  # of X-MoE's, without it
    ],
)
def test_the_patched_script_refuses_what_is_not_served(patched, options):
    job = run_script(patched, *TRAIN, *options.split(), fails=True)
    line = next(line for line in job.errors.splitlines() if "error (rank 0)" in line)
    assert job.returncode == 2 and options.split()[0] in line and "Traceback" not in job.errors


def test_the_spec_alone_needs_no_patch():
    job = run_script(STAND_IN, *TRAIN, *WITHOUT_A_GPU, *NO_PATCH)
    assert "layers: {'XMoELayer': 4}" in job.output and len(losses_of(job.output)) == 3
    assert " ".join(NO_PATCH) in (PATCHES / "README.md").read_text()


@pytest.fixture(scope="module")
def real_checkout(tmp_path_factory):
    """A copy of what the tool looks at, and of what the script imports from its folder."""
    source = os.environ.get("MEGATRON_LM_PATH")
    if source is None:
        pytest.skip("MEGATRON_LM_PATH names no Megatron-LM checkout")
    folder = tmp_path_factory.mktemp("real")
    (folder / "megatron" / "core").mkdir(parents=True)
    for name in ("pretrain_gpt.py", "gpt_builders.py", "model_provider.py", "megatron/core/package_info.py"):
        shutil.copy(Path(source) / name, folder / name)
    return folder


def test_the_real_script_is_patched(real_checkout):
    script = real_checkout / "pretrain_gpt.py"
    before = script.read_bytes()
    done = patch(real_checkout)
    assert done.returncode == 0, done.stderr
    compile(script.read_text(), str(script), "exec")
    assert script.read_text().count("# megatron_xmoe") == 3
    assert patch("--undo", real_checkout).returncode == 0 and script.read_bytes() == before


def test_the_real_script_trains_with_xmoe(real_checkout, expected):
    assert patch(real_checkout).returncode == 0
    job = run_script(real_checkout / "pretrain_gpt.py", *TRAIN, "--moe-backend", "xmoe")
    assert "backend      xmoe (XMoELayer) for 12 experts, top-3" in job.output
    assert losses_of(job.output) == expected["xmoe"]
