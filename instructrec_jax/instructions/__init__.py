"""Instructions: aspects, templates, words and negatives, rendered to ``InstructionExample``. No JAX, no models."""
