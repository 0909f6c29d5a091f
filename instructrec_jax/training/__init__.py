"""The mesh, the step, the loop, the checkpoints."""
