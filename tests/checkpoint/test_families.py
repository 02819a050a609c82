"""Every family: HuggingFace -> Megatron -> HuggingFace to the bit, and the same outputs as transformers' model."""

import tempfile
from pathlib import Path

import numpy
import pytest
import torch
from jobs import REPOSITORY, Job, run_job, run_script
from tiny_models import CASES, LENGTH, VOCABULARY, Tiny, make

from megatron_xmoe.checkpoint.convert import ARGUMENTS, Options, hf_to_megatron, megatron_to_hf
from megatron_xmoe.checkpoint.hf import HFReader
from megatron_xmoe.checkpoint.views import MegatronAsHF

LAYOUTS = {
    "one": (1, []),
    "ep2": (2, ["--expert-model-parallel-size", "2"]),
    "tp2": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
}
QUICK = ("qwen3_moe", "olmoe", "deepseek_v3", "tied_odd_vocabulary")  # the others' layouts run with --slow
FULL_VOCABULARY = [name for name, (_, values) in CASES.items() if values["vocab_size"] == VOCABULARY]


def cases(*names: str, quick: tuple[str, ...] = QUICK) -> list:
    """Test parameters, slow where the case is not a quick one."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Makes each case once: function of its name -> (the model, its Megatron checkpoint)."""
    made: dict[str, tuple[Tiny, Path]] = {}

    def get(name: str) -> tuple[Tiny, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            tiny = make(name, folder / "hf")
            hf_to_megatron(tiny.directory, folder / "megatron", Options(verify=True))
            made[name] = tiny, folder / "megatron"
        return made[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_there_and_back_again_is_the_same_to_the_bit(name, converted, tmp_path):
    tiny, megatron = converted(name)
    megatron_to_hf(megatron, tmp_path / "back", Options(verify=True))
    before, after = HFReader(tiny.directory), HFReader(tmp_path / "back")
    assert set(before.names()) == set(after.names())
    for tensor in before.names():
        assert before.dtype(tensor) == after.dtype(tensor)
        assert torch.equal(before.read(tensor), after.read(tensor)), tensor
    for path in before.side_files():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


def compute(tiny: Tiny, megatron: Path, processes: int, arguments: list[str]) -> dict[str, torch.Tensor]:
    """What pretrain_xmoe.py's model computes in some layout."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(tiny.tokens, f"{folder}/tokens.pt")
        script = REPOSITORY / "tests" / "checkpoint" / "logits_job.py"
        run_script(script, f"{folder}/tokens.pt", megatron, f"{folder}/out.pt", *arguments, processes=processes)
        return torch.load(f"{folder}/out.pt")


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name, converted):
    compare_with_transformers(name, "one", converted)


@pytest.mark.parametrize("layout", ["ep2", "tp2"])
@pytest.mark.parametrize("name", cases(*CASES))
def test_logits_in_parallel_are_those_of_transformers(name, layout, converted):
    compare_with_transformers(name, layout, converted)


def compare_with_transformers(name: str, layout: str, converted) -> None:
    """Logits and loss in a layout."""
    tiny, megatron = converted(name)
    result = compute(tiny, megatron, *LAYOUTS[layout])
    assert result["logits"].shape == tiny.logits.shape
    error = (result["logits"] - tiny.logits).norm() / tiny.logits.norm()
    assert error < 1e-5
    if name in FULL_VOCABULARY:  # padding of the vocabulary counts in Megatron's loss
        assert abs(result["loss"].item() - tiny.loss) < 1e-5 * tiny.loss


def training(tiny: Tiny, megatron: Path, folder: Path, arguments: str, processes: int = 1) -> Job:
    """One step of pretrain_xmoe.py from a converted checkpoint, on the model's first row of tokens."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(folder / "data.bin"), dtype=numpy.int32)
    builder.add_document(tiny.tokens[0], [LENGTH + 1])
    builder.finalize(str(folder / "data.idx"))
    return run_job(
        (megatron / ARGUMENTS).read_text().split(),
        f"--load {megatron} --seq-length {LENGTH} --train-iters 1 --micro-batch-size 1 --data-path {folder / 'data'} "
        f"--split 1,0,0 --eval-iters 0 --log-interval 1 --tokenizer-type NullTokenizer --vocab-size 101 "
        f"--data-cache-path {folder / 'cache'} {arguments}".split(),
        processes=processes,
    )


@pytest.mark.parametrize("name", cases(*FULL_VOCABULARY, quick=("qwen3_moe", "deepseek_v3")))
def test_the_first_training_loss_is_that_of_transformers(name, converted, tmp_path):
    job = training(*converted(name), tmp_path, "--vocab-size 128 --lr 1e-5 --global-batch-size 1")
    assert job.losses.keys() == {1}
    assert abs(job.losses[1] - converted(name)[0].loss) < 1e-5 * converted(name)[0].loss


SAVED_BY = {
    "qwen3_moe": (3, "--pipeline-model-parallel-size 3 --global-batch-size 1 --vocab-size 128"),
    "deepseek_v3": (2, "--expert-model-parallel-size 2 --global-batch-size 2 --vocab-size 128"),
    "olmoe": (2, "--tensor-model-parallel-size 2 --sequence-parallel --global-batch-size 1 --vocab-size 128"),
    "tied_odd_vocabulary": (2, "--tensor-model-parallel-size 2 --sequence-parallel --global-batch-size 1"),
}


@pytest.mark.parametrize("name", cases(*SAVED_BY, quick=("qwen3_moe", "tied_odd_vocabulary")))
def test_what_training_saved_in_any_layout_becomes_huggingface_again(name, converted, tmp_path):
    """A step that changes the weights; the file then has optimizer states and the shards of several ranks."""
    tiny, megatron = converted(name)
    processes, arguments = SAVED_BY[name]
    job = training(
        tiny, megatron, tmp_path, f"{arguments} --lr 1e-2 --save {tmp_path / 'saved'} --save-interval 1", processes
    )
    if name in FULL_VOCABULARY and "--global-batch-size 1" in arguments:
        assert abs(job.losses[1] - tiny.loss) < 1e-5 * tiny.loss
    megatron_to_hf(tmp_path / "saved", tmp_path / "back", Options(), hf_config=tiny.directory)
    before, after = HFReader(tiny.directory), HFReader(tmp_path / "back")
    trained = MegatronAsHF(tmp_path / "saved", tiny.directory)
    assert set(before.names()) == set(after.names())
    for tensor in before.names():
        assert torch.equal(trained.read(tensor), after.read(tensor)), tensor
    changed = [tensor for tensor in before.names() if not torch.equal(before.read(tensor), after.read(tensor))]
    assert len(changed) > 0.5 * len(before.names())
    index = [path.name for path in (tmp_path / "back").iterdir() if "safetensors" in path.name]
    assert index == ["model.safetensors"]  # the source had several shards
