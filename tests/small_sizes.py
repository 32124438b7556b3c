"""Options that make every configuration train in seconds, and small miniature sets."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datamodules.miniature.detection import write_miniature_detection
from datamodules.miniature.segmentation import write_miniature_segmentation
from datamodules.miniature.street_detection import write_miniature_street_detection
from datamodules.miniature.translation import write_miniature_corpus

ONE_PROCESS = [
    *("--trainer.accelerator", "cpu", "--trainer.devices", 1, "--trainer.num_nodes", 1, "--trainer.strategy", "auto")
]
TWO_STEPS = [
    *("--trainer.max_steps", 2, "--trainer.limit_val_batches", 1, "--trainer.val_check_interval", 2),
    *("--trainer.num_sanity_val_steps", 0),
]
QUICK = [*TWO_STEPS, "--trainer.logger", "false"]
SMALL_TRANSLATION = [
    *("--model.dim", 16, "--model.hidden_dim", 32, "--model.encoder_layers", 1, "--model.decoder_layers", 1),
    *("--model.self_attention.num_heads", 2, "--model.cross_attention.num_heads", 2),
    *("--data.vocabulary_size", 300, "--data.max_tokens", 400, "--data.preparation_processes", 1),
]
SMALL_DETECTION = [
    *("--model.backbone.name", "bottleneck14", "--model.backbone.width", 8, "--model.backbone.weights", "none"),
    *("--model.detector.fpn_channels", 8, "--model.detector.fc_dim", 16, "--data.num_workers", 0),
    *("--data.batch_size", 2, "--data.min_size", 48, "--data.max_size", 64),
]
SMALL_SEGMENTATION = [
    *("--model.backbone.name", "bottleneck14", "--model.backbone.width", 8, "--model.backbone.weights", "none"),
    *("--model.backbone.norm", "group", "--model.segmenter.norm", "group", "--model.segmenter.head_channels", 16),
    *("--data.num_workers", 0, "--data.batch_size", 2, "--data.crop_size", 33),
]
SMALL_MULTITASK = [
    *("--model.backbone.name", "bottleneck14", "--model.backbone.width", 8, "--model.backbone.weights", "none"),
    *("--model.tasks.detection.init_args.detector.fpn_channels", 8, "--data.num_workers", 0),
    *("--model.tasks.detection.init_args.detector.fc_dim", 16, "--data.members.detection.init_args.batch_size", 2),
    *(
        "--model.tasks.segmentation.init_args.segmenter.head_channels",
        16,
        "--data.members.segmentation.init_args.batch_size",
        2,
    ),
    *("--model.tasks.segmentation.init_args.segmenter.norm", "group"),
    *("--data.members.segmentation.init_args.crop_size", 33, "--data.members.detection.init_args.min_size", 48),
    *("--data.members.detection.init_args.max_size", 64),
]
SMALL_DIGITS = ["--model.backbone.width", 8, "--model.attention.num_heads", 2]

SMALL_CORPUS = {"train": 400, "valid": 20, "test": 31}
SMALL_IMAGES = {"train": 6, "val": 2, "test": 2}


def small_miniature_writers() -> dict[str, Callable[[Path], Any]]:
    """What the miniature DataModules call to write their sets, by place, and the same for small sets."""
    return {
        "datamodules.miniature.translation_datamodule.write_miniature_corpus": functools.partial(
            write_miniature_corpus, pairs=SMALL_CORPUS
        ),
        "datamodules.miniature.detection_datamodule.write_miniature_detection": functools.partial(
            write_miniature_detection, counts=SMALL_IMAGES
        ),
        "datamodules.miniature.segmentation_datamodule.write_miniature_segmentation": functools.partial(
            write_miniature_segmentation, counts=SMALL_IMAGES
        ),
        "datamodules.miniature.street_detection_datamodule.write_miniature_street_detection": functools.partial(
            write_miniature_street_detection, counts=SMALL_IMAGES
        ),
    }
