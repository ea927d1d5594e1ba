"""Checkpoints of other programs, in and out.

imported                 a foreign checkpoint in a form of ours, and as arrays on devices
writing                  the same as a WORKDIR
formats                  which program's checkpoint a folder is
"""
