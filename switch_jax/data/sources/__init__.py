"""Sources of text and their files: file names → records → texts → splits and shards."""
