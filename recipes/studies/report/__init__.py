"""Studies and their reports: recipes times seeds, paired differences with intervals, tables, sentences and pictures."""

from .page import write_report
from .records import changes, collect, record_folder
from .study import Published, Row, Study

__all__ = ["Published", "Row", "Study", "changes", "collect", "record_folder", "write_report"]
