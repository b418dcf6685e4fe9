"""What a person reads in the terminal: tables and histograms."""

import math
import unicodedata

import numpy as np


def table(header, rows):
    """Lines of an aligned table: columns of numbers to the right, of text to the left."""
    lines = [[str(cell) for cell in row] for row in [header, *rows]]
    columns = []
    for cells in zip(*lines):
        width = max(_width(cell) for cell in cells)
        padding = [" " * (width - _width(cell)) for cell in cells]
        if all(_is_number(cell) for cell in cells[1:]):
            padded = [space + cell for space, cell in zip(padding, cells)]
        else:
            padded = [cell + space for space, cell in zip(padding, cells)]
        columns.append([padded[0], "-" * width, *padded[1:]])
    return "\n".join("  ".join(row).rstrip() for row in zip(*columns))


def histogram(values, low, high, bins=12, width=40):
    """Lines of a bar chart of `values` between low and high."""
    counts, edges = np.histogram(np.clip(values, low, high), bins, (low, high))
    lines = []
    for count, start, end in zip(counts, edges, edges[1:]):
        bar = "#" * math.ceil(width * count / counts.max())
        lines.append(f"  {start:5.2f} to {end:5.2f} {count:7,} {bar}")
    return "\n".join(lines)


def _is_number(text):
    return not text.strip("+-0123456789.,%±– ") or text in ("nan", "inf")


def _width(text):
    return sum(not unicodedata.combining(character) for character in text)
