"""The results: rows of values with their ratios, as text, Markdown and JSON."""

import math
from dataclasses import dataclass, field
from statistics import median


@dataclass(frozen=True)
class Row:
    """The results of one contestant in one kind of work."""

    name: str
    values: list[float]
    """One value for each round."""
    unit: str
    reference: list[float]
    """The values of the reference in the same rounds."""
    note: str = ""
    x: float | None = None
    """The place on the horizontal axis of a curve."""
    series: str = ""
    """The name of the curve."""
    decimals: int | None = None
    """The decimal places of the median; by default as many as are significant."""

    def ratios(self) -> list[float]:
        """The ratio to the reference for each round. A disturbance of a whole round does not change it."""
        return [value / reference for value, reference in zip(self.values, self.reference)]

    def cells(self) -> list[str]:
        """Name, median, unit, ratio, range of the ratio, and note."""
        ratios = self.ratios()
        spread = f"{number(min(ratios))}..{number(max(ratios))}" if len(ratios) > 1 else ""
        if self.values is self.reference:
            spread = ""
        value = number(median(self.values), self.decimals)
        return [self.name, value, self.unit, number(median(ratios)), spread, self.note]

    def data(self) -> dict:
        """The content for results.json."""
        ratios = self.ratios()
        return {"name": self.name, "series": self.series, "x": self.x, "unit": self.unit, "median": median(self.values),
                "ratio": {"median": median(ratios), "min": min(ratios), "max": max(ratios)}, "note": self.note,
                "rounds": self.values}


@dataclass(frozen=True)
class Section:
    """Rows that belong together."""

    key: str
    title: str
    reference: str
    """The name of the reference of the ratios."""
    rows: list[Row] = field(default_factory=list)

    def text(self) -> str:
        """An aligned table for the terminal."""
        cells = [["", "median", "", "ratio", "min..max", ""], *(row.cells() for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells)]
        left = (True, False, True, False, True, True)
        lines = ["  ".join(cell.ljust(width) if to_left else cell.rjust(width)
                           for cell, width, to_left in zip(row, widths, left)).rstrip() for row in cells]
        return "\n".join([self.title, f"  {self.subtitle()}", *("  " + line for line in lines), ""])

    def subtitle(self) -> str:
        """The number of rounds and the reference."""
        fewest, most = (f(len(row.values) for row in self.rows) for f in (min, max))
        turns = f"{fewest}" if fewest == most else f"{fewest} to {most}"
        return f"(rounds: {turns}; ratio to {self.reference})"

    def markdown(self) -> str:
        """The table as Markdown."""
        lines = [f"### {self.title}", "", self.subtitle(), "",
                 "| | median | | ratio | min..max | |", "| --- | ---: | --- | ---: | --- | --- |"]
        lines += ["| " + " | ".join(row.cells()) + " |" for row in self.rows]
        return "\n".join([*lines, ""])

    def data(self) -> dict:
        """The content for results.json."""
        rows = [row.data() for row in self.rows]
        return {"key": self.key, "title": self.title, "reference": self.reference, "rows": rows}


def number(value: float, decimals: int | None = None) -> str:
    """By default three significant digits, and all digits before the point."""
    if decimals is None:
        decimals = min(max(2 - math.floor(math.log10(abs(value))), 0), 4) if value else 0
    return f"{value:,.{decimals}f}"
