"""Studies and their pages: recipes times seeds, paired differences with intervals, tables, sentences and a picture."""

from .index import index_text, write_index
from .page import report_text, write_report
from .records import changes, collect, read_record, record_file
from .study import Published, Row, Study

__all__ = [
    "Published",
    "Row",
    "Study",
    "changes",
    "collect",
    "index_text",
    "read_record",
    "record_file",
    "report_text",
    "write_index",
    "write_report",
]
