"""The pictures of docs/algorithms.md; each takes a matplotlib figure and the data that figure_data computed for it."""

from collections.abc import Callable
from typing import NamedTuple

from figure_data import EXPERTS, LENGTH, LOCAL_EXPERTS, NODE_OF, NODE_SIZES, RANKS, SHARES, TOKENS, crossing, inside
from matplotlib.patches import FancyArrowPatch, Rectangle

COLORS = ("#8fb8de", "#f2b880", "#a5d6a7", "#d3b3e0", "#f4a6a6", "#cccccc")
INK, PALE, RED, BLUE = "#222222", "#eeeeee", "#c0392b", "#1f4e9c"
NETWORK, LINK = {"linewidth": 2.2}, {"linewidth": 1.4, "linestyle": (0, (3, 2))}
TOKEN_INK = (BLUE, RED)
WIDE, HIGH = 3.0, 2.0  # of a rank


class Drawing(NamedTuple):
    """A figure's size, its title for readers who do not see it, and the function that draws it."""

    inches: tuple[float, float]
    title: str
    draw: Callable


def _canvas(axes, right: float, top: float) -> None:
    """No axis: units are cells, y points down."""
    axes.set_xlim(-0.2, right)
    axes.set_ylim(top, -0.2)
    axes.set_axis_off()


def _cell(axes, x: float, y: float, text: str, color: str, width: float = 1.0, height: float = 1.0, **style) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="white", linewidth=1.5, clip_on=False))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=style.pop("ink", INK), **style)


def _note(axes, x: float, y: float, text: str, **style) -> None:
    axes.text(x, y, text, **{"ha": "left", "va": "center", "color": INK, **style})


def draw_buffers(figure, data: dict) -> None:
    """The buffers of the example, with and without dropping, beside the padded ones."""
    whole, capacity = data["all"], data["capacity"]
    parts = [("no dropping", whole, data["padded"][0])]
    parts += [(f"capacity {capacity}, policy {name}", kept, capacity) for name, kept in data["kept"].items()]
    places = figure.subplots(len(parts), 2, width_ratios=(18, 9), height_ratios=(1, 1, 1))
    everything = set(zip(whole["token_ids"], whole["expert_ids"], strict=True))
    for (left, right), (title, arrays, padded) in zip(places, parts, strict=True):
        _draw_arrays(left, title, arrays, everything)
        _draw_padded(right, arrays, padded)


def _draw_arrays(axes, title: str, arrays: dict, everything: set) -> None:
    _canvas(axes, 18, 5.6)
    experts, tokens = arrays["expert_ids"], arrays["token_ids"]
    _note(axes, 0, 0.3, f"padding-free: {title}, {len(tokens)} rows", weight="bold")
    names = ("row (token_ids)", "expert_ids", "combine_weights")
    texts = ([f"t{token}" for token in tokens], experts, arrays["combine_weights"])
    for line, (name, values) in enumerate(zip(names, texts, strict=True)):
        y = 1 + 1.15 * line
        _note(axes, 4.6, y + 0.5, name, ha="right", fontsize=9)
        for i, value in enumerate(values):
            color = COLORS[experts[i]] if line == 0 else PALE
            _cell(axes, 5 + i, y, str(value), color, fontsize=9)
    counts = " ".join(map(str, arrays["tokens_per_expert"]))
    _note(axes, 5, 4.8, f"tokens_per_expert: {counts}", fontsize=9)
    dropped = sorted(everything - set(zip(tokens, experts, strict=True)))
    if dropped:
        text = ", ".join(f"t{token} of expert {expert}" for token, expert in dropped)
        _note(axes, 11.4, 4.8, f"dropped: {text}", fontsize=9, color=RED)


def _draw_padded(axes, arrays: dict, padded: int) -> None:
    _canvas(axes, 8.6, 5.6)
    rows = len(arrays["token_ids"])
    _note(axes, 0, 0.3, f"padded [{EXPERTS}, {padded}]: {EXPERTS * padded} rows, {EXPERTS * padded - rows} of padding",
          weight="bold")  # fmt: skip
    first = 0
    for expert, count in enumerate(arrays["tokens_per_expert"]):
        _note(axes, 1.9, 1.45 + 0.95 * expert, f"expert {expert}", ha="right", fontsize=9)
        for i in range(padded):
            there = i < count
            text = f"t{arrays['token_ids'][first + i]}" if there else "pad"
            _cell(axes, 2.1 + i, 1 + 0.95 * expert, text, COLORS[expert] if there else PALE, height=0.9,
                  ink=INK if there else "#999999", fontsize=9 if there else 7)  # fmt: skip
        first += count


def draw_rows(figure, data: dict) -> None:
    """Where the rows of two tokens go, with the plain dispatcher and with redundancy bypassing."""
    plain, sent, forwarded = data["plain"], data["sent"], data["forwarded"]
    left, right = figure.subplots(1, 2)
    _draw_ranks(left, f"alltoall: {crossing(plain)} rows cross the network, {inside(plain)} stay inside", plain)
    title = f"rbd: {crossing(sent)} rows cross, {inside(sent) + len(forwarded)} inside ({len(forwarded)} forwarded)"
    _draw_ranks(right, title, sent + forwarded)
    handles = [right.plot([], [], color=INK, **style)[0] for style in (NETWORK, LINK)]
    handles += [right.plot([], [], color=color, linewidth=4)[0] for color in TOKEN_INK]
    figure.legend(handles, ["network", "inside the node", "token t0", "token t1"], loc="outside lower center", ncols=4,
                  frameon=False)  # fmt: skip


def _draw_ranks(axes, title: str, rows: list) -> None:
    _canvas(axes, 13.2, 9.8)
    axes.set_title(title, fontsize=10.5, weight="bold")
    size = len(NODE_OF) // 2
    corners = [(1.7 + 6.4 * node, 0.9 + 2.9 * (rank % size)) for rank, node in enumerate(NODE_OF)]
    for node in sorted(set(NODE_OF)):
        axes.add_patch(Rectangle((1.5 + 6.4 * node, 0), WIDE + 0.4, 9.5, facecolor="#fafafa", edgecolor="#888888"))
        _note(axes, 1.7 + 6.4 * node, 0.45, f"node {node}", fontsize=9)
    for rank, (x, y) in enumerate(corners):
        axes.add_patch(Rectangle((x, y), WIDE, HIGH, facecolor=PALE, edgecolor="#888888"))
        _note(axes, x + 0.15, y + 0.35, f"rank {rank}" + (": t0, t1" if rank == 0 else ""), fontsize=9)
        for slot in range(LOCAL_EXPERTS):
            expert = rank * LOCAL_EXPERTS + slot
            users = [token for token, chosen in enumerate(TOKENS) if expert in chosen]
            color = TOKEN_INK[users[0]] if users else "#999999"
            text = f"e{expert}" + "".join(f"\nt{user}" for user in users)
            _cell(axes, x + 0.2 + 1.35 * slot, y + 0.75, text, "white", 1.25, 1.1, ink=color, fontsize=8)
    network = sorted((row for row in rows if crossing([row])), key=lambda row: (row[1], row[2]))
    for i, row in enumerate(network):
        (x, y), (end, top) = corners[row[0]], corners[row[1]]
        same = [other for other in network[:i] if other[1] == row[1]]
        start, end = (x + WIDE, y + 0.25 + 0.28 * i), (end, top + 0.6 + 0.4 * len(same))
        _arrow(axes, start, end, 0.0, color=TOKEN_INK[row[2]], **NETWORK)
    for i, row in enumerate(row for row in rows if inside([row])):  # along the node's outer side
        (x, y), (_, below) = corners[row[0]], corners[row[1]]
        edge, bend = (x, 0.5) if NODE_OF[row[0]] == 0 else (x + WIDE, -0.5)
        start, end = (edge, y + 1.0 + 0.25 * (i % 3)), (edge, below + 0.5 + 0.45 * row[2])
        _arrow(axes, start, end, bend, color=TOKEN_INK[row[2]], **LINK)


def _arrow(axes, start: tuple, end: tuple, bend: float, **style) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, shrinkA=0, shrinkB=0,
                                   connectionstyle=f"arc3,rad={bend}", **style))  # fmt: skip


def draw_redundancy(figure, data: dict) -> None:
    """Closed form and random routes over the size of the expert-parallel group."""
    axes = figure.subplots()
    ranks = data["ranks"]
    for color, size in zip(("#7fa8d1", BLUE, "#0b2347"), NODE_SIZES, strict=True):
        places = [n for n in RANKS if n > size]
        label = f"top-8 of 256, {size} ranks a node"
        axes.plot(places, [100 * v for v in data["many"][str(size)]], color=color, label=label)
    few = ranks[: len(data["few"])]
    axes.plot(few, [100 * v for v in data["few"]], color=RED, label="top-6 of 64, 8 ranks a node")
    axes.plot(ranks, [100 * v for v in data["measured many"]], "o", color=BLUE, markersize=6, fillstyle="none")
    axes.plot(few, [100 * v for v in data["measured few"]], "o", color=RED, markersize=6, fillstyle="none")
    axes.plot([], [], "o", color=INK, markersize=6, fillstyle="none", label="counted: pilots of random routes")
    axes.axhline(100 * data["least"], color="0.4", linewidth=1, linestyle=(0, (4, 3)),
                 label=f"auto takes rbd from {data['least']:.0%} on")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(n) for n in ranks])
    axes.minorticks_off()
    axes.set(xlabel="ranks of the expert-parallel group", ylabel="rows between nodes saved (%)", ylim=(0, 85))
    _finish(axes)
    axes.legend(frameon=False, fontsize=9)


def draw_shares(figure, data: dict) -> None:
    """Which rank computes which token inside the block."""
    titles = {
        "off": "off: every rank dispatches every token",
        "on": "on: each dispatches its share; the outputs are gathered",
    }
    for axes, (mode, parts) in zip(figure.subplots(1, 2), data.items(), strict=True):
        _canvas(axes, LENGTH + 2.2, SHARES + 2.2)
        axes.set_title(titles[mode], fontsize=10.5, weight="bold")
        for token in range(LENGTH):
            _note(axes, 2.5 + token, 0.3, f"t{token}", ha="center", fontsize=9)
        for rank, (first, end) in enumerate(parts):
            _note(axes, 1.8, 1.2 + rank, f"TP rank {rank}", ha="right", fontsize=9)
            for token in range(LENGTH):
                mine = first <= token < end
                color = COLORS[rank] if mine else PALE
                _cell(axes, 2 + token, 0.75 + rank, f"t{token}" if mine else "", color, height=0.9, fontsize=9)
        computed = sum(end - first for first, end in parts)
        _note(axes, 2, SHARES + 1.3, f"{computed} tokens dispatched for a sequence of {LENGTH}")


def draw_break_even(figure, data: dict) -> None:
    """K / F of the models, and the curve above which sharding the sequence saves more."""
    axes = figure.subplots()
    lengths = [2**i for i in range(4, 18)]
    for factor, style in (("1", "-"), ("1.25", (0, (4, 3)))):
        curve = [2 / (float(factor) * length) for length in lengths]
        axes.plot(lengths, curve, color=INK, linestyle=style, linewidth=1.5, label=f"K/F = 2/(cS), c = {factor}")
    same: dict[tuple[float, float], list[str]] = {}
    for model, topk, ffn, crossings in data["models"]:
        same.setdefault((crossings["1"], topk / ffn), []).append(model)
    for i, ((length, ratio), models) in enumerate(same.items()):
        side = {"xytext": (-20, -6), "ha": "right"} if i % 2 else {"xytext": (9, 3), "ha": "left"}  # close neighbours
        axes.plot([length], [ratio], "o", color=BLUE, markersize=6)
        axes.annotate(f"{', '.join(models)}: {length:.0f}", (length, ratio), textcoords="offset points", fontsize=9,
                      **side)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths[::2], [str(n) for n in lengths[::2]])
    axes.minorticks_off()
    axes.set(xlabel="sequence length S (tokens)", ylabel="K / F", xlim=(lengths[0], lengths[-1]), ylim=(2e-5, 3e-2))
    _finish(axes)
    axes.legend(frameon=False, fontsize=9, title="above the line sharding the sequence saves more")


def _finish(axes) -> None:
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


DRAWINGS = {
    "pft": Drawing((11, 6.4), "A padding-free token buffer and a padded one", draw_buffers),
    "rbd": Drawing((11, 5.6), "Rows of two tokens between two nodes, without and with redundancy bypassing", draw_rows),
    "redundancy": Drawing((7.5, 4.6), "Rows between nodes that need not be sent", draw_redundancy),
    "ssmb": Drawing((11, 3.0), "Tokens of each tensor-parallel rank inside a Mixture-of-Experts block", draw_shares),
    "break_even": Drawing((7.5, 4.8), "From which sequence length on sharding it saves more", draw_break_even),
}
