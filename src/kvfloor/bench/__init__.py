"""Time kvfloor beside torch, transformers and other libraries in one run, and judge the times by stated targets.

`kvfloor bench` runs it. Versions of the same work take turns in one process, so that the machine's drift affects all of
them. No figure is given unless the tests of the timed code pass.
"""
