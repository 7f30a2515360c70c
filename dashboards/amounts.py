"""Activations and similar numbers as text, with enough figures to tell small ones apart."""

import math

COLUMN = "%.4g"
"""format of a table's column of amounts"""
_POWERS_BELOW = 0.01
_MOST_DECIMALS = 7


def amount(value: float, decimals: int = 2, *, signed: bool = False) -> str:
    """A number with `decimals` decimals; small ones with three figures, below 0.01 in e-notation.

    >>> amount(12.345), amount(0.1234, 3), amount(0.0123456), amount(0.25, signed=True)
    ('12.35', '0.123', '0.0123', '+0.25')
    >>> amount(0.00123456), amount(-2.5e-11)
    ('1.23e-3', '-2.50e-11')
    """
    sign = "+" if signed else ""
    if value == 0 or abs(value) >= 10.0 ** (1 - decimals):
        return f"{value:{sign}.{decimals}f}"
    if abs(value) >= _POWERS_BELOW:
        return f"{value:{sign}.3g}"
    mantissa, _, exponent = f"{value:{sign}.2e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def counted(number: int, one: str, several: str = "") -> str:
    """A number of things, in the singular where there is one.

    >>> counted(1, "document"), counted(1234, "document"), counted(2, "entry", "entries")
    ('1 document', '1,234 documents', '2 entries')
    """
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def span(low: float, high: float) -> str:
    """A range, whose ends have as many decimals as tell them apart.

    >>> span(0.5, 1.0), span(0.0004, 0.0008), span(10.0, 10.002)
    ('0.50 to 1.00', '0.00040 to 0.00080', '10.0000 to 10.0020')
    """
    width = abs(high - low)
    if not width or not math.isfinite(width):
        return f"{amount(low)} to {amount(high)}"
    decimals = max(2, 1 - math.floor(math.log10(width)))
    if decimals > _MOST_DECIMALS:
        return f"{amount(low)} to {amount(high)}"
    return f"{low:.{decimals}f} to {high:.{decimals}f}"
