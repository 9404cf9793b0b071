"""What a training script shows while it runs, and how it times its steps. Knows nothing of models or jobs."""

from __future__ import annotations

import json
import time
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """A bar on a terminal, else a line now and then. Shows nothing in a process that never calls it."""

    def __init__(self, steps: int, tokens_per_step: int, introduction: str = "") -> None:
        """``introduction``: shown before the first step that is."""
        columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self._bar = Bar(TextColumn("step"), *columns)
        self._task = self._bar.add_task("", total=steps)
        self._steps = steps
        self._tokens_per_step = tokens_per_step
        self._introduction = introduction
        self._interval_s = 0.5 if self._bar.console.is_terminal else 2.0
        self._shown: tuple[int, float] | None = None
        """Step and time of the last call that showed something: the rate is measured from there."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar.live.is_started:
            self._bar.stop()

    def show(self, step: int, loss: float, workers: int, term: int) -> None:
        """Call it after every step; it shows the last step, and others at intervals."""
        now_s = time.monotonic()
        if self._shown is None:
            self._shown = (step, now_s)
            if self._introduction:
                self.note(self._introduction)
        shown_step, shown_at_s = self._shown
        passed_s = now_s - shown_at_s
        if passed_s < self._interval_s and step != self._steps:
            return
        self._shown = (step, now_s)
        # Steps come again after the loss of a server, and the job's last step may be the first that we see.
        rate = max(0, step - shown_step) * self._tokens_per_step / max(passed_s, 1e-9)
        text = f"loss {loss:.4f}  {rate:,.0f} tokens/s  workers {workers}  term {term}"
        if self._bar.console.is_terminal:
            self._bar.start()
            self._bar.update(self._task, completed=step, description=text)
        else:
            self.note(f"step {step}/{self._steps}  {text}")

    def note(self, text: str) -> None:
        """Print a line of its own."""
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)


class StepTimer:
    """Seconds per step from step 20 on, when all processes are up and warm; for benchmarks."""

    AFTER_STEP = 20

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None
        self._last = (0, 0.0)
        self._workers: list[int] = []

    def passed(self, step: int, workers: int) -> None:
        """``step`` is done; call it after every step."""
        if step >= self.AFTER_STEP:
            self._last = (step, time.perf_counter())
            self._first = self._first or self._last
            self._workers.append(workers)

    def write(self, path: Path) -> None:
        """Write JSON: steps timed, seconds they took, the step before the first of them, fewest workers seen."""
        first_step, started_s = self._first or self._last
        last_step, ended_s = self._last
        timing = {"steps": last_step - first_step, "seconds": ended_s - started_s, "first_step": first_step}
        path.write_text(json.dumps(timing | {"workers": min(self._workers, default=0)}))
