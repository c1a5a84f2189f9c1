"""The demo: three small models, trained by the roads a user takes, and one page that tells how it went.

In the order of reading: `tasks` (what is trained, and `run`), `digits` and `shapes` (what is found out of a run),
`findings` (what that is), `page` with `classifier_page` and `dense_page` (what is told), `report`, `charts` and
`scenes` (how it looks).
"""

from __future__ import annotations

from .tasks import TASKS, DemoResult, GoalMissed, run

__all__ = ["TASKS", "DemoResult", "GoalMissed", "run"]
