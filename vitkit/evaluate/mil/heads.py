"""Heads that turn the tile features of one slide into one score: ABMIL, Chowder, DSMIL, mean and max pooling.

Every head takes bags `x` (B, T, columns + D) and `mask` (B, T) or (B, T, 1), True where a place is only padding, and gives
logits (B, C). What stands in padded places never matters: they are left out where tiles are pooled, so that a bag alone
and the same bag padded in a batch give the same logits. A head has two halves: `tile` is computed for each tile on its own,
`bag` pools. `flat` runs the first half on real tiles only, without the padding that bags of different length bring.

`metadata_cols` leading columns (level, x, y in files of the original code) are dropped; vitkit's own files hold features
only, so the default is 0. Parameter names are those of owkin/HistoSSLscaling (73f1d191), whose state dicts load with
`load_state_dict`.

Sources: ABMIL is Ilse et al. 2018 (arXiv 1802.04712), Chowder Courtiol et al. 2018 (arXiv 1802.02212), DSMIL Li et al.
2021 (arXiv 2011.08939). `transformers` has TransMIL and HIPT's head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitkit.errors import ConfigError, nearest

ACTIVATIONS = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


def activation(name: str) -> nn.Module:
    """The activation called `name`."""
    if name not in ACTIVATIONS:
        close = nearest(name, ACTIVATIONS) or ACTIVATIONS
        raise ConfigError(f"there is no activation '{name}'", fix=f"did you mean {' or '.join(close)}?")
    return ACTIVATIONS[name]()


class MLP(nn.Sequential):
    """[Linear, activation, dropout] for each hidden width, then a Linear."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden: Sequence[int] | None = None,
        *,
        act: str = "sigmoid",
        dropout: float = 0.0,
    ):
        layers: list[nn.Module] = []
        for width in hidden or ():
            drop = [nn.Dropout(dropout)] if dropout else []
            layers.append(nn.Sequential(nn.Linear(in_features, width), activation(act), *drop))
            in_features = width
        super().__init__(*layers, nn.Linear(in_features, out_features))


class TilesMLP(nn.Module):
    """The same MLP for every tile. Padded rows give finite values that the pooling behind it must leave out."""

    def __init__(
        self, in_features: int, out_features: int, hidden: Sequence[int] | None = None, *, act: str = "sigmoid"
    ):
        super().__init__()
        layers: list[nn.Module] = []
        for width in hidden or ():
            layers += [nn.Linear(in_features, width), activation(act)]
            in_features = width
        self.hidden_layers = nn.ModuleList([*layers, nn.Linear(in_features, out_features)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.hidden_layers:
            x = layer(x)
        return x


class Head(nn.Module):
    """What heads share. `stackable`: many of them can be trained as one (no randomness, no shapes that depend on the
    number of real tiles). `pooled`: "mean" or "max" where a slide enters as one vector that no weight changes."""

    stackable = True
    pooled: str | None = None

    def __init__(self, metadata_cols: int = 0):
        super().__init__()
        if metadata_cols < 0:
            raise ConfigError(f"metadata_cols is {metadata_cols}", fix="0 for plain features, 3 for level, x, y")
        self.metadata_cols = metadata_cols

    def features(self, x: Tensor) -> Tensor:
        """The bag without its metadata columns."""
        return x[..., self.metadata_cols :]

    def tile(self, x: Tensor) -> tuple[Tensor, ...]:
        """What is computed for every tile on its own: (..., columns + D) -> tensors (..., width)."""
        return (self.features(x),)

    def bag(self, parts: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
        """Logits (B, C) from what `tile` gave, as (B, T, width)."""
        raise NotImplementedError

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.bag(self.tile(x), mask)

    def flat(self, x: Tensor, places: Tensor) -> Tensor:
        """The same logits from tiles x (M, columns + D) of all bags; places (B, T) says which rows are a bag's, -1 padding."""
        at = places.clamp_min(0)
        parts = tuple(part.index_select(0, at.flatten()).unflatten(0, at.shape) for part in self.tile(x))
        return self.bag(parts, places < 0)

    def tile_weights(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """How much each tile (B, T) counts for the slide; 0 in padded places. Heads without one raise ConfigError."""
        raise ConfigError(
            f"{type(self).__name__} does not say which tiles matter", fix="use abmil, dsmil, chowder or hipt for that"
        )


def column(mask: Tensor | None) -> Tensor | None:
    """`mask` as (B, T, 1)."""
    return mask.unsqueeze(-1) if mask is not None and mask.ndim == 2 else mask


def hide(values: Tensor, mask: Tensor | None, with_: float) -> Tensor:
    """`values` (B, T, ...) with `with_` in padded places."""
    mask = column(mask)
    return values if mask is None else values.masked_fill(mask, with_)


class GatedAttention(nn.Module):
    """softmax over tiles of w(tanh(att e) * sigmoid(gate e)) / temperature."""

    def __init__(self, dim: int, *, temperature: float = 1.0):
        super().__init__()
        if temperature <= 0:
            raise ConfigError(f"temperature is {temperature}", fix="a number above 0")
        self.att, self.gate, self.w = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, 1)
        self.temperature = temperature

    def scores(self, e: Tensor) -> Tensor:
        """(..., dim) -> (..., 1)."""
        return self.w(torch.tanh(self.att(e)) * torch.sigmoid(self.gate(e))) / self.temperature

    def forward(self, e: Tensor, mask: Tensor | None = None) -> Tensor:
        """Weights (B, T, 1) that sum to one over a bag's tiles."""
        return torch.softmax(hide(self.scores(e), mask, float("-inf")), dim=1)


class ABMIL(Head):
    """Gated attention pooling. With its defaults and 1024 features this is the 164,482-parameter head of Phikon-v2."""

    def __init__(
        self,
        in_features: int,
        out_features: int = 1,
        *,
        dim: int = 128,
        temperature: float = 1.0,
        tiles_hidden: Sequence[int] | None = None,
        hidden: Sequence[int] | None = None,
        tiles_act: str = "sigmoid",
        act: str = "sigmoid",
        dropout: float = 0.0,
        metadata_cols: int = 0,
    ):
        super().__init__(metadata_cols)
        self.stackable = not dropout
        self.tiles_emb = TilesMLP(in_features, dim, tiles_hidden, act=tiles_act)
        self.attention_layer = GatedAttention(dim, temperature=temperature)
        self.mlp = MLP(dim, out_features, hidden, act=act, dropout=dropout)

    def tile(self, x: Tensor) -> tuple[Tensor, ...]:
        e = self.tiles_emb(self.features(x))
        return e, self.attention_layer.scores(e)

    def pool(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """-> slide vectors (B, dim), attention (B, T, 1)."""
        return self._pool(self.tile(x), mask)

    def _pool(self, parts: tuple[Tensor, ...], mask: Tensor | None) -> tuple[Tensor, Tensor]:
        e, scores = parts
        a = torch.softmax(hide(scores, mask, float("-inf")), dim=1)
        return (a.transpose(1, 2) @ e).squeeze(1), a

    def bag(self, parts: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
        return self.mlp(self._pool(parts, mask)[0])

    def tile_weights(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.pool(x, mask)[1].squeeze(-1)


class Chowder(Head):
    """The highest and lowest tile scores of each class, in order, into an MLP that the classes share."""

    def __init__(
        self,
        in_features: int,
        out_features: int = 1,
        *,
        n_top: int = 10,
        n_bottom: int = 10,
        tiles_hidden: Sequence[int] | None = (128,),
        hidden: Sequence[int] | None = (128, 64),
        tiles_act: str = "sigmoid",
        act: str = "sigmoid",
        dropout: float = 0.0,
        metadata_cols: int = 0,
    ):
        super().__init__(metadata_cols)
        if n_top < 0 or n_bottom < 0 or n_top + n_bottom == 0:
            raise ConfigError(f"n_top {n_top} and n_bottom {n_bottom}", fix="at least one tile in all, e.g. 10 and 10")
        self.stackable = not dropout
        self.n_top, self.n_bottom = n_top, n_bottom
        self.score_model = TilesMLP(in_features, out_features, tiles_hidden, act=tiles_act)
        self.mlp = MLP(n_top + n_bottom, 1, hidden, act=act, dropout=dropout)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def tile(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.score_model(self.features(x)),)

    def extremes(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, C) -> (B, n_top + n_bottom, C): top scores descending, then bottom ones ascending; 0 where a bag has too
        few tiles."""
        found = []
        for n, empty, largest in ((self.n_top, float("-inf"), True), (self.n_bottom, float("inf"), False)):
            if n:
                seen = hide(scores, mask, empty)
                if seen.shape[1] < n:
                    lacking = n - seen.shape[1]
                    seen = torch.cat([seen, torch.full_like(seen[:, :1], empty).expand(-1, lacking, -1)], dim=1)
                best = seen.topk(n, dim=1, largest=largest, sorted=True).values
                found.append(torch.where(best == empty, torch.zeros_like(best), best))
        return torch.cat(found, dim=1)

    def bag(self, parts: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
        return self.mlp(self.extremes(parts[0], mask).transpose(1, 2)).squeeze(-1)

    def tile_weights(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """How far a tile's score (of its farthest class) stands from the bag's mean score, as a share of the sum."""
        (scores,) = self.tile(x)
        far = (scores - _mean(scores, mask).unsqueeze(1)).abs().amax(-1, keepdim=True)
        far = hide(far, mask, 0.0)
        return (far / far.sum(1, keepdim=True).clamp_min(1e-12)).squeeze(-1)


class MeanPool(Head):
    """The mean tile, then an MLP (a linear layer unless `hidden`)."""

    pooled = "mean"

    def __init__(
        self,
        in_features: int,
        out_features: int = 1,
        *,
        hidden: Sequence[int] | None = None,
        act: str = "sigmoid",
        dropout: float = 0.0,
        metadata_cols: int = 0,
    ):
        super().__init__(metadata_cols)
        self.stackable = not dropout
        self.mlp = MLP(in_features, out_features, hidden, act=act, dropout=dropout)

    def bag(self, parts: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
        return self.mlp(_mean(parts[0], mask))


class MaxPool(MeanPool):
    """The largest value of every feature over a bag's tiles, then an MLP."""

    pooled = "max"

    def bag(self, parts: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
        return self.mlp(hide(parts[0], mask, float("-inf")).amax(1))


def _mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over real tiles: (B, T, D) -> (B, D)."""
    if mask is None:
        return x.mean(1)
    return hide(x, mask, 0.0).sum(1) / (~column(mask)).sum(1)


class DSMIL(Head):
    """Two streams: the best tile's score, and tiles pooled by how alike their queries are to the best tile's.

    The original has shapes that are right for one class only; here `C` classes give (B, C): each class has its own best
    tile and pooled vector, and the bag MLP, which has one output, is shared. `passing_values` pools learned values instead
    of the raw features; without it `tiles_values` is unused and only there to load the original's state dicts.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int = 1,
        *,
        queries: int = 32,
        values: int = 32,
        scores_hidden: Sequence[int] | None = (200, 100),
        queries_hidden: Sequence[int] | None = (200, 100),
        values_hidden: Sequence[int] | None = None,
        hidden: Sequence[int] | None = (200, 100),
        passing_values: bool = False,
        tiles_act: str = "sigmoid",
        act: str = "sigmoid",
        dropout: float = 0.0,
        metadata_cols: int = 0,
    ):
        super().__init__(metadata_cols)
        self.stackable = not dropout
        self.passing_values = passing_values
        self.tiles_scores = TilesMLP(in_features, out_features, scores_hidden, act=tiles_act)
        self.tiles_queries = TilesMLP(in_features, queries, queries_hidden, act=tiles_act)
        self.tiles_values = TilesMLP(in_features, values, values_hidden, act=tiles_act)
        self.mlp = MLP(values if passing_values else in_features, 1, hidden, act=act, dropout=dropout)

    def tile(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.features(x)
        return self.tiles_scores(x), self.tiles_queries(x), self.tiles_values(x) if self.passing_values else x

    def streams(self, parts: tuple[Tensor, ...], mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """-> best tile score (B, C), attention (B, T, C), pooled vectors (B, C, V)."""
        scores, q, values = parts  # (B, T, C), (B, T, Q), (B, T, V)
        best, at = hide(scores, mask, float("-inf")).max(dim=1)  # (B, C) each
        top = q.gather(1, at.unsqueeze(-1).expand(-1, -1, q.shape[-1]))  # (B, C, Q)
        attention = torch.softmax(hide(q @ top.transpose(1, 2), mask, float("-inf")), dim=1)  # (B, T, C)
        return best, attention, attention.transpose(1, 2) @ hide(values, mask, 0.0)

    def bag(self, parts: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
        best, _, pooled = self.streams(parts, mask)
        return (best + self.mlp(pooled).squeeze(-1)) / 2

    def tile_weights(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.streams(self.tile(x), mask)[1].mean(-1)
