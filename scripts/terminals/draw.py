"""Draws an animated SVG of terminals from their contents over time."""

import re
from xml.sax.saxutils import escape

COLUMNS, COLUMNS_OF_TITLE = 84, 10
FONT_SIZE, ROW_HEIGHT, COLUMN_WIDTH = 13, 16, 7.83
PADDING, GAP = 9, 6
WIDTH = round((COLUMNS + COLUMNS_OF_TITLE) * COLUMN_WIDTH + 2 * PADDING)

LONGEST_PAUSE, LAST_PAUSE = 0.7, 5.0  # seconds

STYLE = f"""
text {{ fill: #e6edf3; font: {FONT_SIZE}px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace }}
rect {{ fill: #161b22; stroke: #444c56 }}
g {{ visibility: hidden }}
g.last {{ visibility: visible }}
.title {{ fill: #8b949e; text-anchor: end }}
.c31 {{ fill: #ff7b72 }} .c32 {{ fill: #7ee787 }} .c33 {{ fill: #e3b341 }} .c36 {{ fill: #76e3ea }}
"""


def svg(terminals, frames):
    """Draws `terminals`, pairs of a title and a number of rows, one below the other. `frames` are pairs of a time in
    seconds and the lines of each terminal. Pauses are shortened. Without motion (in print, or by a setting of the user),
    only the last frame is visible."""
    frames = shorten(frames)
    duration = frames[-1][0] + LAST_PAUSE
    texts, keyframes, body, top = {}, [], [], 0
    for index, (title, rows) in enumerate(terminals):
        height = rows * ROW_HEIGHT + 2 * PADDING
        baseline = top + PADDING + FONT_SIZE - 1
        body.append(f'<rect x=".5" y="{top + 0.5}" width="{WIDTH - 1}" height="{height - 1}" rx="6"/>')
        body.append(f'<text class="title" x="{WIDTH - PADDING}" y="{baseline}">{escape(title)}</text>')
        states = without_repetitions((time, screens[index]) for time, screens in frames)
        ends = [time for time, _ in states[1:]] + [None]
        for number, ((start, screen), end) in enumerate(zip(states, ends)):
            name = f"t{index}f{number}"
            hidden = f"{end / duration:.2%}{{visibility:hidden}}" if end else ""
            keyframes.append(
                f"@keyframes {name}{{0%{{visibility:hidden}}{start / duration:.2%}{{visibility:visible}}{hidden}}}"
                f".{name}{{animation-name:{name}}}"
            )
            body.append(f'<g class="{name}{"" if end else " last"}">')
            for row, line in enumerate(screen):
                if line.strip():
                    text = texts.setdefault(line, f"l{len(texts)}")
                    body.append(f'<use href="#{text}" y="{baseline + row * ROW_HEIGHT}"/>')
            body.append("</g>")
        top += height + GAP
    definitions = [f'<text id="{name}" x="{PADDING}">{spans(line)}</text>' for line, name in texts.items()]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top - GAP}">',
        f"<style>{STYLE}@media (prefers-reduced-motion: no-preference) {{",
        f"g {{ animation: {duration:.2f}s step-end infinite }}",
        *keyframes,
        "}</style>",
        "<defs>",
        *definitions,
        "</defs>",
        *body,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def shorten(frames):
    """Shifts the times to start at 0, and drops frames without a change, so that a pause ends with the next change."""
    shortened, now, before = [], 0.0, None
    for time, screens in without_repetitions(frames):
        now += min(time - before, LONGEST_PAUSE) if before is not None else 0
        shortened.append((now, screens))
        before = time
    return shortened


def without_repetitions(states):
    """Keeps the first of successive equal states."""
    kept = []
    for time, state in states:
        if not kept or kept[-1][1] != state:
            kept.append((time, state))
    return kept


def spans(line):
    """The line, with a tspan for each run of characters in one colour. Some viewers drop ordinary spaces."""
    first, *rest = re.split(r"\x1b\[(\d*)m", line.rstrip().replace(" ", "\u00a0"))
    drawn = escape(first)
    for code, text in zip(rest[::2], rest[1::2]):
        is_plain = code in ("", "0", "39") or not text
        drawn += escape(text) if is_plain else f'<tspan class="c{code}">{escape(text)}</tspan>'
    return drawn
