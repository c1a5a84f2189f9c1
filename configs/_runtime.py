"""What every run shares: hooks, logs, seed and device."""

from typing import Any

from mmengine.hooks import DistSamplerSeedHook
from mmengine.visualization import TensorboardVisBackend, Visualizer

from vizoo.train.checkpoint import Checkpoints
from vizoo.train.hooks import RunInfo, UpdateScheduler
from vizoo.train.log import RunLog

default_hooks: dict[str, Any] = dict(
    runtime_info=dict(type=RunInfo),
    timer=None,
    sampler_seed=dict(type=DistSamplerSeedHook),
    logger=dict(type=RunLog, interval=50, quiet=False),
    param_scheduler=dict(type=UpdateScheduler),
    # `iters` saves inside epochs too, for long ones: a resumed run is exact either way.
    checkpoint=dict(type=Checkpoints, epochs=1, iters=0, keep=2, best="top1", greater=True),
)
# For a moving average of the weights: custom_hooks = [dict(type=EMA, decay=0.9999)], from vizoo.train.hooks.
custom_hooks: list[dict[str, Any]] = []
visualizer: dict[str, Any] = dict(type=Visualizer, vis_backends=[dict(type=TensorboardVisBackend)])
val_cfg: dict[str, Any] = dict()
env_cfg: dict[str, Any] = dict(cudnn_benchmark=True)
randomness: dict[str, Any] = dict(seed=0, deterministic=False)
device = "auto"
compile = False
find_unused_parameters = False
