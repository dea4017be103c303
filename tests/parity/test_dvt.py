"""dvt: hash grid, decomposition, its whole optimisation, denoiser, views and depth probe against Jiawei-Yang/Denoising-ViT."""

from __future__ import annotations

import torch

from vitkit import tokens, weights
from vitkit.clean.dvt import Denoiser, denoiser_rate, feature_loss, load_official
from vitkit.evaluate.depth import METRICS, DepthHead, depth_metrics, gradient_loss, resize_to, sig_loss
from vitkit.parts.crop_views import cut, patch_coordinates
from vitkit.parts.decomposition import Decomposition, Fit, Plan, coordinates, field_maps
from vitkit.parts.hash_grid import grid_levels, total_entries

from .conftest import Compared, files, read

EXACT = 2e-6  # what reaches the last bits
GRID = {
    "base_resolution": 16,
    "max_resolution": 1024,
    "n_levels": 10,
    "n_features_per_level": 8,
    "log2_hashmap_size": 20,
}


def decomposition(config: dict, tensors: dict, dim: int, grid: tuple[int, int]) -> Decomposition:
    """The module of a fixture's configuration with the authors' tensors in it."""
    c = GRID | config
    levels = grid_levels(c["base_resolution"], c["max_resolution"], c["n_levels"], c["log2_hashmap_size"])
    made = Decomposition(dim, grid, levels, features=c["n_features_per_level"])
    made.load_official(tensors)
    return made


def by_paths(path_of: str) -> dict:
    return {"argvalues": files(path_of), "ids": lambda path: path.stem}


def pytest_generate_tests(metafunc) -> None:
    part = getattr(metafunc.function, "part", None)
    if part is not None:
        metafunc.parametrize("path", **by_paths(part))


def of(part: str):
    """Run the test on every fixture of this part."""

    def mark(function):
        function.part = part
        return function

    return mark


def gradients(model: Decomposition) -> dict[str, torch.Tensor]:
    """Gradients under the authors' names."""
    kept = {name: p.data for name, p in model.named_parameters()}
    for p in model.parameters():
        p.data = torch.zeros_like(p) if p.grad is None else p.grad
    found = {name: value.detach().clone() for name, value in model.official_state().items()}
    for name, p in model.named_parameters():
        p.data = kept[name]
    return found


@of("dvt.field")
def test_field(path):
    fixture = read(path)
    c, seen = fixture.config, Compared(fixture)
    own = {f"field.{name}": value for name, value in fixture.group("weights.").items()}
    model = decomposition(c, own, c["feat_dim"], (2, 2))
    assert total_entries(model.levels) == c["total_entries"]
    for level, theirs in zip(model.levels, c["levels"], strict=True):
        found = {"level": theirs["level"], "scale": theirs["scale"], "resolution": level.resolution}
        assert {**found, "entries": level.entries, "offset": level.offset} == theirs
        assert abs(level.scale - theirs["scale"]) <= 1e-7 * theirs["scale"]
    coords = fixture["in.coords"].unsqueeze(0)
    rows, shares = model.encode(coords)
    assert torch.equal(rows[0].transpose(0, 1), fixture["out.corner_index"])
    seen.left.discard("out.corner_index")
    seen.same("out.corner_weight", shares[0].transpose(0, 1), 4e-6)
    from vitkit.parts.hash_grid import mix

    seen.same("out.encoding", mix(model.table, rows, shares)[0], 4e-6)
    features = model.field(coords)[0]
    seen.same("out.features", features)
    (features * fixture["in.cotangent"]).sum().backward()
    for name, value in gradients(model).items():
        if name.startswith("field."):
            seen.same("grad." + name.removeprefix("field."), value)
    seen.done()


@of("dvt.stage1")
def test_stage1_losses_and_gradients(path):
    fixture = read(path)
    c, seen = fixture.config, Compared(fixture)
    grid = (c["noise_map_height"], c["noise_map_width"])
    names = {"patch_l2_loss": "l2", "cosine_similarity_loss": "cosine"}
    names |= {"residual_loss": "residual", "residual_sparsity_loss": "sparsity"}
    raw, coords = fixture["in.raw"].unsqueeze(0), fixture["in.coords"].unsqueeze(0)
    between = fixture["in.artifact_coords"].unsqueeze(0)
    for phase in (1, 2):
        model = decomposition(c.get("field", c), fixture.group("weights."), c["feat_dim"], grid)
        model.artifacts.requires_grad_(phase == 1)
        losses = model.losses(raw, model.field(coords), model.artifact_between(between), second=phase == 2)
        loss = sum(losses.values())
        loss.sum().backward()
        recorded = fixture.group(f"out.phase{phase}.")
        assert {names.get(name, name) for name in recorded} == {*losses, "loss"}
        for name in recorded:
            seen.same(f"out.phase{phase}.{name}", loss if name == "loss" else losses[names[name]])
        found = gradients(model)
        for name in fixture.group(f"grad.phase{phase}."):
            seen.same(f"grad.phase{phase}.{name}", found[name])
    maps(fixture, seen, model, grid)
    seen.done()


@torch.no_grad()
def maps(fixture, seen: Compared, model: Decomposition, grid: tuple[int, int]) -> None:
    """The map-shaped call, by lookups of whole places as the fit makes them."""
    raw, coords = fixture["in.full_raw"], fixture["in.full_coords"]
    shape = raw.shape
    flat = raw.flatten(1, 2)
    field = model.field(coords.flatten(1, 2)).view(shape)
    places = torch.arange(grid[0] * grid[1]).unsqueeze(0)
    artifact, residual = model.artifact(places).view(shape), model.residual(flat).view(shape)
    nodes = coordinates(grid, -1.0)
    seen.same("out.full.shared_patterns", model.artifact_between(nodes.view(1, -1, 2)).view(shape))
    seen.same("out.full.denoised_feats", field)
    seen.same("out.full.pred_residual", residual)
    seen.same("out.full.denoised_features", raw - artifact - residual)
    seen.same("out.full.pred_features", field + artifact + residual)
    assert torch.allclose(artifact, fixture["out.full.shared_patterns"], atol=1e-6)
    assert torch.allclose(coords[0], coordinates(grid), atol=1e-6)


@of("dvt.loop")
def test_the_whole_loop(path):
    fixture = read(path)
    c, seen = fixture.config, Compared(fixture)
    grid = (c["noise_map_height"], c["noise_map_width"])
    keys = {"lr", "min_lr", "weight_decay"}
    plan = Plan(
        steps=c["num_iters"],
        pixels=c["pixel_bsz"],
        warmup=c["warmup_iters"],
        freeze_after=c["freeze_shared_artifacts_after"],
        rows="dense",
        **{key: c[key] for key in keys},
    )
    model = decomposition({"n_levels": c["n_levels"]} | c["field"], fixture.group("weights."), c["feat_dim"], grid)
    fit = Fit(model, fixture["in.features"].unsqueeze(0), fixture["in.coords"].unsqueeze(0), plan, seeds=[0])
    for drawn in fixture["in.indices"]:
        fit.step(drawn.unsqueeze(0))
    fit.finish()
    seen.same("out.lr", torch.tensor([plan.rate(step) for step in range(plan.steps)]))
    for name, value in model.official_state().items():
        seen.same(f"out.{name}", value, 2e-4)  # Adam with eps 1e-15 amplifies rounding
    seen.same("out.denoised_map", field_maps(model)[0], 1e-5)
    seen.done()


def trunk(dim: int, grid: tuple[int, int]):
    kwargs = {"embed_dim": dim, "depth": 1, "num_heads": 1}
    size = (16 * grid[0], 16 * grid[1])
    return weights.load("vit_tiny_patch16_224", arch_kwargs=kwargs, pretrained=False, image_size=size, say=None)


@of("dvt.denoiser")
def test_denoiser(path, tmp_path):
    fixture = read(path)
    c, seen = fixture.config, Compared(fixture)
    grid = (c["noise_map_height"], c["noise_map_width"])
    torch.save({"denoiser": fixture.group("weights.")}, tmp_path / "denoiser.pth")
    state, _ = weights.read_state(tmp_path / "denoiser.pth")
    vit = load_official(trunk(c["feat_dim"], grid), state, grid)
    denoiser: Denoiser = vit.dvt
    raw = fixture["in.features"].clone().requires_grad_()
    out = denoiser(raw.flatten(1, 2), tuple(raw.shape[1:3]))
    losses = feature_loss(out, fixture["in.target"].flatten(1, 2))
    loss = losses["l2"] + losses["cosine"]
    loss.backward()
    seen.same("out.denoised", out.view_as(raw), EXACT)
    seen.same("out.l2_loss", losses["l2"])
    seen.same("out.cosine_similarity_loss", losses["cosine"])
    seen.same("out.loss", loss)
    seen.same("grad.features", raw.grad)
    for name in fixture.group("grad."):
        if name != "features":
            seen.same(f"grad.{name}", denoiser.get_parameter(name).grad)
    native = fixture["in.features_native"]
    with torch.no_grad():
        seen.same("out.denoised_native", denoiser(native.flatten(1, 2)).view_as(native), EXACT)
    s = c["lr_schedule"]
    rule = {"lr": s["base_value"], "min_lr": s["final_value"], "warmup": s["warmup_iters"], "total": s["total_iters"]}
    rates = [denoiser_rate(step, **rule) for step in range(len(fixture["out.lr_schedule"]))]
    seen.same("out.lr_schedule", torch.tensor(rates))
    seen.done()


@of("dvt.denoiser")
def test_a_vit_with_the_official_denoiser_gives_its_patches_and_is_kept(path, tmp_path):
    fixture = read(path)
    c = fixture.config
    grid = (c["noise_map_height"], c["noise_map_width"])
    vit = trunk(c["feat_dim"], grid).eval()
    x = torch.randn(2, 3, 16 * grid[0] + 16, 16 * grid[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = tokens.encode(vit, x)
        load_official(vit, fixture.group("weights."), grid).eval()
        clean = tokens.encode(vit, x)
        assert torch.equal(clean.prefix, plain.prefix)
        assert torch.equal(clean.patches, vit.dvt(plain.patches, plain.grid))
        weights.save_run(tmp_path, vit)
        again = weights.load(tmp_path, say=None).eval()
        assert torch.equal(tokens.encode(again, x).all, clean.all)


@of("dvt.views")
def test_views(path):
    fixture = read(path)
    c, seen = fixture.config, Compared(fixture)
    grid = tuple((size - c["patch_size"]) // c["stride"] + 1 for size in c["size"])
    image = fixture["in.image"]
    for number, crop in enumerate(fixture["in.crops"].tolist()):
        seen.same(f"out.view{number}", cut(image, crop, c["size"]), EXACT)
        seen.same(f"out.coords{number}", patch_coordinates(crop, image.shape[1:], grid), EXACT)
    seen.done()


@of("dvt.depth")
def test_depth(path):
    fixture = read(path)
    c, seen = fixture.config, Compared(fixture)
    limits = {"min_depth": c["min_depth"], "max_depth": c["max_depth"]}
    weight = fixture["weights.conv_depth.weight"]
    head = DepthHead(weight.shape[1], bins=c["n_bins"], **limits)
    head.load_state_dict(fixture.group("weights."))
    features, truth = fixture["in.feat"].clone().requires_grad_(), fixture["in.depth"]
    depth = head(features)
    seen.same("out.depth_pred", depth)
    full, most = resize_to(depth, truth), {"max_depth": c["max_depth"]}
    loss = sig_loss(full, truth, **most)
    loss.backward()
    full = full.detach()
    seen.same("out.sigloss", loss)
    seen.same("grad.feat", features.grad)
    seen.same("out.sigloss_warm", sig_loss(full, truth, warm=True, **most))
    weight_of = c["gradloss_weight"]
    seen.same("out.gradloss_4d", weight_of * gradient_loss(full, truth, over="batch", **most))
    two = gradient_loss(full[:2], truth[:2], over="batch", **most)
    assert float(two) == float(fixture["out.gradloss_4d_batch2"]) == 0.0
    seen.left.discard("out.gradloss_4d_batch2")
    seen.same("out.gradloss_2d_mean", weight_of * gradient_loss(full, truth, **most))
    found = depth_metrics(full, truth, **limits)
    assert tuple(found) == METRICS == tuple(c["metrics"])
    seen.same("out.metrics", torch.tensor(list(found.values())))
    seen.done()
