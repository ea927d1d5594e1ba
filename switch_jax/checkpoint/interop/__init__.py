"""Import of Hugging Face and T5X checkpoints, and export to Hugging Face."""
