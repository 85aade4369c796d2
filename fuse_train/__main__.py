"""`python -m fuse_train run CONFIG`."""

from fuse_train.cli import train

if __name__ == "__main__":
    train(prog_name="python -m fuse_train")
