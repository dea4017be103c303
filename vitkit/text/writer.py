"""A report writer: patch tokens of a frozen ViT, a small projector, and a causal language model that goes on from them.

Paper: Hyland et al., "MAIRA-1: A specialised large multimodal model for radiology report generation" (arXiv 2311.13668),
with which RAD-DINO (arXiv 2401.10815) is evaluated; the recipe is LLaVA's (Liu et al., arXiv 2304.08485).

What happens, and where: the last block's patch tokens after the final norm (`patch_tokens`) go through linear layers with
GELU between (`ReportWriter.projector`) and stand in front of the text's embeddings: [patches][prompt][begin] text [end].
The loss is cross-entropy of the text's tokens alone (`forward`). The ViT is never trained, so its tokens are computed once.
First the projector learns alone (`before_step` holds the language model at rate 0), then both. `write` is transformers'
`generate`: greedy, or beams.

Differs from the paper: language models are whatever transformers loads (theirs is Vicuna-7B), by default a tiny one from
nothing; no indication or earlier image is given beside the image.

Cost: the ViT runs once over all images; 2 N D bytes an image of patch tokens on disk; then a language model over N + text
tokens a step, its attention quadratic in both.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit import tokens
from vitkit.data.images import Images
from vitkit.data.loader import Order
from vitkit.errors import ConfigError, WeightsError
from vitkit.parts.optim import weight_decay_groups
from vitkit.text.settings import Settings

IGNORED = -100  # label of positions without a loss


class ReportWriter(nn.Module):
    """`forward({"image": patch tokens (B, N, D), "text": ids (B, L) padded}) -> {"loss"}`; `write` gives texts."""

    def __init__(self, lm: Any, tokenizer: Any, dim: int, settings: Settings = Settings(), *, new: bool = False):
        super().__init__()
        width = lm.get_input_embeddings().embedding_dim
        layers: list[nn.Module] = [nn.Linear(dim, width)]
        for _ in range(settings.projector_layers - 1):
            layers += [nn.GELU(), nn.Linear(width, width)]
        self.projector, self.lm = nn.Sequential(*layers), lm
        self.tokenizer, self.settings = tokenizer, settings
        self.first = (0.0 if new else 1.0) if settings.projector_epochs == "auto" else float(settings.projector_epochs)
        self.scale = (1.0 if new else 0.02) if settings.lm_scale == "auto" else float(settings.lm_scale)
        prompt = tokenizer(settings.prompt, add_special_tokens=False)["input_ids"] if settings.prompt else []
        self.register_buffer("prefix", torch.tensor([*prompt, tokenizer.bos_token_id]), persistent=False)

    # ------------------------------------------------------------ text to numbers

    def ids(self, texts: Sequence[str]) -> Tensor:
        """(B, L) tokens with the end, padded at the right by -1."""
        end = [self.tokenizer.eos_token_id]
        rows = [torch.tensor(self.tokenizer(t, add_special_tokens=False)["input_ids"] + end) for t in texts]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)

    def require_room(self, patches: int, longest: int) -> None:
        """Raise ConfigError where patches and text are more tokens than the language model has positions."""
        room = getattr(self.lm.config, "max_position_embeddings", None) or getattr(self.lm.config, "n_positions", None)
        need = patches + len(self.prefix) + longest
        if room is not None and need > room:
            raise ConfigError(
                f"{patches} patches and texts of up to {longest} tokens are {need}, and the language model has {room}",
                fix="a smaller image_size, a larger patch_size, or fewer max_words",
            )

    # ------------------------------------------------------------ training

    def before(self, patches: Tensor) -> Tensor:
        """What the text goes on from (B, N + P, width)."""
        words = self.lm.get_input_embeddings()(self.prefix).expand(len(patches), -1, -1)
        return torch.cat([self.projector(patches), words], dim=1)

    def token_losses(self, patches: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of every token of the texts (B, L), and which are real (B, L)."""
        real, start = ids >= 0, self.before(patches)
        embedded = self.lm.get_input_embeddings()(ids.clamp(min=0))
        mask = torch.cat([real.new_ones(start.shape[:2]), real], dim=1).long()
        logits = self.lm(inputs_embeds=torch.cat([start, embedded], dim=1), attention_mask=mask).logits
        logits = logits[:, start.shape[1] - 1 : -1]  # the position before each token of the text
        losses = F.cross_entropy(logits.float().transpose(1, 2), ids.masked_fill(~real, IGNORED), reduction="none")
        return losses, real

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        losses, real = self.token_losses(batch["image"], batch["text"])
        return {"loss": losses.sum() / real.sum()}

    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """The projector's, then the language model's with their own rate, marked so that `before_step` knows them."""
        own = weight_decay_groups(self.projector.named_parameters(), weight_decay)
        lm = weight_decay_groups(self.lm.named_parameters(), weight_decay)
        return [*own, *({**group, "lr_scale": self.scale, "lm": True} for group in lm)]

    def before_step(self, now: Any, groups: list[dict[str, Any]]) -> None:
        for group in groups:
            if group.get("lm") and now.epoch < self.first:
                group["lr"] = 0.0

    def persistent(self) -> dict[str, Tensor]:
        """Tied weights once."""
        return dict(self.named_parameters())

    # ------------------------------------------------------------ use

    @torch.inference_mode()
    def text_losses(self, patches: Tensor, ids: Tensor) -> Tensor:
        """Mean cross-entropy of each text (B,), in nats a token."""
        losses, real = self.token_losses(patches, ids)
        return losses.sum(1) / real.sum(1)

    @torch.inference_mode()
    def write(self, patches: Tensor, *, beams: int | None = None, longest: int = 200) -> list[str]:
        """Texts of patch tokens (B, N, D): greedy or by beams, at most `longest` tokens."""
        start = self.before(patches)
        out = self.lm.generate(
            inputs_embeds=start,
            attention_mask=torch.ones(start.shape[:2], dtype=torch.long, device=start.device),
            max_new_tokens=longest,
            num_beams=beams or self.settings.beams,
            do_sample=False,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return [text.strip() for text in self.tokenizer.batch_decode(out, skip_special_tokens=True)]


@torch.inference_mode()
def patch_tokens(vit: nn.Module, pixels: Tensor) -> Tensor:
    """(B, N, D) of normalised pixels: the last block's patch tokens after the final norm."""
    found = tokens.encode(vit, pixels).patches.float()
    if not torch.isfinite(found).all():
        raise WeightsError("the model gives patch tokens that are not finite", fix="load the weights again in float32")
    return found


def batches_of(
    writer: ReportWriter, patches: np.ndarray, texts: Sequence[Sequence[str]], *, batch_size: int, seed: int
) -> tuple[Any, int]:
    """(batches(epoch, start) for the loop, batches an epoch) of patch tokens (N, T, D) and texts: an image with several is
    seen once with each. The order depends on (seed, epoch) alone."""
    pairs = [(i, text) for i, cell in enumerate(texts) for text in cell]
    size = min(batch_size, len(pairs))
    steps = Order(len(pairs), size, seed, drop_last=True).batches

    def batches(epoch: int, start: int) -> Iterator[dict[str, Any]]:
        order = Order(len(pairs), size, seed, epoch, drop_last=True)
        for rows in itertools.islice(order, start, None):
            chosen = [pairs[row] for row in rows.tolist()]
            image = patches[np.array([i for i, _ in chosen])]
            yield {"image": torch.from_numpy(np.ascontiguousarray(image)), "text": writer.ids([t for _, t in chosen])}

    return batches, steps


def shortened(text: str, words: int) -> str:
    """Spaces made single, and the first `words` words."""
    return " ".join(text.split()[:words])


def texts_of(images: Images, column: str, words: int) -> list[list[str]]:
    """Texts of every image without empty ones, shortened."""
    return [[shortened(text, words) for text in cell if text.strip()] for cell in images.columns[column]]
