"""Figures and arrays of attention weights, and pictures of detections and segmentations."""

from lightning_attn.visualization.convolution import (
    SamplingPoints,
    draw_dynamic_kernels,
    draw_sampling_points,
    dynamic_kernel,
    sampling_points,
)
from lightning_attn.visualization.detection import draw_detections, draw_detections_beside_truth
from lightning_attn.visualization.figures import draw_term_maps, draw_token_matrix, save_figure
from lightning_attn.visualization.images import RecordedImage, record_image
from lightning_attn.visualization.maps import TermMaps, attentions_of, recorded_inputs, term_maps
from lightning_attn.visualization.pictures import save_picture
from lightning_attn.visualization.pixel_grid import PixelGrid
from lightning_attn.visualization.segmentation import (
    colour_labels,
    draw_segmentation,
    draw_segmentation_beside_truth,
)
from lightning_attn.visualization.translation import (
    cross_attention_maps,
    draw_translation_attention,
    translation_attention,
)

__all__ = [
    "PixelGrid",
    "RecordedImage",
    "SamplingPoints",
    "TermMaps",
    "attentions_of",
    "colour_labels",
    "cross_attention_maps",
    "draw_detections",
    "draw_detections_beside_truth",
    "draw_dynamic_kernels",
    "draw_sampling_points",
    "draw_segmentation",
    "draw_segmentation_beside_truth",
    "draw_term_maps",
    "draw_token_matrix",
    "draw_translation_attention",
    "dynamic_kernel",
    "record_image",
    "recorded_inputs",
    "sampling_points",
    "save_figure",
    "save_picture",
    "term_maps",
    "translation_attention",
]
