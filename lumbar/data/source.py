"""Where a level or a vertebral body comes from, and what is to be said against it.

May use: nothing of the kit.
"""

from __future__ import annotations

import enum
from typing import Any


class Source(enum.Flag):
    """Where a level comes from: a place of origin or several, with or without the two doubts.

    In tables it is a text, the names joined by "+" in the order below.

    Examples
    --------
    >>> str(Source.T2 | Source.T1 | Source.UNCERTAIN)
    't2+t1+uncertain'
    >>> Source.parse("t2+extrapolated").seen
    False
    """

    TRUTH = enum.auto()  # known, of phantoms
    OFFICIAL = enum.auto()  # the research-only SpineNet package
    T2 = enum.auto()  # seen in the sagittal T2/STIR series
    T1 = enum.auto()  # seen in the sagittal T1 series
    POINTS = enum.auto()  # placed by a reader's label points
    AXIAL = enum.auto()  # by where the axial slices lie
    PRIOR = enum.auto()  # by the mean layout
    EXTRAPOLATED = enum.auto()  # a doubt: placed by its neighbours
    UNCERTAIN = enum.auto()  # a doubt: its name may be another

    def __str__(self) -> str:
        return "+".join(str(part.name).lower() for part in self)

    @classmethod
    def parse(cls, text: Any) -> Source:
        """The Source that a table's text names; an empty cell names none.

        Raises
        ------
        ValueError
            A word that is none of them.
        """
        source = cls(0)
        if not isinstance(text, str):
            if text is None or text != text:  # as pandas reads an empty cell
                return source
            raise ValueError(f"source is {text!r}, not a text")
        for word in text.split("+") if text else ():
            part = cls.__members__.get(word.upper())
            if part is None or word != word.lower():
                known = ", ".join(name.lower() for name in cls.__members__)
                raise ValueError(f"source is {text!r}: {word!r} is none of {known}")
            source |= part
        return source

    @property
    def seen(self) -> bool:
        """Does it stand on what an image shows, and not on its neighbours or on the mean layout?"""
        return not self & (Source.EXTRAPOLATED | Source.PRIOR | Source.AXIAL)

    @property
    def origin(self) -> Source:
        """Without the doubts."""
        return self & ~(Source.EXTRAPOLATED | Source.UNCERTAIN)

    @property
    def sure(self) -> bool:
        """Seen, or known, and by a name that is not in doubt."""
        return self.seen and bool(self) and not self & Source.UNCERTAIN
