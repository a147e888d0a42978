"""Serve bounded caches inside stock vLLM, as a plug-in that is found by its entry point and changes no file of vLLM."""
