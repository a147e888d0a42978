"""Test a method against the laws of the contract, each a plain function."""

from kvfloor.check.law import Broken, Check, Setting
from kvfloor.check.suite import CHECKS, Outcome, check_method, run_checks

__all__ = ["CHECKS", "Broken", "Check", "Outcome", "Setting", "check_method", "run_checks"]
