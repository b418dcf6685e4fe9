"""What a person reads in the terminal: tables and histograms."""

import unicodedata


def table(header, rows):
    """Lines of an aligned table; numbers to the right, text to the left."""
    cells = [[str(c) for c in row] for row in [header, *rows]]
    widths = [max(_width(row[i]) for row in cells) for i in range(len(header))]
    numeric = [all(_is_number(row[i]) for row in cells[1:]) for i in range(len(header))]
    lines = ["  ".join(_pad(c, w, right) for c, w, right in zip(row, widths,
                                                                numeric)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def histogram(values, low, high, bins=12, width=40):
    """Lines of a bar chart of `values` between low and high."""
    step = (high - low) / bins or 1.0
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, max(0, int((value - low) / step)))] += 1
    most = max(counts) or 1
    return "\n".join(f"  {low + i * step:5.2f} to {low + (i + 1) * step:5.2f} {n:7,} "
                     f"{'#' * -(-n * width // most)}"
                     for i, n in enumerate(counts))


def _is_number(text):
    return not text.strip("+-0123456789.,%±– ") or text in ("nan", "inf")


def _pad(text, width, right):
    fill = " " * (width - _width(text))
    return fill + text if right else text + fill


def _width(text):
    return sum(not unicodedata.combining(c) for c in text)
