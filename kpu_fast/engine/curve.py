"""The loss curves of a run as a picture."""

from pathlib import Path

from kpu_fast.machine import written_whole


def save_curve(folder: Path, rows: list[dict]) -> Path:
    """Draw the rows of a run's metrics.jsonl as folder/losses.png: one panel per term, one line per teacher.

    A line begins where its rows do: a run that resumed with another balance or other terms has none before.
    """
    from matplotlib.figure import Figure

    keys = [key for key in rows[-1] if "/" in key]
    terms = list(dict.fromkeys(key.rpartition("/")[2] for key in keys))
    titles = {"s2t": "s2t: in the teacher's space", "t2s": "t2s: in the common space", "rec": "rec: reconstruction"}
    titles["share"] = "share: in the total"
    figure = Figure(figsize=(4.2 * len(terms), 3.2))
    axes = figure.subplots(1, len(terms), squeeze=False)
    for axis, term in zip(axes[0], terms, strict=True):
        for key in keys:
            if key.endswith(f"/{term}"):
                steps, values = zip(*((row["step"], row[key]) for row in rows if key in row), strict=True)
                axis.plot(steps, values, label=key.rpartition("/")[0], linewidth=1.2)
        axis.set_title(titles.get(term, term), fontsize=10)
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("loss")
    axes[0][-1].legend(fontsize=8)
    figure.tight_layout()
    path = folder / "losses.png"
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
    return path
