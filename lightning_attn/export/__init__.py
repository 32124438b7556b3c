"""Trained models as files: safetensors, torch.export programs and ONNX graphs."""
