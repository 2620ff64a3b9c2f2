"""Checkpoints of a training run: exactly what was saved, or nothing.

`checkpointer` saves, verifies and restores steps; `snapshot` copies arrays to host memory and back; `digests` is the
manifest; `step_files` has the names of steps in their directory.

May import: `train.distributed.collectives`, the ground.
"""
