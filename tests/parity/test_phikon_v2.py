"""Slide-level heads, losses, metrics and the bootstrap against owkin/HistoSSLscaling, every recorded tensor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vitkit.evaluate import metrics
from vitkit.evaluate.mil.bags import collate
from vitkit.evaluate.mil.heads import ABMIL, DSMIL, Chowder, MeanPool
from vitkit.evaluate.mil.inference import basic_interval, score
from vitkit.evaluate.mil.survival import concordance, cox_loss
from vitkit.evaluate.mil.transformers import TransMIL

from .conftest import Compared, files, read, relative


def loaded(head, fixture, name):
    head.load_state_dict(fixture.group(f"weights.{name}."))  # strict: every tensor of the original has its place
    return head.eval()


def heads(fixture) -> dict[str, torch.nn.Module]:
    """Every head, from the metadata alone (the widths of DSMIL's unused values from its weights)."""
    c = fixture.config
    acts = {"tiles_act": c["tiles_mlp_activation"], "act": c["mlp_activation"], "metadata_cols": c["metadata_cols"]}
    sizes = (c["in_features"], c["out_features"])
    d, t = c["dsmil"], c["transmil"]
    nystrom = {
        "landmarks": t["nystrom"]["num_landmarks"],
        "kernel": t["nystrom"]["residual_kernel_size"],
        "iterations": t["nystrom"]["pinv_iterations"],
    }
    values = [v.shape[0] for k, v in fixture.group("weights.dsmil.tiles_values.").items() if k.endswith("weight")]
    trans = {
        "dim": t["proj_dim"],
        "heads": t["num_heads"],
        "qkv_bias": t["qkv_bias"],
        "per_bag": False,
        "metadata_cols": c["metadata_cols"],
    }
    made = {
        "abmil": ABMIL(
            *sizes,
            dim=c["d_model_attention"],
            temperature=c["temperature"],
            hidden=c["abmil_mlp_hidden"],
            **{**acts, "act": c["abmil_mlp_activation"]},
        ),
        "chowder": Chowder(
            *sizes,
            n_top=c["chowder"]["n_top"],
            n_bottom=c["chowder"]["n_bottom"],
            tiles_hidden=c["chowder"]["tiles_mlp_hidden"],
            hidden=c["chowder"]["mlp_hidden"],
            **acts,
        ),
        "meanpool": MeanPool(
            *sizes, hidden=c["meanpool_hidden"], act=c["mlp_activation"], metadata_cols=c["metadata_cols"]
        ),
        "dsmil": DSMIL(
            c["in_features"],
            d["out_features"],
            queries=d["d_tiles_queries"],
            values=values[-1],
            values_hidden=values[:-1],
            scores_hidden=d["tiles_scores_mlp_hidden"],
            queries_hidden=d["tiles_queries_mlp_hidden"],
            hidden=d["mlp_hidden"],
            **acts,
        ),
        "transmil": TransMIL(c["in_features"], t["out_features"], **trans),
        "transmil_nystrom": TransMIL(c["in_features"], t["out_features"], nystrom=nystrom, **trans),
    }
    return {name: loaded(head, fixture, name) for name, head in made.items()}


@pytest.mark.parametrize("path", files("phikon_v2"), ids=lambda p: p.stem)
def test_slide_level_protocol(path):
    fixture = read(path)
    c, seen, models = fixture.config, Compared(fixture), None
    models = heads(fixture)
    count = sum(key.startswith("in.bag") for key in fixture.tensors)
    bags = [fixture[f"in.bag{i}"] for i in range(count)]
    padded, mask = collate(bags)
    assert torch.equal(padded, fixture["in.padded"]) and torch.equal(mask.unsqueeze(-1), fixture["in.mask"])

    with torch.no_grad():
        for name, model in models.items():
            logits = model(padded, mask)
            if name == "dsmil":  # the original's extra axis for several classes
                assert logits.numel() == fixture["out.dsmil"].numel()
                logits = logits.reshape(fixture["out.dsmil"].shape)
            seen.same(f"out.{name}", logits)
        abmil = models["abmil"]
        slide, attention = abmil.pool(padded, mask)
        seen.same("out.abmil_attention", attention)
        seen.same("out.abmil_slide", slide)
        seen.same("out.abmil_unpadded0", abmil(bags[0].unsqueeze(0)))
        assert relative(abmil(bags[0].unsqueeze(0)), abmil(padded, mask)[:1]) <= 1e-6
        seen.same("out.chowder_short", models["chowder"](padded, fixture["in.short_mask"]))

    x = padded.clone().requires_grad_(True)
    logits, classes = abmil(x, mask), c["out_features"]
    if classes == 1:
        loss = F.binary_cross_entropy_with_logits(logits, fixture["in.label"])
    else:
        loss = F.cross_entropy(logits, torch.arange(count) % classes)
    loss.backward()
    seen.same("out.abmil_loss", loss)
    seen.same("grad.padded", x.grad)
    for key in fixture.group("grad.w.abmil."):
        seen.same(f"grad.w.abmil.{key}", abmil.get_parameter(key).grad)
    survival(fixture, seen)
    classification(fixture, seen)
    seen.done()


def survival(fixture, seen):
    risk, time = fixture["in.cox_risk"].clone().requires_grad_(True), fixture["in.cox_time"]
    loss = cox_loss(risk.squeeze(-1), time)
    loss.backward()
    seen.same("out.cox", loss)
    seen.same("grad.cox_risk", risk.grad)
    seen.same("out.cindex", torch.tensor(concordance(time.numpy(), risk.detach().squeeze(-1).numpy())))


def classification(fixture, seen):
    y, logit = fixture["in.bin_label"].numpy(), fixture["in.bin_logit"].numpy()
    seen.same("out.bin_auc", torch.tensor(score(y, logit)))
    both = np.stack([-logit, logit], axis=1)  # class 1 where the logit is above 0; argmax takes the first of equals
    seen.same("out.bin_acc", torch.tensor(metrics.accuracy(y, both)))
    multi, logits = fixture["in.multi_label"].numpy(), fixture["in.multi_logit"].numpy()
    seen.same("out.macro_ovr_auc", torch.tensor(score(multi, logits)))
    interval = basic_interval(y, logit, draws=fixture["in.boot_idx"].numpy(), level=fixture.config["confidence_level"])
    seen.same("out.boot", torch.tensor([interval.value, interval.low, interval.high]))
