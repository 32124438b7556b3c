"""Trains, validates, tests and runs a task: `python train.py fit -c configs/miniature/translation.yaml`."""

if __name__ == "__main__":
    # Imported here, so that worker processes, which import this file again, do not import Lightning for nothing.
    from lightning_attn.cli import main

    main()
