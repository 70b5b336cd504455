"""What went wrong with a study: a kind, which control flow looks at, and a sentence for people.

May use: limits.
"""

from dataclasses import asdict, dataclass
from enum import StrEnum

from .limits import TookTooLong


class Kind(StrEnum):
    """Of a Problem."""

    IMAGES = "images"  # something in the files, or none that can be read
    LEVELS = "levels"  # levels that could not be placed as usual
    MEMBER = "member"  # a member that has nothing to say of all or some rows
    MEMORY = "memory"  # the device's memory was full: by chance, not because of the study
    TIME = "time"  # given up for the time it took: another machine may be faster
    DEVICE = "device"  # the device fails, whatever it is given
    PASSED_OVER = "passed over"  # not looked at, or given up


@dataclass(frozen=True)
class Problem:
    """What went wrong. text: a sentence; member: the name of the member that it happened to, "" for none."""

    kind: Kind
    text: str
    member: str = ""

    def __str__(self) -> str:
        return self.text

    @classmethod
    def of(cls, error: BaseException, before: str = "", member: str = "", kind: Kind = Kind.MEMBER) -> "Problem":
        """The Problem that an exception is; before: what the sentence begins with."""
        return cls(kind_of_error(error, kind), f"{before}{type(error).__name__}: {error}", member)

    def to_dict(self) -> dict[str, str]:
        return asdict(self) | {"kind": str(self.kind)}

    @classmethod
    def from_dict(cls, stated: object) -> "Problem":
        """What to_dict made. Raises ValueError for anything else."""
        if not (isinstance(stated, dict) and set(stated) == {"kind", "text", "member"}):
            raise ValueError("a problem is no kind, text and member")
        if not all(isinstance(value, str) for value in stated.values()):
            raise ValueError("a problem's words are no texts")
        return cls(Kind(stated["kind"]), stated["text"], stated["member"])


def kind_of_error(error: BaseException, usual: Kind) -> Kind:
    """TIME or MEMORY for an exception that says so, `usual` for others."""
    if isinstance(error, TookTooLong):
        return Kind.TIME
    # torch's; naming the class would import torch
    return Kind.MEMORY if any(base.__name__ == "OutOfMemoryError" for base in type(error).__mro__) else usual
