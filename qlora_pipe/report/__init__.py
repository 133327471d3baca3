"""What a run decided, what it cost and what it lost: for the terminal, as one HTML page and as Markdown."""

from qlora_pipe.report.page import write_report
from qlora_pipe.report.table import show_results

__all__ = ["show_results", "write_report"]
