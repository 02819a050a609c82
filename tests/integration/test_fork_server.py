"""The server that starts the other integration tests' processes: what a launcher does, it does."""

import json
import time

import pytest
from jobs import run_script


def script(tmp_path, text):
    path = tmp_path / "program.py"
    path.write_text(text)
    return path


def test_processes_are_what_a_launcher_starts(tmp_path):
    program = script(tmp_path, (
        "import json, os, sys\n"
        "if __name__ == '__main__':\n"
        "    names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR')\n"
        "    print(json.dumps([sys.argv, [os.environ[name] for name in names], sys.stdin.read()]))\n"
        "    print(hasattr(sys, 'left_behind'), file=sys.stderr)\n"
        "    sys.left_behind = True\n"
    ))  # fmt: skip
    for _ in range(2):
        job = run_script(program, "--option", "value", processes=2)
        assert job.returncode == 0 and job.errors.split() == ["False"] * 2
        for rank, line in enumerate(job.output.splitlines()):
            argv, environment, stdin = json.loads(line)
            assert argv == [str(program), "--option", "value"] and stdin == ""
            assert environment == [str(rank), str(rank), "2", "127.0.0.1"]


def test_one_failure_ends_the_others(tmp_path):
    program = script(tmp_path, (
        "import os, sys, time\n"
        "if os.environ['RANK'] == '1':\n"
        "    raise ValueError('this one fails')\n"
        "time.sleep(60)\n"
    ))  # fmt: skip
    start = time.monotonic()
    job = run_script(program, processes=2, fails=True)
    assert job.returncode == 1 and "this one fails" in job.errors
    assert time.monotonic() - start < 30


def test_exit_codes_and_cleaning_up(tmp_path):
    program = script(tmp_path, "import atexit, sys\natexit.register(print, 'cleaned up')\nsys.exit(3)\n")
    job = run_script(program, fails=True)
    assert job.returncode == 3 and job.output == "cleaned up\n"


def test_a_hanging_run_is_killed(tmp_path):
    with pytest.raises(TimeoutError, match="not done after 1 s"):
        run_script(script(tmp_path, "import time\ntime.sleep(60)\n"), timeout=1)
