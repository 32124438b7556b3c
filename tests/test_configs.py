"""Every shipped YAML is parsed and run for two steps through the real command."""

from pathlib import Path

import pytest
import yaml

from datamodules.miniature_translation import write_miniature_corpus

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = [
    *("--model.dim", 16, "--model.hidden_dim", 32, "--model.encoder_layers", 1, "--model.decoder_layers", 1),
    *("--model.self_attention.num_heads", 2, "--model.cross_attention.num_heads", 2),
    *("--data.vocabulary_size", 300, "--data.max_tokens", 400, "--data.preparation_processes", 1),
    *("--trainer.accelerator", "cpu", "--trainer.devices", 1, "--trainer.strategy", "auto"),
    *("--trainer.max_steps", 2, "--trainer.limit_val_batches", 1, "--trainer.val_check_interval", 2),
    *("--trainer.num_sanity_val_steps", 0, "--trainer.logger", "false"),
]


def paths(folder: str) -> list[Path]:
    return sorted((CONFIGS / folder).glob("*.yaml"))


@pytest.mark.parametrize("path", [*paths("translation"), *paths("miniature")], ids=lambda path: path.stem)
def test_complete_configurations(run, corpus, path):
    download = ["--data.download", "false"] if "wmt14" in path.stem else []
    run("fit", "-c", path, *SMALL, "--data.root", corpus if "miniature" not in str(path) else "small", *download)
    assert list(Path("checkpoints/translation").glob("*/last.ckpt"))


@pytest.fixture(autouse=True)
def small_miniature(monkeypatch):
    """The miniature DataModule writes a small corpus, not 21,000 pairs."""

    def write(root):
        write_miniature_corpus(root, {"train": 400, "valid": 20, "test": 31})

    monkeypatch.setattr("datamodules.miniature_translation.write_miniature_corpus", write)


@pytest.mark.parametrize("path", paths("attention"), ids=lambda path: path.stem)
def test_attention_overlays(run, tiny_config, path):
    run("fit", "-c", tiny_config, "-c", path, "--trainer.max_steps", 2)
    stored = yaml.safe_load(Path("checkpoints/translation/tiny/config_fit.yaml").read_text())
    slot, value = path.stem.split("_")
    spec = stored["model"]["init_args"][f"{slot}_attention"]
    assert (spec["mechanism"] if value == "none" else spec["terms"]) == value


@pytest.mark.parametrize("path", paths("trainer"), ids=lambda path: path.stem)
def test_trainer_overlays(run, tiny_config, path):
    """On one CPU process: what differs from host to host is taken back."""
    one = ["--trainer.accelerator", "cpu", "--trainer.devices", 1, "--trainer.num_nodes", 1]
    run("fit", "-c", tiny_config, "-c", path, *one, "--trainer.strategy", "auto", "--trainer.max_steps", 2)
    assert Path("checkpoints/translation/tiny/last.ckpt").is_file()
