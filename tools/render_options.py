#!/usr/bin/env python3
"""Writes docs/options.md: what becomes of each of Megatron's options that concern experts, from the program's table.

python tools/render_options.py            # write the page
python tools/render_options.py --check    # exit code 1 if the page is not what would be written
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "options.md"
SHOWN_IN = "tests/option_cases.py"

HEAD = f"""# Megatron's options and X-MoE

Made by `python tools/render_options.py` from `megatron_xmoe/training/option_table.py`; do not edit.

`pretrain_xmoe.py` takes every option of Megatron-Core's GPT pretraining. This page lists those that concern the
Mixture-of-Experts block. An option is served, served for some values, or refused: then the program ends within
seconds, with a line that names the option, the reason and the way out. None is ignored. Options with their default
value pass.

Each case named here is a command line in `{SHOWN_IN}`.
`tests/integration/test_options_served.py` trains it with stock Megatron and with X-MoE, in one process and with the
experts over two (some in other layouts): losses of ten iterations agree to 1e-5, the update of every parameter by a
step of plain SGD to 1e-4.

Experts have biases unless `--disable-bias-linear` is given, as Megatron means it
(`tests/integration/test_experts_training.py`; stock experts without Transformer Engine do not train with biases).
Where Megatron itself gives experts none, beside shared experts and with `--expert-tensor-parallel-size` above 1, the
option is set, and the start-up block says so.
"""


def main() -> int:
    """Write or check the page; returns the exit code."""
    example = "Example: python tools/render_options.py --check"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=example)
    text = "write nothing: exit code 1 if the page is not what would be written"
    parser.add_argument("--check", action="store_true", help=text)
    check = parser.parse_args().check
    sys.path.insert(0, str(ROOT))
    page = render()
    if not check:
        PAGE.write_text(page)
        return 0
    if PAGE.read_text() == page:
        return 0
    print(f"{PAGE} is stale. Fix: python tools/render_options.py", file=sys.stderr)
    return 1


def render() -> str:
    """The text of the page."""
    from megatron_xmoe.training import option_table as table

    served = [(name, "; ".join(cases)) for name, cases in table.SERVED.items()]
    limited = [
        (name, limit.rule, limit.way_out, "; ".join(limit.shown_by) or "none: the usual values")
        for name, limit in table.LIMITED.items()
    ]
    parts = [
        HEAD,
        "## Served\n",
        _rows(("option", "shown by the cases"), served, table.spelling),
        "\n## Served for some values\n",
        _rows(("option", "rule", "otherwise", "shown by the cases"), limited, table.spelling),
        "\n## Refused with `--moe-backend xmoe`\n",
        _refusals(table.REFUSED, table.spelling),
        "\n## Refused with either backend\n",
        _refusals(table.UNAVAILABLE, table.spelling),
        "\n## Not about the block\n\nThese concern experts by name only, and are Megatron's own business: "
        + ", ".join(f"`{table.spelling(name)}`" for name in sorted(table.UNRELATED))
        + ".\n",
    ]
    return "\n".join(parts)


def _refusals(refusals: dict, spelling) -> str:
    rows = [(name, refusal.reason, refusal.way_out) for name, refusal in refusals.items()]
    return _rows(("option", "reason", "way out"), rows, spelling)


def _rows(header: tuple[str, ...], rows: list[tuple[str, ...]], spelling) -> str:
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    lines += [f"| `{spelling(name)}` | {' | '.join(rest)} |" for name, *rest in sorted(rows)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
