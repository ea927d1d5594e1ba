"""Fine-tuning tasks as sources: records of a task → inputs and targets in T5's text."""
