"""Render the results of an audit as one self-contained HTML page and as tables for the terminal.

An audit measures KV-cache compressors on one model: their quality, bytes and speed.
"""

from kvfloor.audit.meta import Meta
from kvfloor.report.html import render
from kvfloor.report.terminal import print_report

__all__ = ["Meta", "print_report", "render"]
