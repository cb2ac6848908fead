"""One training run: state, step, loop, hooks, checkpoints, and the record it leaves."""
