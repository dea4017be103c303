"""Hi-End-MAE written straight down from its description, on tensors under official names: what our shortcuts must equal."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def random_state(config: dict, seed: int = 0) -> State:
    """Official names and shapes of a random model of `config` (that of the parity fixtures)."""
    generator = torch.Generator().manual_seed(seed)
    d, dd, mlp = config["enc_dim"], config["dec_dim"], int(config["mlp_ratio"])
    voxels = config["in_chans"]
    count = 1
    for side, step in zip(config["img_size"], config["patch_size"], strict=True):
        voxels, count = voxels * step, count * (side // step)
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.patch_embed.proj.weight": (d, config["in_chans"], *config["patch_size"]),
        "encoder.patch_embed.proj.bias": (d,),
        "encoder.cls_token": (1, 1, d),
        "mask_token": (1, 1, dd),
        "decoder.head.weight": (voxels, dd),
        "decoder.head.bias": (voxels,),
        "encoder_pos_embed": (1, count, d),
    }

    def linear(name: str, out: int, inside: int) -> None:
        shapes.update({f"{name}.weight": (out, inside), f"{name}.bias": (out,)})

    def norm(name: str, width: int) -> None:
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    def block(name: str, width: int) -> None:
        norm(f"{name}.norm1", width), norm(f"{name}.norm2", width)
        linear(f"{name}.attn.qkv", 3 * width, width), linear(f"{name}.attn.proj", width, width)
        linear(f"{name}.mlp.fc1", mlp * width, width), linear(f"{name}.mlp.fc2", width, mlp * width)

    for i in range(config["enc_depth"]):
        block(f"encoder.blocks.{i}", d)
    for i in range(config["self_depth"]):
        block(f"decoder.blocks.{i}", dd)
    for i in range(3):
        name = f"decoder.cross_attention_blocks.{i}"
        for k in range(3):
            norm(f"{name}.norm{k}", dd)
        linear(f"{name}.self_attn.qkv", 3 * dd, dd), linear(f"{name}.self_attn.proj", dd, dd)
        linear(f"{name}.cross_attn.q", dd, dd), linear(f"{name}.cross_attn.kv", 2 * dd, dd)
        linear(f"{name}.cross_attn.proj", dd, dd)
        linear(f"{name}.mlp.fc1", mlp * dd, dd), linear(f"{name}.mlp.fc2", dd, mlp * dd)
    for i in range(4):
        linear(f"encoder_to_decoder.{i}", dd, d)
    norm("encoder.norm", d), norm("decoder.norm", dd)
    state = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    for name in state:
        if "norm" in name and name.endswith("weight"):
            state[name] += 1
    from vitkit.parts.sincos3d import sincos_3d

    grid = [side // step for side, step in zip(config["img_size"], config["patch_size"], strict=True)]
    return {**state, "decoder_pos_embed": sincos_3d(dd, grid).unsqueeze(0)}


def patchify(volume: Tensor, patch: list[int]) -> Tensor:
    b, c, *size = volume.shape
    x = volume.reshape(
        b, c, size[0] // patch[0], patch[0], size[1] // patch[1], patch[1], size[2] // patch[2], patch[2]
    )
    return x.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4).flatten(1, 3)


def loss(state: State, volume: Tensor, noise: Tensor, config: dict) -> Tensor:
    """The official training loss: every patch embedded and predicted, nothing skipped."""
    patches = patchify(volume, config["patch_size"])
    order = noise.argsort(1)
    kept = int(noise.shape[1] * (1 - config["mask_ratio"]))
    ordered = patches.gather(1, order.unsqueeze(-1).expand_as(patches))
    weight = state["encoder.patch_embed.proj.weight"].permute(0, 2, 3, 4, 1).flatten(1)
    table = state["encoder_pos_embed"].expand(len(volume), -1, -1)
    table = table.gather(1, order[:, :kept, None].expand(-1, -1, table.shape[-1]))
    x = F.linear(ordered[:, :kept], weight, state["encoder.patch_embed.proj.bias"]) + table
    x = torch.cat([state["encoder.cls_token"].expand(len(x), -1, -1), x], 1)
    hidden = []
    for i in range(config["enc_depth"]):
        x = _block(state, f"encoder.blocks.{i}", x, config["enc_heads"])
        hidden.append(x)
    latent = _norm(state, "encoder.norm", x)
    sources = (hidden[3], hidden[6], hidden[9], latent)
    bridge = [_linear(state, f"encoder_to_decoder.{i}", one) for i, one in enumerate(sources)]
    masked = noise.shape[1] - kept
    q = torch.cat([bridge[3], state["mask_token"].expand(len(x), masked, -1)], 1)
    table = state["decoder_pos_embed"].expand(len(x), -1, -1).gather(1, order[..., None].expand(-1, -1, q.shape[-1]))
    q = torch.cat([q[:, :1], q[:, 1:] + table], 1)
    heads = config["dec_heads"]
    for i in range(config["self_depth"]):
        q = _block(state, f"decoder.blocks.{i}", q, heads)
    for i, kv in enumerate((bridge[2], bridge[1], bridge[0])):
        name = f"decoder.cross_attention_blocks.{i}"
        q = q + _attention(state, f"{name}.self_attn", _norm(state, f"{name}.norm0", q), heads)
        q = q + _cross(state, f"{name}.cross_attn", _norm(state, f"{name}.norm1", q), kv, heads)
        q = q + _mlp(state, f"{name}.mlp", _norm(state, f"{name}.norm2", q))
    predicted = _linear(state, "decoder.head", _norm(state, "decoder.norm", q))[:, 1 + kept :]
    target = ordered[:, kept:].detach()
    mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True, unbiased=False)
    return (predicted - (target - mean) / (var + 1e-6).sqrt()).square().mean()


def _linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def _norm(state: State, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)


def _mlp(state: State, name: str, x: Tensor) -> Tensor:
    return _linear(state, f"{name}.fc2", F.gelu(_linear(state, f"{name}.fc1", x)))


def _softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(-1) @ v


def _attention(state: State, name: str, x: Tensor, heads: int) -> Tensor:
    qkv = _linear(state, f"{name}.qkv", x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return _linear(state, f"{name}.proj", _softmax(*qkv).transpose(1, 2).flatten(2))


def _cross(state: State, name: str, x: Tensor, memory: Tensor, heads: int) -> Tensor:
    q = _linear(state, f"{name}.q", x).unflatten(-1, (heads, -1)).transpose(1, 2)
    k, v = _linear(state, f"{name}.kv", memory).unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
    return _linear(state, f"{name}.proj", _softmax(q, k, v).transpose(1, 2).flatten(2))


def _block(state: State, name: str, x: Tensor, heads: int) -> Tensor:
    x = x + _attention(state, f"{name}.attn", _norm(state, f"{name}.norm1", x), heads)
    return x + _mlp(state, f"{name}.mlp", _norm(state, f"{name}.norm2", x))
