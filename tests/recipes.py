"""The recipes of tools/recipes: what they would start, and their dry runs in processes of the fork server."""

import os
import subprocess
from dataclasses import dataclass

from jobs import REPOSITORY, run_script

RECIPES = REPOSITORY / "tools" / "recipes"
SHARED = ("common", "xmoe_paper")  # sourced by the others
NAMES = sorted(path.stem for path in RECIPES.glob("*.sh") if path.stem not in SHARED)
# the variables of a recipe must come from the test alone
VARIABLES = """GPUS RANK TP PP EP MBS GBS SEQ_LENGTH RECOMPUTE TRAIN_ITERS PRECISION BACKEND DATA_PATH TOKENIZER_TYPE
    TOKENIZER_MODEL CHECKPOINTS SAVE_INTERVAL LAUNCHER NNODES GPUS_PER_NODE MASTER_ADDR MASTER_PORT WORLD_SIZE
    LOCAL_RANK SWIGLU CAPACITY_FACTOR MTP LAST_STAGE_LAYERS""".split()


def run_recipe(name: str, *options: str, timeout: int = 300, **environment: str) -> subprocess.CompletedProcess:
    """Run a recipe as a user does."""
    inherited = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    return subprocess.run(
        ["bash", str(RECIPES / f"{name}.sh"), *options],
        capture_output=True, text=True, timeout=timeout, env=inherited | environment,
    )  # fmt: skip


def words_of(name: str, *options: str, **environment: str) -> list[str]:
    """The options that a recipe would start pretrain_xmoe.py (or, with --dry-run, dry_run.py) with."""
    shown = run_recipe(name, "--show", *options, **environment)
    assert shown.returncode == 0, shown.stderr
    return shown.stdout.splitlines()


@dataclass
class DryRun:
    """What a dry run printed."""

    lines: list[str]

    @property
    def parts(self) -> dict[str, tuple[int, int]]:
        """Part of the model -> numbers of parameters on the rank and in the whole model."""
        rows = self.lines[2 : next(i for i, line in enumerate(self.lines) if line.startswith("memory"))]
        return {row[:16].strip(): tuple(int(n.replace(",", "")) for n in row[16:].split()) for row in rows}

    def figure(self, name: str) -> int:
        """The number after `name:`."""
        return int(next(line for line in self.lines if line.startswith(f"{name}: ")).split(": ")[1].split()[0])


def dry_run(name: str, *options: str, memory_limit: float = 0, **environment: str) -> DryRun:
    """A recipe's dry run; the last line is the number of parameters."""
    words = words_of(name, "--dry-run", "--memory-limit", str(memory_limit), *options, **environment)
    result = DryRun(run_script(REPOSITORY / "tools" / "dry_run.py", *words).output.splitlines())
    assert result.lines[-1] == f"parameters: {result.figure('parameters')}"
    return result
