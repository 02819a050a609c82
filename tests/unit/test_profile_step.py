"""tools/profile_step.py: a made-up trace whose stages are known."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import profile_step  # noqa: E402

MAIN, BACKWARD = 1, 2


class Trace:
    """Events in microseconds; each launch gets a kernel."""

    def __init__(self):
        self.events = []

    def operation(self, name, begin, end, thread=MAIN, sequence=None, category="cpu_op", **args):
        if sequence is not None:
            args |= {"Sequence number": sequence, "Fwd thread id": int(thread == BACKWARD)}
        self.events.append({"ph": "X", "cat": category, "name": name, "tid": thread, "ts": begin, "dur": end - begin,
                            "args": args})  # fmt: skip

    def kernel(self, launched, begin, end, thread=MAIN, name="kernel", stream=7):
        number = len(self.events)
        self.operation("cudaLaunchKernel", launched, launched + 1, thread, category="cuda_runtime", correlation=number)
        self.operation(name, begin, end, stream, category="kernel", correlation=number)


def step_of_one_layer() -> list[dict]:
    """Forward of a linear layer, an MoE layer, output layer and loss; backward; clipping; the optimizer."""
    trace = Trace()
    trace.operation("ProfilerStep#9", 0, 5000, category="user_annotation")
    trace.operation("LinearWithGradAccumulationAndAsyncCommunication", 0, 20, sequence=1)
    trace.kernel(10, 100, 200)
    trace.operation("aten::mul", 30, 40, sequence=2)
    trace.kernel(35, 210, 240)  # 10 us of waiting
    trace.operation("xmoe.gate", 50, 60, category="user_annotation")
    trace.operation("aten::topk", 52, 58, sequence=3)
    trace.kernel(55, 240, 250)
    trace.operation("xmoe.experts", 70, 100, category="user_annotation")
    trace.operation("aten::empty", 72, 74, sequence=4)  # makes no node, so the next one has the number as well
    trace.operation("_GroupedMLP", 75, 98, sequence=4)
    trace.operation("xmoe.permute", 76, 80, category="user_annotation")
    trace.kernel(78, 250, 260)
    trace.kernel(90, 260, 560)
    trace.kernel(92, 500, 580, stream=8)  # 20 us of it alone
    trace.operation("LinearWithGradAccumulationAndAsyncCommunication", 110, 120, sequence=5)
    trace.kernel(115, 580, 600)
    trace.operation("_VocabParallelCrossEntropy", 130, 140, sequence=6)
    trace.kernel(135, 600, 650)
    for name, sequence, begin, end in (("_VocabParallelCrossEntropyBackward", 6, 650, 700),
                                       ("LinearWithGradAccumulationAndAsyncCommunicationBackward", 5, 700, 740),
                                       ("_GroupedMLPBackward", 4, 740, 1340)):  # fmt: skip
        trace.operation(profile_step.BACKWARD + name, begin - 400, begin - 370, BACKWARD, sequence)
        trace.kernel(begin - 390, begin, end, BACKWARD)
    trace.operation(profile_step.BACKWARD + "torch::autograd::AccumulateGrad", 1100, 1200, BACKWARD, 2**63)
    trace.kernel(1150, 1340, 1350, BACKWARD)
    trace.operation("aten::mul_", 1300, 1310)
    trace.kernel(1305, 1400, 1420)  # 50 us of waiting
    trace.operation("Optimizer.step#AdamW.step", 1320, 1340, category="user_annotation")
    trace.operation("aten::_fused_adamw_", 1325, 1335)
    trace.kernel(1330, 1420, 1530, name="adam")
    return trace.events


def test_every_moment_has_a_stage():
    step = profile_step.analyse(step_of_one_layer())
    spent = {name: (s.forward, s.backward, s.waiting, s.kernels) for name, s in step.stages.items()}
    expected = {
        profile_step.LINEAR: (0.1, 0, 0, 1),
        profile_step.REST: (0.03, 0, 0.01, 1),
        "gate": (0.01, 0, 0, 1),
        "permute": (0.01, 0, 0, 1),
        "experts": (0.32, 0.6, 0, 3),
        profile_step.OUTPUT_LAYER: (0.02, 0.04, 0, 2),
        profile_step.LOSS: (0.05, 0.05, 0, 2),
        profile_step.ACCUMULATION: (0, 0.01, 0, 1),
        profile_step.AFTER: (0.02, 0, 0.05, 1),
        "optimizer's step": (0.11, 0, 0, 1),
    }
    assert spent.keys() == expected.keys()
    for name, values in expected.items():
        assert spent[name] == pytest.approx(values), name
    assert step.span == pytest.approx(1.43) == sum(sum(values[:3]) for values in spent.values())


def test_recomputed_stages_are_of_the_backward_pass():
    trace = Trace()
    trace.operation("CheckpointFunction", 0, 10, sequence=1)
    trace.kernel(5, 10, 20)
    trace.operation(profile_step.BACKWARD + "CheckpointFunctionBackward", 20, 90, BACKWARD, 1)
    trace.operation("xmoe.gate", 30, 50, BACKWARD, category="user_annotation")
    trace.kernel(40, 50, 80, BACKWARD)
    spent = profile_step.analyse(trace.events).stages["gate"]
    assert (spent.forward, spent.backward, spent.waiting) == pytest.approx((0, 0.03, 0.03))


def test_command_line(tmp_path):
    path = tmp_path / "rank-0.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": step_of_one_layer()}).encode()))
    tool = [sys.executable, str(TOOLS / "profile_step.py")]
    done = subprocess.run([*tool, str(path), "--kernels", "2"], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[1].split() == ["experts", "0.32", "0.60", "0.00", "3", "64.3%"]
    assert [line.split()[-1] for line in lines[-2:]] == ["kernel", "adam"] and "100.0%" in done.stdout
    for content, message in ((b"{}", "is no trace"), (b'{"traceEvents": []}', "no kernels")):
        (tmp_path / "bad.json").write_bytes(content)
        done = subprocess.run([*tool, str(tmp_path / "bad.json")], capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
