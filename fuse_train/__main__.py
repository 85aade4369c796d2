"""`python -m fuse_train run CONFIG`."""

from fuse_train.cli import train

train(prog_name="python -m fuse_train")
