"""Operators: definition, kernels and registration. Importing them needs torch alone."""

from __future__ import annotations

from .channel_attention import channel_attention
from .depthwise_conv import depthwise_conv
from .dispatch import explain, use
from .gated_linear_attention import gated_linear_attention
from .gelu_linear import gelu_linear
from .layer_norm import layer_norm
from .linear_attention import FlowConservation, KernelSum, MeanSubtraction, linear_attention
from .neighborhood_attention import neighborhood_attention
from .routing_attention import region_affinity, region_routes, routing_attention
from .selective_scan import selective_scan
from .selective_scan_2d import CONTINUOUS_ROUTES, ROW_AND_COLUMN_ROUTES, ROW_ROUTES, Route, selective_scan_2d
from .state_space_dual import state_space_dual
from .window_attention import window_attention

__all__ = [
    "CONTINUOUS_ROUTES",
    "ROW_AND_COLUMN_ROUTES",
    "ROW_ROUTES",
    "FlowConservation",
    "KernelSum",
    "MeanSubtraction",
    "Route",
    "channel_attention",
    "depthwise_conv",
    "explain",
    "gated_linear_attention",
    "gelu_linear",
    "layer_norm",
    "linear_attention",
    "neighborhood_attention",
    "region_affinity",
    "region_routes",
    "routing_attention",
    "selective_scan",
    "selective_scan_2d",
    "state_space_dual",
    "use",
    "window_attention",
]
