"""The kinds of stage: each file holds a spec, its metrics and cost, and its `run`; see `base.py`."""
