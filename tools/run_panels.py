"""The pictures of a training run; each takes a matplotlib figure's axes and the run."""

import statistics
from collections.abc import Callable

from run_events import STAGES, Run, Series

TRAINING, VALIDATION, BALANCE = "#1f4e9c", "#d1495b", "RdBu_r"
SMOOTHED = 0.02  # half the window of the smooth curve, as a share of the points
MAX_TICKS = 16
FEW = 30  # points that are marked
MAX_CELLS = 64  # in a row, to be drawn with gaps between them
PAPERS_NAMES = ("gate", "dispatch\nbuffer", "all-to-all", "experts", "all-to-all", "combine")


def panels_of(run: Run) -> list[tuple[str, Callable]]:
    """(title, function of axes and run) of everything that the run has figures for."""
    possible = (
        ("Loss", draw_losses, run[run.loss_tag]),
        ("Throughput", draw_throughput, run.throughput),
        ("Experts' load", draw_load, run.load),
        ("Imbalance of the experts", draw_imbalance, run["xmoe/load-max"]),
        ("Bytes by link", draw_bytes, _largest(run["xmoe/intra-node-MiB"]) + _largest(run["xmoe/inter-node-MiB"])),
        ("All-to-all", draw_exchanges, run["xmoe/alltoall-ms"]),
        ("Where the time goes", draw_breakdown, run.breakdown),
    )
    return [(title, draw) for title, draw, data in possible if data]


def smooth(values: list[float]) -> list[float]:
    """Centred running mean, over fewer points towards both ends so that it starts and ends at the true values."""
    half = round(SMOOTHED * len(values))
    reach = [min(half, i, len(values) - 1 - i) for i in range(len(values))]
    return [statistics.fmean(values[i - r : i + r + 1]) for i, r in enumerate(reach)]


def _largest(series: Series) -> float:
    return max(series.values(), default=0.0)


def _points(series: Series) -> tuple[list[int], list[float]]:
    iterations = sorted(series)
    return iterations, [series[i] for i in iterations]


def _curve(axes, series: Series, label: str, color: str, **style) -> None:
    if series:
        marker = "." if len(series) < FEW else None
        axes.plot(*_points(series), label=label, color=color, **{"linewidth": 1.6, "marker": marker, **style})


def _finish(axes, unit: str, last: int, from_zero: bool = True) -> None:
    axes.set(xlabel="iteration", ylabel=unit)
    axes.set_xlim(0, last * 1.02)
    if from_zero:
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])  # a flat line is not on the edge
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(framealpha=1, edgecolor="white")


def draw_losses(axes, run: Run) -> None:
    """Training and validation loss over iterations, with a line where the run went on from a checkpoint."""
    iterations, losses = _points(run[run.loss_tag])
    axes.plot(iterations, losses, color=TRAINING, alpha=0.25, linewidth=1, label="training, each iteration")
    axes.plot(iterations, smooth(losses), color=TRAINING, linewidth=1.8, label="training, running mean")
    _curve(axes, run[f"{run.loss_tag} validation"], "validation", VALIDATION, marker="o", markersize=5)
    for number, iteration in enumerate(run.resumed):
        label = None if number else "stopped and resumed from a checkpoint"
        axes.axvline(iteration, color="0.35", linestyle=(0, (4, 3)), linewidth=1.2, label=label)
    _finish(axes, "loss (nats per token)", iterations[-1], from_zero=False)


def draw_throughput(axes, run: Run) -> None:
    """Tokens a second; pauses for evaluation and checkpoints are in it."""
    iterations, rates = _points(run.throughput)
    axes.plot(iterations, rates, color=TRAINING, alpha=0.25, linewidth=1, label="each iteration")
    axes.plot(iterations, smooth(rates), color=TRAINING, linewidth=1.8, label="running mean")
    axes.axhline(statistics.median(rates), color="0.35", linestyle=(0, (4, 3)), linewidth=1, label="median")
    _finish(axes, f"{'tokens' if run.sequence_length else 'samples'} a second, all ranks", iterations[-1])


def draw_load(axes, run: Run) -> None:
    """A map of layer by expert for the last report; white is the even share, red more, blue less."""
    iteration, loads = run.load
    layers = [number for number, row in enumerate(loads, start=1) if any(row)]
    rows = [loads[number - 1] for number in layers]
    image = axes.imshow(rows, cmap=BALANCE, vmin=0, vmax=2, aspect="auto", interpolation="nearest")
    experts = len(rows[0])
    axes.set_xticks(range(0, experts, -(-experts // MAX_TICKS)))
    step = -(-len(rows) // MAX_TICKS)
    axes.set_yticks(range(0, len(rows), step), [str(number) for number in layers[::step]])
    if experts <= MAX_CELLS:
        axes.set_xticks([i - 0.5 for i in range(1, experts)], minor=True)
        axes.set_yticks([i - 0.5 for i in range(1, len(rows))], minor=True)
        axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel=f"expert (report of iteration {iteration})", ylabel="layer")
    bar = axes.figure.colorbar(image, ax=axes, extend="max" if max(map(max, rows)) > 2 else "neither", pad=0.02)
    bar.set_label("tokens routed to the expert / even share")
    bar.outline.set_visible(False)


def draw_imbalance(axes, run: Run) -> None:
    """The busiest expert over iterations, and how many experts had no work."""
    worst, idle = run["xmoe/load-max-of-worst-layer"], run["xmoe/idle-experts"]
    _curve(axes, worst, "busiest expert of the worst layer", VALIDATION)
    _curve(axes, run["xmoe/load-max"], "busiest expert, mean over layers", TRAINING)
    axes.axhline(1, color="0.35", linestyle=(0, (4, 3)), linewidth=1, label="perfect balance")
    if any(idle.values()):
        right = axes.twinx()
        _curve(right, {i: share * 100 for i, share in idle.items()}, "", "0.5")
        right.set(ylabel="idle experts (%)", ylim=(0, 1.3 * 100 * max(idle.values())))
        axes.plot([], [], color="0.5", label="idle experts (right axis)")
    _finish(axes, "routes / even share", max(run["xmoe/load-max"]))


def draw_bytes(axes, run: Run) -> None:
    """Bytes that a rank sends in a layer's forward pass, and what redundancy bypassing keeps off the network."""
    inter, redundancy = run["xmoe/inter-node-MiB"], run["xmoe/redundancy"]
    _curve(axes, run["xmoe/intra-node-MiB"], "inside the node", TRAINING)
    if any(inter.values()):
        _curve(axes, inter, "to other nodes", VALIDATION)
    without = {i: inter[i] / (1 - share) for i, share in redundancy.items() if i in inter and 0 < share < 1}
    _curve(axes, without, "to other nodes, had every route its own row", VALIDATION, linestyle="dotted")
    _finish(axes, "MiB a rank and layer, forward", max(inter))


def draw_exchanges(axes, run: Run) -> None:
    """Time in the all-to-alls: the mean, and between which ranks it varies."""
    mean, slow, fast = (run[f"xmoe/alltoall-{name}ms"] for name in ("", "slowest-", "fastest-"))
    both = sorted(slow.keys() & fast.keys())
    axes.fill_between(both, [fast[i] for i in both], [slow[i] for i in both], color=TRAINING, alpha=0.15, linewidth=0,
                      label="from the rank that waits least to the one that waits most")  # fmt: skip
    _curve(axes, mean, "mean over ranks", TRAINING)
    _finish(axes, "ms a layer, forward", max(mean))


def draw_breakdown(axes, run: Run) -> None:
    """Bars of the stages of a layer's forward pass, as in the paper's figures."""
    times = [run.breakdown[stage] for stage in STAGES]
    colors = ["0.6", TRAINING, VALIDATION, "0.35", VALIDATION, TRAINING]
    bars = axes.bar(range(len(times)), times, color=colors, width=0.7)
    axes.bar_label(bars, [f"{time:.2f} ms\n{time / (sum(times) or 1):.0%}" for time in times], padding=2, fontsize=9)
    axes.set_xticks(range(len(times)), PAPERS_NAMES)
    axes.set(ylabel="ms a layer, forward", ylim=(0, max(times) * 1.2 or 1))
    axes.spines[["top", "right"]].set_visible(False)
