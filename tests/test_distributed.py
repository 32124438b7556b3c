"""Several ranks over 127.0.0.1 give what one process gives.

How ranks are launched is tested with two nodes of torchrun below, and in test_failures.py.
"""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cityscapes_data import truth_from_predictions
from coco_data import truth_from_detections

# Starting a rank is seconds of imports, and many times that on a busy machine.
pytestmark = [pytest.mark.ddp, pytest.mark.timeout(1800)]
ONE_RANK = ["--trainer.devices", 1, "--trainer.strategy", "auto"]  # also for what two ranks have trained


@pytest.fixture(autouse=True)
def one_thread():
    """In this process as in those that are started, so that sums are rounded alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def losses(path: Path) -> list[float]:
    with (path / "metrics.csv").open(encoding="utf-8") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


def test_two_ranks_train_and_score_like_one(run, run_ranks, tiny_config, in_folder):
    """The same global batch: two batches accumulated on one rank, or one on each of two."""
    runs = in_folder / "checkpoints" / "translation"
    steps = ["-c", tiny_config, "--trainer.max_steps", 5, "--trainer.val_check_interval", 10]
    run("fit", *steps, "--run.name", "one", "--trainer.accumulate_grad_batches", 2)
    run_ranks("fit", *steps, "--run.name", "two")
    one, two = losses(runs / "one"), losses(runs / "two")
    assert len(one) == 5
    assert two == pytest.approx(one, abs=1e-4)
    assert one[-1] != one[0]
    weights = [torch.load(runs / name / "last.ckpt", weights_only=True)["state_dict"] for name in ("one", "two")]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=1e-4, rtol=1e-3)
    assert sorted(path.name for path in runs.iterdir()) == ["one", "two"], "one directory a run, not one a rank"

    # 31 test sentences: the ranks hold different numbers of them.
    stored = ["-c", runs / "one" / "config_fit.yaml", "--ckpt_path", runs / "one" / "last.ckpt"]
    few = ["--data.eval_max_tokens", 100]
    run("test", *stored, *few)
    run_ranks("test", *stored, *few)
    run_ranks("predict", *stored, *few)
    first, second = (
        json.loads((runs / "one" / name).read_text()) for name in ("test_metrics.json", "test_metrics-2.json")
    )
    assert first == second
    assert (runs / "one" / "attention-2.png").is_file(), "whichever rank had the first sentence"
    predictions = runs / "one" / "predictions"
    texts = [(predictions / name).read_text() for name in ("test_hypotheses.txt", "hypotheses.txt")]
    assert texts[0] == texts[1]
    assert len(texts[0].splitlines()) == 31


def test_two_torchrun_nodes_are_ddp_with_two_devices(run_process, tiny_config, in_folder, free_port):
    """What docs/distributed.md tells users with several hosts to type, with both hosts at 127.0.0.1."""
    arguments = ["fit", "-c", tiny_config, "--trainer.max_steps", 3, "--trainer.strategy", "ddp"]
    run_process(*arguments, "--trainer.devices", 2, "--run.name", "devices")
    script = Path(__file__).parents[1] / "train.py"
    nodes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
                *("--node-rank", str(rank), "--master-addr", "127.0.0.1", "--master-port", str(free_port)),
                *(str(script), *map(str, arguments), "--trainer.devices", "1", "--trainer.num_nodes", "2"),
                *("--run.name", "nodes"),
            ],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [node.communicate(timeout=1500)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(printed)
    runs = in_folder / "checkpoints" / "translation"
    assert sorted(path.name for path in runs.iterdir()) == ["devices", "nodes"]
    assert losses(runs / "nodes") == losses(runs / "devices")
    weights = [torch.load(runs / name / "last.ckpt", weights_only=True)["state_dict"] for name in ("devices", "nodes")]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_mid_epoch_resume_on_two_ranks(run_ranks, tiny_config, in_folder):
    runs = in_folder / "checkpoints" / "translation"
    common = ["fit", "-c", tiny_config, "--trainer.val_check_interval", 100]
    common += ["--run.checkpoint_every_n_steps", 1]
    run_ranks(*common, "--trainer.max_steps", 6, "--run.name", "straight")
    run_ranks(*common, "--trainer.max_steps", 3, "--run.name", "first")
    checkpoint = runs / "first" / "last.ckpt"
    run_ranks(*common, "--trainer.max_steps", 6, "--run.name", "second", "--ckpt_path", checkpoint)
    straight, second = (
        torch.load(runs / name / "last.ckpt", weights_only=True)["state_dict"] for name in ("straight", "second")
    )
    for name, value in straight.items():
        assert torch.equal(value, second[name]), name


def test_detection_on_two_ranks(run, run_ranks, detection_config, coco, in_folder):
    """One image of five on a rank, or none: the same scores and files, and nobody waits for ever."""
    runs = in_folder / "checkpoints" / "detection"
    longer = ["--trainer.max_steps", 30, "--trainer.val_check_interval", 15]
    run_ranks("fit", "-c", detection_config, "--run.name", "two", *longer)
    stored = ["-c", runs / "two" / "config_fit.yaml", "--ckpt_path", runs / "two" / "last.ckpt"]
    single = ["--data.eval_batch_size", 1]  # the padding of an image does not depend on its neighbours
    run("predict", *stored, *single, *ONE_RANK)
    detections = json.loads((runs / "two" / "predictions" / "detections.json").read_text())
    stored += ["--data.root", truth_from_detections(coco, "test2017", detections, in_folder / "truth")]
    run("test", *stored, *single, *ONE_RANK)
    run_ranks("test", *stored, *single)
    whole = ["--data.eval_batch_size", 5]  # one batch: the other rank has none
    run("test", *stored, *whole, *ONE_RANK)
    run_ranks("test", *stored, *whole)
    run_ranks("predict", *stored, *single)
    found = runs / "two" / "predictions"
    one, two, together, uneven = (
        json.loads((runs / "two" / f"test_metrics{number}.json").read_text()) for number in ("", "-2", "-3", "-4")
    )
    assert one["test/ar100"] > 0, "zeros would say nothing"
    assert two == one
    assert uneven["test/num_images"] == 5
    assert uneven == together
    names = ("detections.json", "test_detections.json", "test_detections-2.json", "detections-2.json")
    records = [json.loads((found / name).read_text()) for name in names]
    assert records[0] == records[1] == records[2] == records[3]


def test_segmentation_on_two_ranks(run, run_ranks, segmentation_config, cityscapes, in_folder):
    """The same confusion matrix and the same files, also where a rank has no image."""
    run_directory = in_folder / "checkpoints" / "segmentation" / "two"
    longer = ["--trainer.max_steps", 30, "--trainer.val_check_interval", 15]
    run_ranks("fit", "-c", segmentation_config, "--run.name", "two", *longer)
    stored = ["-c", run_directory / "config_fit.yaml", "--ckpt_path", run_directory / "last.ckpt"]
    run("predict", *stored, *ONE_RANK)
    labels = run_directory / "predictions" / "labels"
    stored += ["--data.root", truth_from_predictions(cityscapes, labels, in_folder / "truth")]
    run("test", *stored, *ONE_RANK)
    run_ranks("test", *stored)
    run_ranks("test", *stored, "--data.eval_batch_size", 5)  # one batch: the other rank has none
    one, two, uneven = (
        json.loads((run_directory / name).read_text())
        for name in ("test_metrics.json", "test_metrics-2.json", "test_metrics-3.json")
    )
    assert len(one["test/confusion"]) == 19
    assert one["test/miou"] > 0, "zeros would say nothing"
    assert one["test/num_images"] == 5
    assert two == one
    assert sum(map(sum, uneven["test/confusion"])) == sum(map(sum, one["test/confusion"]))
    assert uneven["test/miou"] == pytest.approx(one["test/miou"], abs=0.02), "batches of five may round otherwise"

    run_ranks("predict", *stored)
    predictions = run_directory / "predictions"
    written = [
        {path.name: path.read_bytes() for path in (predictions / name).iterdir()} for name in ("labels", "labels-2")
    ]
    assert len(written[0]) == 5
    assert written[0] == written[1]


# Of a joint training: nothing is drawn, and each task has an even number of batches on one rank.
OF_TASKS = "--model.tasks.{}.init_args.{}"
NOT_RANDOM = [
    *(OF_TASKS.format("detection", "detector.rpn_batch_size"), 100_000),
    *(OF_TASKS.format("detection", "detector.roi_batch_size"), 100_000),
    *(OF_TASKS.format("segmentation", "segmenter.dropout"), 0.0),
    *("--data.members.detection.init_args.batch_size", 5, "--trainer.num_sanity_val_steps", 0),
]


def test_a_joint_training_on_two_ranks(run, run_ranks, multitask_config, in_folder):
    """Two batches of each task accumulated on one rank, or one on each of two; the shorter set begins anew."""
    runs = in_folder / "checkpoints" / "multitask"
    steps = ["-c", multitask_config, *NOT_RANDOM, "--trainer.max_steps", 5, "--trainer.val_check_interval", 10]
    run("fit", *steps, "--run.name", "one", "--trainer.accumulate_grad_batches", 2)
    run_ranks("fit", *steps, "--run.name", "two")
    weights = [torch.load(runs / name / "last.ckpt", weights_only=True)["state_dict"] for name in ("one", "two")]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=1e-4, rtol=1e-3)
    stored = ["-c", runs / "one" / "config_fit.yaml", "--ckpt_path", runs / "one" / "last.ckpt"]
    single = ["--data.members.detection.init_args.eval_batch_size", 1]
    run("test", *stored, *single)
    run_ranks("test", *stored, *single)
    one, two = (json.loads((runs / "one" / f"test_metrics{number}.json").read_text()) for number in ("", "-2"))
    assert two == one
    assert one["test/segmentation/num_images"] == one["test/detection/num_images"] == 5


def test_alternating_tasks_on_two_ranks(run_ranks, multitask_config, in_folder):
    """Heads without a batch do not make ranks wait, and a run that is resumed in the middle of a cycle is the same."""
    runs = in_folder / "checkpoints" / "multitask"
    common = ["fit", "-c", multitask_config, "--data.order", "alternating", "--trainer.limit_val_batches", 0]
    common += ["--run.checkpoint_every_n_steps", 1, "--trainer.num_sanity_val_steps", 0]
    common += ["--trainer.accumulate_grad_batches", 2]
    printed = run_ranks(*common, "--trainer.max_steps", 6, "--run.name", "straight")
    assert "find_unused_parameters" in printed
    run_ranks(*common, "--trainer.max_steps", 2, "--run.name", "first")
    checkpoint = runs / "first" / "last.ckpt"
    (place,) = torch.load(checkpoint, weights_only=True)["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert place["consumed"] == 4
    assert {one["consumed"] for one in place["members"].values()} != {0}
    run_ranks(*common, "--trainer.max_steps", 6, "--run.name", "second", "--ckpt_path", checkpoint)
    straight, second = (torch.load(runs / name / "last.ckpt", weights_only=True) for name in ("straight", "second"))
    for name, value in straight["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), name
    assert straight["loops"]["fit_loop"]["state_dict"] == second["loops"]["fit_loop"]["state_dict"]
