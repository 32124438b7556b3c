"""Options that a run cannot be made with are refused by name."""

import pytest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.dim", "null"], "model.dim: null is no value for it"),
        (["--model.optimizer", "null"], "model.optimizer: null is no value for it"),
        (["--data.cleaning", "null"], "data.cleaning: null is no value for it"),
        (["--trainer.precision", "bf16-true"], "trainer.precision: 'bf16-true' is not supported by TranslationTask"),
        (["--trainer.barebones", "true"], "trainer.barebones: true leaves out checkpoints"),
        (["--trainer.limit_train_batches", "0"], "trainer.limit_train_batches: 0 trains nothing"),
        (["--trainer.accumulate_grad_batches", "0"], "trainer.accumulate_grad_batches: 0 must be at least 1"),
        (["--trainer.strategy", "foo"], "strategy foo): You selected an invalid strategy name"),
        (["--trainer.num_nodes", "0"], "`num_nodes` must be a positive integer"),
        (["--run.name", "x" * 300], "run.name has 300 bytes, and 200 are possible"),
        (["--trainer.devices", "7000"], "trainer.devices: 7000 would start as many processes"),
        (["--seed_everything", "-1"], "seed_everything: -1 must be from 0 to 4294967295"),
        (["--run.save_top_k", "0"], "run.save_top_k must be at least 1"),
        (["--model.scoring.tokenize", "foo"], "scoring.tokenize must be one of none, zh, 13a"),
        (["--data.vocabulary", "nothing.model"], "vocabulary: nothing.model is not there"),
    ],
)
def test_options_are_refused_by_name(run, tiny_config, options, message):
    assert message in run("fit", "-c", tiny_config, *options, status=2)


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_precisions_that_are_named_work(run, tiny_config, precision):
    run("fit", "-c", tiny_config, "--trainer.precision", precision)


def test_a_file_where_a_folder_belongs(run, tiny_config, corpus):
    file = corpus / "train.en"
    assert "run.root: " in run("fit", "-c", tiny_config, "--run.root", file, status=2)
    assert "the token cache in " in run("fit", "-c", tiny_config, "--data.cache_dir", file, status=2)


def test_a_score_that_nobody_logs(run, tiny_config):
    stopping = ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "val_loss"]
    assert "Early stopping conditioned on metric `val_loss` which is not available" in run(
        "fit", "-c", tiny_config, *stopping, status=2
    )
