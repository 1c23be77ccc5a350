"""The plot of a run, as SVG."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot  # noqa: E402 (imported after the choice of the backend)
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator  # noqa: E402

COLOURS = {"emit-log": "#0072b2", "receive-logs": "#56b4e9", "C yardstick": "#d55e00", "C consumer": "#e69f00"}
"""By the start of the name. The Okabe-Ito palette is distinguishable with any colour vision."""
OTHERS = "#8c8c8c"
Panel = Callable[[Axes, list[dict]], None]


def draw(sections: list[dict], path: Path) -> None:
    """Draws the measured sections, in at most six panels."""
    found = {section["key"]: section["rows"] for section in sections}
    panels = [(title, draw_panel, rows) for keys, title, draw_panel in PANELS
              if (rows := [row for key in keys for row in found.get(key, [])])]
    if not panels:
        return
    pyplot.rcParams.update({"font.size": 9, "svg.hashsalt": "bench", "svg.fonttype": "none",
                            "axes.spines.top": False, "axes.spines.right": False})
    height = (len(panels) + 1) // 2
    figure, axes = pyplot.subplots(height, min(len(panels), 2), figsize=(11, 3.4 * height), squeeze=False,
                                   layout="constrained")
    for axis, (title, draw_panel, rows) in zip(axes.flat, panels):
        axis.set_title(title, loc="left", fontweight="bold")
        draw_panel(axis, rows)
    for axis in list(axes.flat)[len(panels):]:
        axis.set_axis_off()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def bars(label: str) -> Panel:
    """Horizontal bars on a logarithmic axis, each with its value."""
    def draw_bars(axis: Axes, rows: list[dict]) -> None:
        names, values = [row["name"] for row in rows], [row["median"] for row in rows]
        drawn = axis.barh(names, values, color=[colour(name) for name in names])
        axis.bar_label(drawn, [f" {value:,.0f}" if value >= 100 else f" {value:.1f}" for value in values])
        axis.set(xscale="log", xlabel=label, xlim=(min(values) / 2, max(values) * 4))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value, False)))
        axis.invert_yaxis()
    return draw_bars


def curves(x_label: str, y_label: str, logarithmic: bool = True) -> Panel:
    """A curve for each series."""
    def draw_curves(axis: Axes, rows: list[dict]) -> None:
        series: dict[str, list[dict]] = defaultdict(list)
        for row in rows:
            series[row["series"]].append(row)
        drawn = [name for name in series if not name.startswith("cat")]
        for name, marker in zip(drawn, "os^vDPX*"):
            dashed = "p99" in name or "batch" in name
            axis.plot([row["x"] for row in series[name]], [row["median"] for row in series[name]], label=name,
                      color=colour(name), marker=marker, linestyle="--" if dashed else "-")
        axis.set(xscale="log", xlabel=x_label, ylabel=y_label)
        if logarithmic:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        else:
            axis.set_ylim(0, 1.2 * max(row["median"] for row in rows))
        ticks = sorted({row["x"] for row in rows})
        axis.set_xticks(ticks, [short(tick, "bytes" in x_label) for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    return draw_curves


def colour(name: str) -> str:
    """The colour of a contestant."""
    return next((of for begin, of in COLOURS.items() if name.startswith(begin)), OTHERS)


def short(value: float, is_size: bool) -> str:
    """A number on an axis."""
    base, units = (1024, ["", "Ki", "Mi"]) if is_size else (1000, ["", "k", "M"])
    while value >= base and len(units) > 1:
        value /= base
        units.pop(0)
    return f"{value:g}{units[0]}"


PANELS = [
    (["oneshot"], "One message, whole process (less is better)", bars("milliseconds, logarithmic")),
    (["lines"], "Lines of 100 bytes, end to end (more is better)", bars("messages per second, logarithmic")),
    (["sizes"], "Throughput by size (more is better)", curves("bytes of a message", "MB/s, logarithmic")),
    (["publisher-cpu"], "CPU of publishing by number of receivers (flat is best)",
     curves("receivers", "microseconds a line", logarithmic=False)),
    (["publisher-memory", "receiver-memory"], "Peak memory by length of input (less is better)",
     curves("lines", "MiB", logarithmic=False)),
    (["latency-1"], "Latency by load (less is better)", curves("lines per second", "milliseconds, logarithmic")),
]
