"""Checkpoints of other programs, in and out.

formats                 which program's checkpoint a folder is
huggingface  hf_config  a folder of theirs, and its config.json
names                   their names of our parameters, both ways
tensors  torch_files    the tensors in their files
imported                any foreign checkpoint: a config, and our parameters slice by slice
writing                 that as a WORKDIR
hf_export               a checkpoint of ours as theirs
"""
