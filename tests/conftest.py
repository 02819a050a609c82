"""Set-up of all tests: the CPU platform, poisoned memory, and which markers run where."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))  # works without an installation, too

import harness  # noqa: E402
from interpreter import interpreted  # noqa: E402, F401  (a fixture)

torch.set_num_threads(1)
harness.install_platform()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of this test suite."""
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine or this call cannot or should not run."""
    gpus = torch.cuda.device_count()
    reasons = {
        "gpu": None if gpus >= 1 else "needs a GPU, and torch finds none",
        "multi_gpu": None if gpus >= 2 else f"needs several GPUs, and torch finds {gpus}",
        "slow": None if config.getoption("--slow") else "slow; runs with --slow",
    }
    for item in items:
        for name, reason in reasons.items():
            if reason and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Uninitialised memory holds NaN in unit and distributed tests; others run programs as they are."""
    if request.path.relative_to(TESTS).parts[0] not in ("unit", "distributed"):
        yield
        return
    with harness.poisoned_memory():
        yield
