"""Window attention in bfloat16, with the dtypes that its inputs have under autocast."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vizoo.ops import window_attention

from .measuring import Case, Tensors, compiling


@dataclass(frozen=True)
class Shape:
    """A use of window attention: where it stands in a model, and its sizes."""

    name: str
    batch: int
    map: tuple[int, int]
    heads: int
    window: int
    shift: int
    d: int = 32
    cosine: bool = False


USES = (
    Shape("swin_tiny stage 1", 128, (56, 56), 3, 7, 3),
    Shape("swin_tiny stage 2", 128, (28, 28), 6, 7, 3),
    Shape("swin_tiny stage 3", 128, (14, 14), 12, 7, 3),
    Shape("swin_tiny stage 4", 128, (7, 7), 24, 7, 0),
    Shape("swin_tiny stage 1, 800x1333", 2, (200, 334), 3, 7, 3),
    Shape("swin_tiny stage 3, 800x1333", 2, (50, 84), 12, 7, 3),
    Shape("swin_base stage 1, 384", 32, (96, 96), 4, 12, 6),
    Shape("swin_base stage 3, 384", 32, (24, 24), 16, 12, 6),
    Shape("swinv2_tiny stage 1, window 8", 64, (64, 64), 3, 8, 4, cosine=True),
    Shape("swinv2_tiny stage 1, window 16", 64, (64, 64), 3, 16, 8, cosine=True),
    Shape("swinv2_base stage 1, window 24", 16, (96, 96), 4, 24, 12, cosine=True),
)
SHAPES = {shape.name: shape for shape in USES}


def case(name: str) -> Case:
    """The operator beside what models do without it."""
    shape = SHAPES[name]
    tensors, mask = inputs(shape), shift_mask(shape)

    def ours(tensors: Tensors) -> Tensor:
        return window_attention(**tensors, window=shape.window, shift=shape.shift, implementation="triton")

    def sdpa(tensors: Tensors) -> Tensor:
        return eager_sdpa(
            tensors["qkv"], tensors["bias"], tensors.get("cosine_scale"), tensors["padding"], mask,
            shape.window, shape.shift,
        )  # fmt: skip

    part = tensors["qkv"].nbytes / 3
    return Case(
        facts={key: value for key, value in asdict(shape).items() if key != "name"},
        tensors=tensors,
        ours=ours,
        expected=sdpa,
        peers={"sdpa eager": sdpa},
        compiled={"sdpa compiled": compiling(sdpa)},
        forward_bytes=4 * part,
        both_bytes=(4 + 7) * part,  # backward reads qkv and the incoming gradient, and writes that of qkv
    )


def inputs(shape: Shape) -> Tensors:
    """Random tensors that ask for gradients, with the dtypes they have under autocast."""
    n = shape.window**2
    tensors = {
        "qkv": torch.randn(shape.batch, *shape.map, 3, shape.heads, shape.d, device="cuda", dtype=torch.bfloat16),
        "bias": torch.randn(shape.heads, n, n, device="cuda"),
        "padding": torch.randn(3, shape.heads, shape.d, device="cuda", dtype=torch.bfloat16),
    }
    if shape.cosine:
        tensors["cosine_scale"] = 1 + 9 * torch.rand(shape.heads, device="cuda")
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def shift_mask(shape: Shape) -> Tensor | None:
    """The mask of every window of the padded map, (windows, N, N); None without a shift."""
    if not shape.shift:
        return None
    w, parts = shape.window, []
    for size in shape.map:
        padded = -(-size // w) * w
        place = torch.arange(padded, device="cuda")
        parts.append((place >= padded - w).int() + (place >= padded - shape.shift).int())
    label = 3 * parts[0][:, None] + parts[1][None, :]
    label = label.view(len(parts[0]) // w, w, len(parts[1]) // w, w).transpose(1, 2).reshape(-1, w * w)
    return -100.0 * (label[:, :, None] != label[:, None, :])


def eager_sdpa(
    qkv: Tensor,
    bias: Tensor,
    cosine_scale: Tensor | None,
    padding: Tensor,
    mask: Tensor | None,
    window: int,
    shift: int,
) -> Tensor:
    """What a model does without the operator: pad, roll, partition, attend with a mask made beforehand, and back."""
    B, H, W, _, h, d = qkv.shape
    bottom, right = -H % window, -W % window
    if bottom or right:
        full = padding.to(qkv.dtype).expand(B, H + bottom, W + right, 3, h, d).clone()
        full[:, :H, :W] = qkv
        qkv = full
    Hp, Wp = H + bottom, W + right
    if shift:
        qkv = qkv.roll((-shift, -shift), (1, 2))
    tokens = qkv.view(B, Hp // window, window, Wp // window, window, 3, h, d).permute(5, 0, 1, 3, 6, 2, 4, 7)
    q, k, v = tokens.reshape(3, -1, h, window * window, d)
    scale = None
    if cosine_scale is not None:
        q, k, scale = F.normalize(q, dim=-1) * cosine_scale.to(q.dtype)[:, None, None], F.normalize(k, dim=-1), 1.0
    logits = bias.to(q.dtype)[None]
    if mask is not None:
        logits = (logits + mask[:, None].to(q.dtype)).repeat(B, 1, 1, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=logits, scale=scale)
    out = out.view(B, Hp // window, Wp // window, h, window, window, d).permute(0, 1, 4, 2, 5, 3, 6)
    out = out.reshape(B, Hp, Wp, h, d)
    if shift:
        out = out.roll((shift, shift), (1, 2))
    return out[:, :H, :W]
