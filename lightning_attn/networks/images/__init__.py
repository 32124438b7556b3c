"""Networks for images: backbones, heads, and inference on large images."""
