"""Test a method against the laws of docs/contract.md (shapes, causality, memory, ...), one function per law.

A method is a KV-cache compressor. A law is a rule that its cache must obey, e.g. that later tokens do not change an
earlier answer.
"""

from kvfloor.check.law import Broken, Check, Setting
from kvfloor.check.suite import CHECKS, Outcome, check_method, run_checks

__all__ = ["CHECKS", "Broken", "Check", "Outcome", "Setting", "check_method", "run_checks"]
