"""Images to text: a language model that reads a frozen ViT's patch tokens (`vitkit caption`)."""
