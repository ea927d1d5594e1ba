"""Token store: a mixture tokenised once into memory-mapped files, and the rows made from it."""
