"""What the launcher itself prints: lines of progress and the closing report."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

from batch_inference.core.signals import EXIT_CODES
from batch_inference.core.streams import say
from batch_inference.launch.jobs import ANALYSIS, Here, Job


@dataclass
class Outcomes:
    """How the settings of a preset ended."""

    done: list[Job] = field(default_factory=list)
    skipped: list[Job] = field(default_factory=list)
    failed: list[Job] = field(default_factory=list)

    def keep(self, job: Job, code: int) -> None:
        """Raises SystemExit if the setting was interrupted."""
        if code in EXIT_CODES.values():
            raise SystemExit(code)
        (self.failed if code else self.done).append(job)

    @property
    def none_ran(self) -> bool:
        return not self.done and not self.failed


def say_outcomes(outcomes: Outcomes) -> None:
    words = (f"{name}: {_names(jobs)}" for name, jobs in vars(outcomes).items())
    say()
    say("   ".join(words))
    for job in outcomes.failed:
        if job.config.log_path.exists():
            say(f"  {job.name}: see {job.config.log_path}")


def say_how_to_analyse(here: Here, folder: str, flags: Sequence[str] = ()) -> None:
    say(f"analyse with: {shlex.join([here.python, here.path(ANALYSIS), '--input', folder, *flags])}")


def _names(jobs: list[Job]) -> str:
    # A second part may run the same settings again.
    return " ".join(dict.fromkeys(job.name for job in jobs)) or "none"
