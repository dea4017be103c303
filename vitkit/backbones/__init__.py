"""ViTs that timm does not have. Importing this registers them with timm: `timm.create_model`, `vitkit.weights.load`."""

from vitkit.backbones import video, volume

__all__ = ["video", "volume"]
