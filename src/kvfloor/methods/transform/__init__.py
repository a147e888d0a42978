"""Code vectors by a linear transform, equal steps and an entropy coder: transform coding (KVTC, arXiv 2511.01815)."""
