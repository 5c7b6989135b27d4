"""The job of a sweep: which requests of its workload each point runs, and on which replica."""

from __future__ import annotations

from collections.abc import Iterator

from batch_inference.core.config import ExperimentConfig
from batch_inference.core.lengths import Distribution
from batch_inference.core.queue_runs import LIVES
from batch_inference.core.results import Job, PointKey, Sample, workload_key
from batch_inference.core.sample import representative_order
from batch_inference.core.sharing import ordered, shared_out
from batch_inference.core.values import OWN_END
from batch_inference.measure.job_lengths import FEWEST_LIVES, JobLengths
from batch_inference.measure.messages import Asked
from batch_inference.measure.texts import ids_of

# At least this many, however few run at once: a handful of requests does not represent a job.
FEWEST_REQUESTS = 32
# Requests in a queue's warm-up, per request that runs at once.
WARMUP_LIVES = 2
# How many lengths a result file holds, from the bulk and from the end.
_BULK, _LAST = 20_000, 4_000


def requests_of_point(config: ExperimentConfig, batch_size: int) -> int:
    """How many requests a point runs, over all replicas, of a workload that has so many."""
    return config.sample or config.data_parallel_size * max(FEWEST_REQUESTS, LIVES * batch_size)


class JobFile:
    """A workload from which samples are run."""

    def __init__(self, config: ExperimentConfig, found: JobLengths) -> None:
        self.config = config
        self.lengths = found
        self._workload, self.left_out = found.workload, found.left_out
        self._prompts, self._outputs = found.prompt_tokens, found.output_tokens
        self._of_prompts = Distribution(self._prompts)
        # If the model decides where to end, this is unknown beforehand.
        self._of_outputs = Distribution(self._outputs) if config.output_lengths != OWN_END else None
        self._order: Iterator[int] | None = None
        self._drawn: list[int] = []

    def __len__(self) -> int:
        return len(self._prompts)

    def sample_size(self, batch_size: int) -> int:
        """How many requests a point runs, over all replicas."""
        return min(len(self), requests_of_point(self.config, batch_size))

    def warmup_size(self, batch_size: int) -> int:
        """How many of them its warm-up runs."""
        return min(self.sample_size(batch_size), WARMUP_LIVES * batch_size * self.config.data_parallel_size)

    def expected_s(self, batch_size: int, warmup_s: float) -> float:
        """How long a point's sample takes at least, at the pace of its warm-up: both have the same mix of requests. A
        queue's start and end, with fewer at once, take as long as one more request or less."""
        at_once = batch_size * self.config.data_parallel_size
        sample, warmup = (size(batch_size) / at_once + 1 for size in (self.sample_size, self.warmup_size))
        return warmup_s * sample / warmup

    def fills(self, batch_size: int) -> bool:
        """Whether its sample is enough for a plateau with `batch_size` requests at once."""
        return self.sample_size(batch_size) >= FEWEST_LIVES * batch_size * self.config.data_parallel_size

    def described(self) -> Job:
        key, last = workload_key(self.config), min(len(self), _LAST)
        every = max(1, -(-(len(self) - last) // _BULK))
        kept = [*range(0, len(self) - last, every), *range(len(self) - last, len(self))]
        return Job(
            content_hash=key.content_hash,
            output_lengths=key.output_lengths,
            requests=len(self),
            prompt_tokens=sum(self._prompts),
            output_tokens=sum(self._outputs) if self._of_outputs else None,
            longest=self.config.longest_request,
            every=every,
            last=last,
            prompt_lens=[self._prompts[index] for index in kept],
            output_lens=[self._outputs[index] for index in kept] if self._of_outputs else None,
            prompts=self._of_prompts.summary(),
            outputs=self._of_outputs.summary() if self._of_outputs else None,
            left_out=self.left_out,
        )

    def sample(self, batch_size: int) -> Sample:
        """How well the requests of a point represent the job."""
        drawn = self._first(self.sample_size(batch_size))
        prompts = Distribution(self._prompts[index] for index in drawn)
        outputs = Distribution(self._outputs[index] for index in drawn) if self._of_outputs else None
        return Sample(
            prompts.summary(),
            outputs.summary() if outputs else None,
            prompts.difference_from(self._of_prompts),
            outputs.difference_from(self._of_outputs) if outputs and self._of_outputs else None,
        )

    def read_texts(self) -> None:
        """Read the texts of the largest sample, which includes the others. Raises ConfigError, WorkFailedError."""
        sizes = [size for size in self.config.batch_sizes if not self.config.searches or self.fills(size)]
        ids_of(self._workload, self.config, self._first(max(map(self.sample_size, sizes or self.config.batch_sizes))))

    def shares(self, key: PointKey, requests: int | None = None) -> list[list[Asked]]:
        """What each replica runs for a point, in the order of its queue; only `requests` of the sample's requests, if
        given."""
        return self.shares_of(min(requests or len(self), self.sample_size(key.batch_size)))

    def shares_of(self, requests: int) -> list[list[Asked]]:
        """The same for a sample of `requests` requests."""
        drawn, config = self._first(requests), self.config
        queue = ordered(drawn, self._prompts, self._outputs, workload_key(config).order, config.seed)
        prompts, outputs = ([column[index] for index in queue] for column in (self._prompts, self._outputs))
        ids = ids_of(self._workload, config, queue)
        asked = [
            Asked(length if of_text is None else of_text, tokens)
            for length, of_text, tokens in zip(prompts, ids, outputs, strict=True)
        ]
        shares = shared_out(prompts, outputs, config.data_parallel_size)
        return [[asked[place] for place in share] for share in shares]

    def _first(self, count: int) -> list[int]:
        """The first of the one permutation that all points share."""
        if self._order is None:
            self._order = representative_order(self._prompts, self._outputs, self.config.seed)
        while len(self._drawn) < count:
            self._drawn.append(next(self._order))
        return self._drawn[:count]
