"""Studies and their reports: recipes times seeds, paired differences with intervals, tables, sentences and pictures."""

from .page import write_report
from .records import RunRecord, collect
from .study import Published, Row, Study

__all__ = ["Published", "Row", "RunRecord", "Study", "collect", "write_report"]
