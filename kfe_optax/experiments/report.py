"""The table that the commands print."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table


def plain_table(
    title: str, caption: str | None, header: Sequence[str], rows: Sequence[Sequence[str]]
) -> Table:
    """A table with a line under its header; its first column is of words, the others are of numbers.

    Example::

        Console().print(plain_table("errors", None, ("method", "error"), [("kfac", "0.4")]))
    """
    # This padding is what fits the widest table into 80 columns.
    table = Table(
        title=title, caption=caption, box=box.SIMPLE_HEAD, caption_justify="left", padding=(0, 1, 0, 0)
    )
    for place, name in enumerate(header):
        table.add_column(name, justify="right" if place else "left", no_wrap=not place)
    for row in rows:
        table.add_row(*row)
    return table
