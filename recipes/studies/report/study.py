"""What a study is: rows, each one change away from its twin, the seeds, and the figures published elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tffd_zoo.recipe import Recipe, vary
from tffd_zoo.run_record import weights_file


@dataclass(frozen=True)
class Published:
    """A figure from elsewhere, to stand beside ours."""

    top1: float
    source: str
    """Where it is from, and at which setting."""
    base: float | None = None
    """What the same source gives for the twin."""

    @property
    def gain(self) -> float | None:
        return None if self.base is None else self.top1 - self.base


@dataclass(frozen=True)
class Row:
    """One recipe of a study: what differs from its twin, in words and in fields."""

    name: str
    """Name of the recipe, of its runs and of their records."""
    what: str
    """What sets it apart, in a few words."""
    change: Mapping[str, Any] = field(default_factory=dict)
    """The fields that differ, as `vary` takes them: from the twin's recipe, or from the study's base without a twin."""
    twin: str | None = None
    """Name of the row that it is compared with, run for run: same seed, same images."""
    teacher: str | None = None
    """Name of the row that trains its frozen teacher."""
    published: Published | None = None
    seeds: tuple[int, ...] | None = None
    """Its own, in place of the study's: a frozen teacher is trained once."""


@dataclass(frozen=True)
class Study:
    """Rows times seeds."""

    name: str
    question: str
    base: Recipe
    """What the rows without a twin start from."""
    rows: tuple[Row, ...]
    """Twins and teachers stand before the rows that name them."""
    seeds: tuple[int, ...] = (0,)
    note: str = ""
    """What a reader has to know of the runs, in Markdown."""
    decides: bool = False
    """Whether it is long and broad enough to say what Tf-FD gives: the page over all studies opens with these."""

    def __post_init__(self) -> None:
        known: list[str] = []
        for row in self.rows:
            if row.name in known:
                raise ValueError(f"study {self.name} has two rows named {row.name}; name every variant")
            for role, name in (("twin", row.twin), ("teacher", row.teacher)):
                if name is not None and name not in known:
                    raise ValueError(
                        f"study {self.name}: '{name}', the {role} of '{row.name}', is no row before it; choose one of "
                        f"{', '.join(known) or 'none, for it is the first'}"
                    )
            known.append(row.name)

    def row(self, name: str) -> Row:
        """The row called `name`.

        Raises:
            ValueError: there is none.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise ValueError(
            f"study {self.name} has no recipe '{name}'; choose one of {', '.join(row.name for row in self.rows)}"
        )

    def seeds_of(self, row: Row) -> tuple[int, ...]:
        return row.seeds or self.seeds

    def recipe(self, name: str) -> Recipe:
        """The recipe of a row, with its first seed."""
        row = self.row(name)
        base = self.base if row.twin is None else self.recipe(row.twin)
        recipe = vary(vary(base, name, **row.change), name, run={"seed": self.seeds_of(row)[0], "output": None})
        return recipe if row.teacher is None else taught_by(recipe, self.recipe(row.teacher).folder)


def taught_by(recipe: Recipe, teacher: Path) -> Recipe:
    """`recipe` with the last weights of the run in `teacher` for its frozen teacher's."""
    return vary(recipe, recipe.name, teacher={"weights": weights_file(teacher, "last")})
