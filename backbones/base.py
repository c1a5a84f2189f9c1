"""The contract that every backbone keeps, and the surface that timm's users know, written once.

A family subclasses `Backbone`, declares its `stages`, and implements `stem`, `stage`, `downsample` and `normalize`;
everything else (features, heads, timm's methods) follows from those four. A family file ends in `FAMILY`, a value
that says which variants exist, which weights they have and how official checkpoints are laid out.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vizoo.weights.record import IMAGENET_MEAN, IMAGENET_STD, Weights

from .fusing import fuse_children
from .layers import LayerNorm

if TYPE_CHECKING:
    from typing_extensions import Self

MIN_SIDE = 32


def nearest(name: str, choices: Iterable[str]) -> str:
    """A hint for an error message: the closest valid choices, or all of them when few.

    Returns:
        Text such as `did you mean 'depths'?`, ready to stand behind a semicolon.
    """
    known = sorted(choices)
    starting = [choice for choice in known if name and choice.startswith(name)]
    close = starting[:3] or difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if not close:  # a misspelt beginning of a longer name
        close = [choice for choice in known if difflib.SequenceMatcher(None, name, choice[: len(name)]).ratio() > 0.7][
            :3
        ]
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    return f"valid: {', '.join(known[:12])}{', ...' if len(known) > 12 else ''}"


class Stage(NamedTuple):
    """One resolution of a backbone.

    Attributes:
        name: Path of the stage's module, `layers.0`.
        channels: Channels of its feature map.
        stride: Input pixels per map position, on both axes.
    """

    name: str
    channels: int
    stride: int


class FeatureInfo(list[dict[str, Any]]):
    """What a feature pyramid holds, as timm reports it: one dict (num_chs, reduction, module) per map."""

    def channels(self) -> list[int]:
        """Channels of each map."""
        return [entry["num_chs"] for entry in self]

    def reduction(self) -> list[int]:
        """Stride of each map, in input pixels."""
        return [entry["reduction"] for entry in self]

    def module_name(self) -> list[str]:
        """Module that computes each map."""
        return [entry["module"] for entry in self]


@dataclass(frozen=True, kw_only=True)
class CheckpointLayout:
    """How one publisher names the parameters of a family.

    Attributes:
        name: Who writes this layout: `official`, `timm`, `torchvision`.
        marker: Regular expression that matches a key of every checkpoint in this layout and of no other layout.
        renames: (pattern, replacement) pairs; the first pattern found in a key rewrites it, other keys stay.
        ignored: Patterns of keys that a model computes itself and therefore drops.
        reorders: (pattern, function) pairs for entries whose numbers stand in another order; the first pattern found
            in a key gives the function that brings its tensor into ours.
    """

    name: str
    marker: str
    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    reorders: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = ()

    def translate(self, key: str) -> str | None:
        """Our name for a key of this layout; None where the model computes that entry itself."""
        if any(re.search(pattern, key) for pattern in self.ignored):
            return None
        for pattern, replacement in self.renames:
            if re.search(pattern, key):
                return re.sub(pattern, replacement, key)
        return key

    def reorder(self, key: str, value: Tensor) -> Tensor:
        """The numbers of an entry of this layout in our order."""
        for pattern, function in self.reorders:
            if re.search(pattern, key):
                return function(value)
        return value


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One published design: its configuration and the checkpoints that exist for it.

    Attributes:
        config: The family's frozen configuration.
        weights: Checkpoints by tag; the first one is the default.
        num_classes: Classes of a model made without weights.
        params: Parameters as published, in millions.
        gmacs: Multiply-accumulate operations at `config.img_size` as published, in 10^9.
    """

    config: Any
    weights: Mapping[str, Weights] = field(default_factory=dict)
    num_classes: int = 1000
    params: float | None = None
    gmacs: float | None = None

    @property
    def default_tag(self) -> str | None:
        """Tag of the weights that `pretrained=True` takes; None where none are published."""
        return next(iter(self.weights), None)


@dataclass(frozen=True, kw_only=True)
class Family:
    """Everything the registry knows of a family.

    Attributes:
        name: Name of the family, and of its file.
        model: The one class that builds all its variants.
        config: The class of its configurations.
        variants: Variants by name.
        mixer: Kind of token mixer: `window attention`, `selective scan`, ...
        paper: Title, venue and arXiv number.
        layouts: Known checkpoint layouts; the first is the official one and also ours.
        bias_tables: Pattern of relative position bias tables, ((2w-1)^2, heads) or (heads, 2w-1, 2w-1), resized when
            the window differs.
        tiny: Overrides that make any variant run in milliseconds, for tests and experiments.
    """

    name: str
    model: type[Backbone]
    config: type
    variants: Mapping[str, Variant]
    mixer: str
    paper: str
    layouts: tuple[CheckpointLayout, ...]
    bias_tables: str | None = None
    tiny: Mapping[str, Any] = field(default_factory=dict)

    def build(self, config: Any, **options: Any) -> Backbone:
        """A model of this family; `options` are those of `Backbone`."""
        make: Callable[..., Backbone] = self.model
        return make(config, **options)

    def layout_of(self, keys: Iterable[str]) -> CheckpointLayout:
        """The layout that a checkpoint's keys are written in; the official one where no marker is found."""
        names = list(keys)
        for layout in self.layouts:
            if any(re.search(layout.marker, key) for key in names):
                return layout
        return self.layouts[0]


def image_sides(img_size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width of an image given by its side or by both."""
    return (img_size, img_size) if isinstance(img_size, int) else img_size


def check_size_and_rate(img_size: int | tuple[int, int], drop_path_rate: float) -> None:
    """What every configuration must hold.

    Raises:
        ValueError: The image is too small, or the drop path rate is no probability below 1.
    """
    if not 0 <= drop_path_rate < 1:
        raise ValueError(f"drop_path_rate must lie in [0, 1), got {drop_path_rate}")
    if min(image_sides(img_size)) < MIN_SIDE:
        raise ValueError(f"img_size must be at least {MIN_SIDE} on both sides, got {img_size}")


def check_heads(channels: Sequence[int], num_heads: Sequence[int]) -> None:
    """Heads of each stage divide its channels.

    Raises:
        ValueError: They do not; names the nearest number that does.
    """
    for width, heads in zip(channels, num_heads, strict=True):
        if heads < 1 or width % heads:
            fitting = [n for n in range(1, width + 1) if width % n == 0]
            raise ValueError(
                f"num_heads must divide the stage's channels, got {heads} heads for {width} channels; "
                f"nearest valid: {min(fitting, key=lambda n: abs(n - heads))}"
            )


def override(config: Any, overrides: Mapping[str, Any]) -> Any:
    """A copy of a frozen configuration with some fields replaced.

    Raises:
        TypeError: A field does not exist; names the nearest one.
    """
    fields = {f.name for f in dataclasses.fields(config)}
    for name in overrides:
        if name not in fields:
            raise TypeError(f"{type(config).__name__} has no field {name!r}; {nearest(name, fields)}")
    return dataclasses.replace(config, **overrides)


class Backbone(nn.Module):
    """Base class of every model of the zoo.

    Subclasses set the class attributes, call `super().__init__` with their stages, and implement `stem`, `stage`,
    `downsample` and `normalize`. Between those four a map has the family's own `layout`.

    Args:
        config: The family's configuration.
        stages: The stages, coarsest last.
        num_classes: Outputs of the classifier; 0 makes `forward` return pooled features (B, num_features).
        in_chans: Channels of the input image.
        features_only: Make `forward` return a list of maps; norm and classifier are not built then, nor are the
            stages behind the last one asked for.
        out_indices: Stages whose maps `forward` returns with `features_only`; negative ones count from the end.

    Raises:
        ValueError: Negative classes, channels below 1, stage indices out of range or without `features_only`.
    """

    layout: ClassVar[Literal["NHWC", "NCHW"]] = "NHWC"
    no_decay: ClassVar[str] = r"$^"
    """Pattern of the parameters, beside vectors and biases, that must not be decayed."""
    output_norm_name: ClassVar[str] = "norm{}"
    classifier_name: ClassVar[str] = "head"
    stem_name: ClassVar[str] = ""
    """The convolution whose input channels are adapted to other images."""

    def __init__(
        self,
        config: Any,
        stages: Sequence[Stage],
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 0:
            raise ValueError(f"num_classes must be 0 or more, got {num_classes}")
        if in_chans < 1:
            raise ValueError(f"in_chans must be 1 or more, got {in_chans}")
        if out_indices is not None and not features_only:
            raise ValueError(
                f"out_indices goes with features_only=True, got out_indices={tuple(out_indices)} without it"
            )
        self.config = config
        self.stages = tuple(stages)
        self.in_chans = in_chans
        self.features_only = features_only
        self.num_classes = 0 if features_only else num_classes
        self.num_features = self.stages[-1].channels
        self.head_hidden_size = self.num_features
        self.global_pool = "" if features_only else "avg"
        self.grad_checkpointing = False
        self.weights_record: Weights | None = None
        self.out_indices = self.stage_indices(out_indices)
        self.built_stages = self.out_indices[-1] + 1 if features_only else len(self.stages)

    # What a family implements.

    def stem(self, x: Tensor) -> Tensor:
        """Image (B, in_chans, H, W) to the first stage's input map, in the family's layout."""
        raise NotImplementedError(f"{type(self).__name__} must implement stem()")

    def stage(self, index: int, x: Tensor) -> Tensor:
        """Run one stage's blocks on its input map."""
        raise NotImplementedError(f"{type(self).__name__} must implement stage()")

    def downsample(self, index: int, x: Tensor) -> Tensor:
        """The map between stage `index` - 1 and stage `index`, for `index` >= 1."""
        raise NotImplementedError(f"{type(self).__name__} must implement downsample()")

    def normalize(self, x: Tensor) -> Tensor:
        """The norm between the last stage and the pooling."""
        raise NotImplementedError(f"{type(self).__name__} must implement normalize()")

    def to_map(self, x: Tensor, sides: Sequence[int]) -> Tensor:
        """What `stage` or `normalize` gave for an image of these sides, as a map in the family's layout.

        Families whose stages hold more than a map, a class token for instance, leave it out here.
        """
        del sides  # of a map they are known
        return x

    def adapt_checkpoint(self, state: dict[str, Tensor]) -> dict[str, str]:
        """Fit entries of a checkpoint in our names to this model's configuration, in place; position tables, mostly.

        Returns:
            What was done, by name of the entry.
        """
        del state
        return {}

    def make_output_norm(self, channels: int) -> nn.Module:
        """A norm for a dense version's output map, in the family's layout."""
        return LayerNorm(channels, keep_float32=True)

    def fuse_(self) -> None:
        """Fold what the model itself holds, its children being folded already; see `fuse`."""

    def fuse_final_norm_(self) -> None:
        """Fold the final norm into the classifier, where both are linear; see `fuse`."""

    # What follows from it.

    def features(self, x: Tensor, indices: int | Sequence[int] | None = None) -> list[Tensor]:
        """Feature maps of the stages.

        Args:
            x: Images (B, in_chans, H, W), H and W at least 32.
            indices: Stages to return; an int takes the last so many; None returns all that were built.

        Returns:
            One (B, channels, ceil(H / stride), ceil(W / stride)) map per stage asked for, not normalised.

        Raises:
            ValueError: The input is not such an image, or an index is out of range.
        """
        wanted = self.stage_indices(indices, len(self.stages) if not self.features_only else self.built_stages)
        return [self._to_nchw(self.to_map(y, x.shape[2:])) for _, y in self._walk(x, wanted)]

    def _walk(self, x: Tensor, wanted: Sequence[int]) -> list[tuple[int, Tensor]]:
        self._check_input(x)
        x = self.stem(x)
        found = []
        for index in range(wanted[-1] + 1):
            if index > 0:
                x = self.downsample(index, x)
            x = self.stage(index, x)
            if any(index == each for each in wanted):  # Dynamo of torch 2.6 finds nothing in a list
                found.append((index, x))
        return found

    def forward_features(self, x: Tensor) -> Tensor:
        """Last stage's map in the family's layout, after the final norm."""
        return self.normalize(self._walk(x, [len(self.stages) - 1])[0][1])

    def pool(self, x: Tensor) -> Tensor:
        """Mean over positions of a map in the family's layout; (B, num_features)."""
        return x.mean(dim=(1, 2) if self.layout == "NHWC" else (2, 3))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify what `forward_features` returned.

        Args:
            x: Normalised map in the family's layout.
            pre_logits: Stop before the classifier.

        Returns:
            Logits (B, num_classes), or pooled features (B, num_features).
        """
        if self.global_pool == "avg":
            x = self.pool(x)
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: Tensor) -> Any:
        """Logits (B, num_classes); with `features_only` a list of maps, normalised if the version has output norms."""
        if not self.features_only:
            return self.forward_head(self.forward_features(x))
        found = ((index, self.to_map(y, x.shape[2:])) for index, y in self._walk(x, self.out_indices))
        return [self._to_nchw(self._output_norm(index)(y)) for index, y in found]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """timm's access to intermediate maps.

        Args:
            x: Images (B, in_chans, H, W).
            indices: Stages to return; an int takes the last so many; None returns all.
            norm: Apply the final norm to the last stage's map.
            stop_early: Do not run stages behind the last one asked for; so it is in any case where nobody wants more.
            output_fmt: `NCHW` or `NHWC`.
            intermediates_only: Return the list alone.

        Returns:
            The list of maps, or (`forward_features(x)`, list of maps).

        Raises:
            ValueError: Bad format, `stop_early` without `intermediates_only`, an index out of range, or the final norm
                of a model made with `features_only`, which has none.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        if stop_early and not intermediates_only:
            raise ValueError("stop_early leaves no final features: pass intermediates_only=True with it")
        if self.features_only and (norm or not intermediates_only):
            raise ValueError(
                "a model made with features_only=True has no final norm: pass intermediates_only=True and norm=False"
            )
        last = self.built_stages - 1
        wanted = self.stage_indices(indices, self.built_stages)
        walk = self._walk(x, wanted if intermediates_only or last in wanted else [*wanted, last])
        maps = [self.normalize(y) if norm and i == last else y for i, y in walk if i in wanted]
        convert = self._to_nchw if output_fmt == "NCHW" else self._to_nhwc
        maps = [convert(self.to_map(y, x.shape[2:])) for y in maps]
        return maps if intermediates_only else (self.normalize(walk[-1][1]), maps)

    def fuse(self, *, keep_norm: bool = True) -> Self:
        """Fold, in place, whatever evaluation needs no layer of its own for, and return the model.

        Batch norms go into the convolution or linear layer beside them, parallel branches into one. Maps, tokens,
        pooled features and logits stay what they were but for rounding; nothing happens where there is nothing to fold,
        or where all is folded already. Layers that hooks watch or that were adapted stay as they are.

        From then on the state dict is that of the folded model, so load weights first; and what is folded cannot be
        trained as it was, so keep a copy for that.

        Args:
            keep_norm: Keep the final norm apart. Otherwise it goes into the classifier, where the family's is linear;
                `forward_features` and pooled features are then those in front of it, and a new classifier gets these.

        Returns:
            The model itself.

        Raises:
            RuntimeError: A module is in training mode, where batch norms take the statistics of each batch.
        """
        training = [name or type(self).__name__ for name, module in self.named_modules() if module.training]
        if training:
            raise RuntimeError(
                "fuse() folds the statistics that evaluation uses: call eval() first; in training mode: "
                f"{', '.join(training[:3])}{', ...' if len(training) > 3 else ''}"
            )
        fuse_children(self)
        self.fuse_()
        if not keep_norm:
            self.fuse_final_norm_()
        return self

    def run_blocks(self, blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
        """Apply blocks in order, recomputing their activations in backward where gradient checkpointing is on."""
        for block in blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x

    def stage_indices(self, indices: int | Sequence[int] | None, count: int | None = None) -> list[int]:
        """Stage indices in order, without sign: an int n means the last n, None all `count` stages.

        Raises:
            ValueError: An index is out of range, named twice, or none is asked for.
        """
        count = len(self.stages) if count is None else count
        if indices is None:
            return list(range(count))
        if isinstance(indices, int):
            if not 1 <= indices <= count:
                raise ValueError(f"the number of stages must lie in 1..{count}, got {indices}")
            return list(range(count - indices, count))
        for index in indices:
            if not -count <= index < count:
                raise ValueError(f"stage index {index} is out of range: this model has stages 0..{count - 1}")
        found = sorted(index % count for index in indices)
        if not found or len(set(found)) < len(found):
            raise ValueError(f"stage indices must be distinct and at least one, got {list(indices)}")
        return found

    def _check_input(self, x: Tensor) -> None:
        if x.ndim != 4:
            raise ValueError(f"expected images (B, {self.in_chans}, H, W), got {x.ndim} axes: {tuple(x.shape)}")
        if x.shape[1] != self.in_chans:
            raise ValueError(f"expected {self.in_chans} channels on axis 1 (B, C, H, W), got shape {tuple(x.shape)}")
        if x.shape[2] < MIN_SIDE or x.shape[3] < MIN_SIDE:
            raise ValueError(f"H and W must be at least {MIN_SIDE}, got {x.shape[2]} x {x.shape[3]}")

    def _to_nchw(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2) if self.layout == "NHWC" else x

    def _to_nhwc(self, x: Tensor) -> Tensor:
        return x if self.layout == "NHWC" else x.permute(0, 2, 3, 1)

    def _output_norm(self, index: int) -> nn.Module:
        return getattr(self, self.output_norm_name.format(index), None) or nn.Identity()

    def add_output_norms(self) -> None:
        """Create the per-output norms of a dense version; called by families whose configuration asks for them."""
        for index in self.out_indices:
            self.add_module(self.output_norm_name.format(index), self.make_output_norm(self.stages[index].channels))

    # timm's surface.

    @property
    def feature_info(self) -> FeatureInfo:
        """Channels, stride and module of each map that `features_only` returns (all stages otherwise)."""
        chosen = [self.stages[i] for i in self.out_indices]
        return FeatureInfo({"num_chs": s.channels, "reduction": s.stride, "module": s.name} for s in chosen)

    @property
    def default_cfg(self) -> dict[str, Any]:
        """Preprocessing and layer names under timm's keys, from the weights record the model was made for."""
        record = self.weights_record
        height, width = image_sides(self.config.img_size)
        classifiers = self.classifier_names
        return {
            "url": record.url if record else "",
            "num_classes": self.num_classes,
            "input_size": (self.in_chans, height, width),
            "pool_size": tuple(-(-s // self.stages[-1].stride) for s in (height, width)),
            "crop_pct": record.crop_pct if record else 0.875,
            "crop_mode": record.crop_mode if record else "center",
            "interpolation": record.interpolation if record else "bicubic",
            "mean": record.mean if record else IMAGENET_MEAN,
            "std": record.std if record else IMAGENET_STD,
            "labels": record.labels if record else None,
            "fixed_input_size": False,
            "first_conv": self.stem_name,
            "classifier": classifiers[0] if len(classifiers) == 1 else classifiers,
            "license": record.license if record else None,
        }

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's newer name of `default_cfg`."""
        return self.default_cfg

    @property
    def classifier_names(self) -> tuple[str, ...]:
        """Paths of the classifiers; the first is `classifier_name`."""
        return (self.classifier_name,)

    def get_classifier(self) -> nn.Module:
        """The last linear layer; an identity where the model has no classes."""
        module: nn.Module = self
        for name in self.classifier_name.split("."):  # get_submodule breaks the graph in older torch
            module = getattr(module, name)
        return module

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one on the same device and in the same dtype.

        Args:
            num_classes: Outputs; 0 for pooled features.
            global_pool: `avg`, or an empty string for no pooling; None keeps the present choice.

        Raises:
            ValueError: Negative classes, an unknown pooling, or a model made with `features_only`.
        """
        if self.features_only:
            raise ValueError("a model made with features_only=True has no classifier")
        if num_classes < 0:
            raise ValueError(f"num_classes must be 0 or more, got {num_classes}")
        if global_pool not in (None, "", "avg"):
            raise ValueError(f"global_pool must be 'avg' or '' (none), got {global_pool!r}")
        if global_pool is not None:
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = next(self.parameters())
        for name in self.classifier_names:
            parent, _, leaf = name.rpartition(".")
            classifier = make_classifier(self.num_features, num_classes).to(like.device, like.dtype)
            setattr(self.get_submodule(parent), leaf, classifier.train(self.training))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass: less memory, about a third more time."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters that must not be decayed although they have more than one axis."""
        return {name for name, _ in self.named_parameters() if re.search(self.no_decay, name)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that assign each parameter to a layer, in timm's form, for layer-wise learning rates.

        Args:
            coarse: One layer per stage instead of one per block.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement group_matcher()")


def make_classifier(features: int, num_classes: int) -> nn.Module:
    """A linear classifier initialised as vision transformers are (std 0.02, no bias); an identity for 0 classes."""
    if num_classes == 0:
        return nn.Identity()
    linear = nn.Linear(features, num_classes)
    init_linear(linear)
    return linear


def init_linear(module: nn.Linear, std: float = 0.02) -> None:
    """Normal weights, zero bias.

    The published initialisation truncates at +-2 in absolute terms, a hundred standard deviations, which changes
    nothing; the plain normal is several times faster to draw.
    """
    nn.init.normal_(module.weight, std=std)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Stochastic depth that rises linearly from 0 to `rate` over all blocks, per stage and block."""
    total = sum(depths)
    flat = [rate * i / max(1, total - 1) for i in range(total)]
    starts = [sum(depths[:i]) for i in range(len(depths))]
    return [flat[start : start + depth] for start, depth in zip(starts, depths, strict=True)]
