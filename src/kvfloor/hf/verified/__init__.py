"""Draft tokens by attention over a bounded cache, and verify them by attention over the exact one."""
