"""The zoo in mmengine's registry of models. Importing this module imports mmengine, and registers nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.model import BaseModule
from mmengine.registry import MODELS, Registry
from torch import Tensor

from .checkpoint import load_checkpoint
from .dense import create_dense, freeze

SCOPE = "vizoo"


class MMEngineBackbone(BaseModule):
    """A backbone as mmdetection's and mmsegmentation's models take it: `type="vizoo.Backbone"`.

    Args:
        name: `variant` or `variant.tag`, as `vizoo.list_models()` prints them.
        pretrained: Load the tag's official weights.
        out_indices: Stages whose maps are returned; None returns all.
        frozen_stages: Parts without gradients, kept in eval mode: -1 none, 0 the stem, k the first k stages as well.
        grad_checkpointing: Recompute blocks in the backward pass.
        init_cfg: mmengine's. `Pretrained` takes what `vizoo.load_checkpoint` takes, official files among it.
        **overrides: Further arguments of `vizoo.create_model`, such as `drop_path_rate` or fields of the configuration.

    Raises:
        ValueError: Unknown name, stages out of range, or values that cannot go together.
        TypeError: An override that does not exist.
    """

    init_cfg: dict[str, Any] | list[dict[str, Any]] | None

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = False,
        out_indices: Sequence[int] | None = None,
        frozen_stages: int = -1,
        grad_checkpointing: bool = False,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__(init_cfg)
        self.body = create_dense(name, pretrained=pretrained, out_indices=out_indices, **overrides)
        self.body.set_grad_checkpointing(grad_checkpointing)
        self._frozen = freeze(self.body, frozen_stages)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images (B, in_chans, H, W) to maps (B, C, H / stride, W / stride), finest first."""
        return tuple(self.body(x))

    def train(self, mode: bool = True) -> MMEngineBackbone:
        """Set the mode of all but the frozen parts, which stay in eval mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def init_weights(self) -> None:
        """Do what `init_cfg` says; checkpoints are read by `vizoo.load_checkpoint`, strictly, and come last.

        Raises:
            ValueError: `Pretrained` with more than a checkpoint.
        """
        if not self.is_init and self.init_cfg:
            wanted = [self.init_cfg] if isinstance(self.init_cfg, Mapping) else list(self.init_cfg)
            checkpoints = [_checkpoint(cfg) for cfg in wanted if _is_checkpoint(cfg)]
            self.init_cfg = [cfg for cfg in wanted if not _is_checkpoint(cfg)]
            super().init_weights()
            for checkpoint in checkpoints:
                load_checkpoint(self.body, checkpoint)
        else:
            super().init_weights()


def _is_checkpoint(cfg: Mapping[str, Any]) -> bool:
    return getattr(cfg["type"], "__name__", cfg["type"]) in ("Pretrained", "PretrainedInit")


def _checkpoint(cfg: Mapping[str, Any]) -> Any:
    if set(cfg) != {"type", "checkpoint"}:
        raise ValueError(
            "init_cfg of type 'Pretrained' takes `checkpoint` and nothing else (a prefix such as 'backbone.' is found "
            f"without being named), got {dict(cfg)}"
        )
    return cfg["checkpoint"]


class ZooRegistry(Registry):
    """The scope `vizoo`.

    mmengine takes the part before the first dot of every `type` for a scope, so this registry is asked for import names
    such as `vizoo.train.classification.ImageClassifier` too. It must not find those: mmengine then imports them.
    """

    def get(self, key: str) -> Any:
        """What is registered under this name, here or in the root."""
        name = key.removeprefix(f"{SCOPE}.")
        return None if "." in name else super().get(name)


def register() -> None:
    """Register the wrapper unless it is; see `vizoo.register_mmengine`."""
    if SCOPE not in MODELS.children:
        ZooRegistry("model", parent=MODELS, scope=SCOPE).register_module(name="Backbone", module=MMEngineBackbone)
