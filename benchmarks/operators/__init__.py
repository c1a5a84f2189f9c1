"""What `ops.py` measures: a module for each operator, with the shapes, the inputs and the peers of its own.

A module has `SHAPES`, uses of the operator by name, and `case(name)`, which makes the `measuring.Case` of one of them.
"""

from __future__ import annotations

from pkgutil import iter_modules

NAMES = sorted(module.name for module in iter_modules(__path__) if module.name != "measuring")
