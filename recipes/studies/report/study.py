"""What a study is: recipes, the twin that each is compared with, the seeds, and the figures published elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

from tffd_zoo.recipe import Recipe


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
    """One recipe of a study."""

    recipe: Recipe
    what: str
    """What sets it apart, in a few words."""
    twin: str | None = None
    """Name of the recipe that it is compared with, run for run: same seed, same images."""
    published: Published | None = None
    seeds: tuple[int, ...] | None = None
    """Its own, in place of the study's: a frozen teacher is trained once."""

    @property
    def name(self) -> str:
        return self.recipe.name


@dataclass(frozen=True)
class Study:
    """Recipes times seeds."""

    name: str
    question: str
    rows: tuple[Row, ...]
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"study {self.name} has two recipes named {', '.join(twice)}; name every variant")
        for row in self.rows:
            if row.twin is not None and (row.twin == row.name or row.twin not in names):
                raise ValueError(
                    f"study {self.name}: '{row.twin}', the twin of '{row.name}', is no other recipe of the study; "
                    f"choose one of {', '.join(name for name in names if name != row.name)}"
                )

    def row(self, name: str) -> Row:
        """The row of the recipe `name`.

        Raises:
            ValueError: there is none.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise ValueError(
            f"study {self.name} has no recipe '{name}'; choose one of {', '.join(row.name for row in self.rows)}"
        )
