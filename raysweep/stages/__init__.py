"""The kinds of stage: each file holds a spec and its `run`."""
