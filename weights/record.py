"""The record that joins a checkpoint to its origin, its licence and the preprocessing it was measured with."""

from __future__ import annotations

from dataclasses import dataclass, field

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

NOT_STATED = "not stated"


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One published checkpoint.

    Attributes:
        url: Where the authors publish the file. Empty when there is only a page to fetch it from by hand.
        manual: What a person does to get the file where the host forbids scripted download; empty otherwise. Names
            one file: without a url, its place in the cache follows from this text.
        sha256: Full hexadecimal digest of the file; None means unverified, and loading says so.
        container: Key of the state dict inside the file; several where the authors do not say which, the first that is
            there counts. None finds the usual ones, or takes the file as the state dict itself.
        prefix: Only keys below this prefix belong to the backbone (`backbone.` in a whole detector).
        license: SPDX name of the licence of the weights, or `NOT_STATED`, which needs an explicit opt-in.
        repository: Official repository, as `owner/name`.
        commit: The commit of that repository that the family's file was written against.
        input_size: Channels, height and width of the image the checkpoint was evaluated with.
        crop_pct: Fraction of the resized image that the evaluation crop keeps.
        crop_mode: `center` resizes the short side to size / crop_pct and crops; `squash` resizes both sides, no crop.
        interpolation: Resampling filter of the evaluation resize.
        mean: Mean of each channel, of values in [0, 1].
        std: Standard deviation of each channel, of values in [0, 1].
        num_classes: Classes of the published head; 0 where there is none.
        labels: Name of the label set, as known to `vizoo.labels`; empty where the order of the classes is unknown.
        metrics: What the authors report, by name (`top1`, `top5`, in percent; `box_ap`, `mask_ap`, `miou`).
        params: Parameters of the model with its published head; None where nobody counted.
        macs: Multiply-accumulate operations at `input_size`, as published; None where not published.
        note: Anything else a user must know before using the file.
    """

    url: str
    license: str
    repository: str
    commit: str
    input_size: tuple[int, int, int]
    num_classes: int
    manual: str = ""
    sha256: str | None = None
    container: str | tuple[str, ...] | None = None
    prefix: str = ""
    crop_pct: float = 0.875
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    labels: str = "imagenet-1k"
    metrics: dict[str, float] = field(default_factory=dict)
    params: int | None = None
    macs: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if not self.url and not self.manual:
            raise ValueError("a Weights record needs a url, or in `manual` how to fetch the file by hand")
        if self.sha256 is not None and (len(self.sha256) != 64 or set(self.sha256) - set("0123456789abcdef")):
            raise ValueError(f"sha256 must be 64 lower-case hexadecimal digits, got {self.sha256!r}")
        if self.crop_mode not in ("center", "squash"):
            raise ValueError(f"crop_mode must be 'center' or 'squash', got {self.crop_mode!r}")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct must lie in (0, 1], got {self.crop_pct}")

    @property
    def filename(self) -> str:
        """Last part of the url, which is the name of the file in the cache."""
        return self.url.rsplit("/", 1)[-1].split("?", 1)[0]
