"""report.py's picture: how close every op is to a copy, and how many times faster than the others."""

from itertools import cycle

COLOURS = {"ours": "#0b6fb8", "compile": "#e08214", "eager": "#8c8c8c"}


def draw(groups: list, caption: str, on_gpu: bool):
    """A matplotlib Figure: the roofline (rate against bytes moved, the copy as a line) beside the ratios.

    groups: report.py's, in the order of the bars.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, max(4.4, 0.34 * len(groups) + 1.6)), layout="constrained")
    panels = figure.subplots(1, 2, width_ratios=(1, 1.05))
    _draw_roofline(panels[0], groups, on_gpu)
    _draw_ratios(panels[1], groups)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(caption, fontsize=9, x=0.01, ha="left")
    return figure


def _draw_roofline(axes, groups: list, on_gpu: bool) -> None:
    rate, unit = ("gb_per_s", "GB/s") if on_gpu else ("percent_of_copy", "% of copy bandwidth")
    top = max(group.rows["ours"]["copy_gb_per_s"] for group in groups) if on_gpu else 100.0
    markers = dict(zip(dict.fromkeys(group.op for group in groups), cycle("os^DvP"), strict=False))
    for group in groups:
        points = {row: info[rate] for row, info in group.rows.items() if row in COLOURS}
        size = group.rows["ours"]["counted_bytes"] / 1e6
        axes.plot([size, size], [min(points.values()), max(points.values())], color="#dddddd", lw=1, zorder=1)
        for row, value in points.items():
            axes.scatter(
                size, value, s=46, color=COLOURS[row], marker=markers[group.op], edgecolor="white", lw=0.6, zorder=3
            )
    for row, colour in COLOURS.items():
        axes.scatter([], [], s=46, color=colour, label=row)
    for op, marker in markers.items():
        axes.scatter([], [], s=40, facecolor="none", edgecolor="black", lw=0.8, marker=marker, label=op)
    axes.axhline(top, color="black", lw=1)
    text = f"copy, {top:.0f} GB/s" if on_gpu else "copy"
    axes.annotate(text, (0.01, top), (0, 4), xycoords=("axes fraction", "data"), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlabel="bytes that have to move, MB (each input read once)", ylabel=unit)
    axes.set_ylim(top=1.8 * max(top, axes.get_ylim()[1] / 1.8))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(which="major", color="#eeeeee", lw=0.6)
    axes.legend(loc="upper left", bbox_to_anchor=(0, 0.9), frameon=False, fontsize=8)
    axes.set_title("How close to a copy", loc="left")


def _draw_ratios(axes, groups: list) -> None:
    """Bars from 1, to the right where ours is faster."""
    for offset, row in ((-0.19, "eager"), (0.19, "compile")):
        found = {place + offset: group for place, group in enumerate(groups) if row in group.rows}
        if not found:
            continue
        lengths = [group.ratio(row) - 1 for group in found.values()]
        axes.barh([*found], lengths, 0.36, left=1, color=COLOURS[row], label=f"than {row}", zorder=2)
        for place, group in found.items():
            end = group.ratio(row), place
            side = {"xytext": (3, 0), "ha": "left"} if end[0] >= 1 else {"xytext": (-3, 0), "ha": "right"}
            axes.annotate(group.times(row), end, textcoords="offset points", va="center", fontsize=8, **side)
    axes.axvline(1, color="black", lw=1, zorder=3)
    axes.set_yticks(range(len(groups)), [f"{group.op} {group.shape}" for group in groups], fontsize=8)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="the other's time / ours")
    low, high = axes.get_xlim()
    axes.set_xlim(low / 1.5, high * 1.5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: "")
    axes.grid(axis="x", which="major", color="#eeeeee", lw=0.6, zorder=0)
    axes.legend(loc="best", frameon=False, fontsize=8)
    axes.set_title("Times faster", loc="left")
