"""The conformance suite: the laws of the contract as plain functions, and how to try a method against them."""

from kvfloor.check.law import Broken, Check, Setting
from kvfloor.check.suite import CHECKS, Outcome, check_method, run_checks

__all__ = ["CHECKS", "Broken", "Check", "Outcome", "Setting", "check_method", "run_checks"]
