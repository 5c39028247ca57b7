"""Quantities as a person reads them: 12.3 ms, 45 MB, 1.2 G, 61.3 %.

Terminal, page and recommendation all write numbers with these functions, so that they show the same text. Bytes are
decimal (1 MB = 1,000,000 bytes).
"""

_SECONDS = ((1e-6, "µs"), (1e-3, "ms"), (1.0, "s"))
_BYTES = ("B", "kB", "MB", "GB", "TB", "PB")
_MAGNITUDES = ("", "k", "M", "G", "T", "P", "E")


def _three_digits(value: float) -> str:
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def _scaled(value: float, units: tuple[str, ...]) -> tuple[str, str]:
    index = 0
    while index + 1 < len(units) and value >= 999.5:
        value /= 1000
        index += 1
    return (f"{value:g}" if index == 0 and value == int(value) else _three_digits(value)), units[index]


def seconds(value: float) -> str:
    """Write a duration given in seconds: "850 µs", "12.3 ms", "4.20 s", "3 min 20 s", "2 h 05 min", "21 days 19 h"."""
    if value == 0:
        return "0 s"
    if value >= 2 * 86_400:
        hours = round(value / 3600)
        return f"{hours // 24:,} days {hours % 24} h"
    if value >= 3599.5:
        minutes = round(value / 60)
        return f"{minutes // 60} h {minutes % 60:02d} min"
    if value >= 119.5:
        whole = round(value)
        return f"{whole // 60} min {whole % 60:02d} s"
    for unit, name in _SECONDS:
        if value < 999.5 * unit:
            return f"{_three_digits(value / unit)} {name}"
    return f"{_three_digits(value)} s"


def size(value: float) -> str:
    """Write a number of bytes: "512 B", "45.0 MB", "1.20 GB"."""
    digits, unit = _scaled(value, _BYTES)
    return f"{digits} {unit}"


def magnitude(value: float) -> str:
    """Write a large count with a magnitude letter: "950", "12.3k", "1.20M", "3.40G"."""
    digits, letter = _scaled(value, _MAGNITUDES)
    return f"{digits}{letter}"


def count(value: float) -> str:
    """Write a whole number with thousands separators."""
    return f"{round(value):,}"


def percent(value: float, digits: int = 1) -> str:
    """Write a fraction as per cent: 0.613 -> "61.3 %"."""
    return f"{100 * value:.{digits}f} %"


def times(value: float) -> str:
    """Write a ratio: "1.90×"."""
    return f"{_three_digits(value)}×"
