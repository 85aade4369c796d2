"""`python -m fuse_eval pool CONFIG`, `python -m fuse_eval run CONFIG`, `... report CONFIG`."""

from fuse_eval.cli import evaluate, report

evaluate.add_command(report)

if __name__ == "__main__":
    evaluate()
