"""`python -m align run CONFIG`."""

from align.cli import align

if __name__ == "__main__":
    align()
