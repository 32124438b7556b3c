"""`python -m lightning_attn` is the same command as `train.py`."""

from lightning_attn.cli import main

if __name__ == "__main__":
    main()
