"""From the four influence views to a weight for each row, by name.

`paper` is RapidUn's mapping to the letter, `full` the same without the cut to the top rows (see weights.py for why).
A further mapping is one more entry.
"""

from __future__ import annotations

from dataclasses import dataclass

from app.influence.errors import SpecError


@dataclass(frozen=True)
class Mapping:
    """How numbers of the views become weights; the defaults are the paper's.

    Attributes:
        top_k: the highest influences that each query keeps; None keeps all.
        forget, retain: the groups' temperatures.
        minimum, maximum: bounds of a weight before the division by the mean.
        other_scale: how much a row's influence on the other group counts, against that on its own.
        unit: whether views are cosines instead of inner products.
    """

    top_k: int | None = 40
    forget: float = 0.7
    retain: float = 1.2
    minimum: float = 0.2
    maximum: float = 3.0
    other_scale: float = 1.0
    unit: bool = False


MAPPINGS = {"paper": Mapping(), "full": Mapping(top_k=None)}


def mapping(name: str) -> Mapping:
    """The mapping of a name.

    Raises:
        SpecError: there is none.
    """
    if name not in MAPPINGS:
        raise SpecError(f"there is no mapping '{name}'; use {', '.join(MAPPINGS)}", field="mapping")
    return MAPPINGS[name]
