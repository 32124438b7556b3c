"""Trains, validates, tests and runs a task: `python train.py fit -c configs/miniature/translation.yaml`."""

from lightning_attn.cli import main

if __name__ == "__main__":
    main()
