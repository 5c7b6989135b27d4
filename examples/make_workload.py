#!/usr/bin/env python3
"""Make a file with the lengths of a job's requests: prompts and outputs of all sizes, as in chats.

    python examples/make_workload.py --output examples/workload.jsonl
    python examples/make_workload.py --requests 1000000 --mean-prompt 800 --mean-output 150 --longest 8192 > job.jsonl

Both lengths are lognormal, and longer prompts tend to have slightly longer outputs. Because they are cut at --longest,
they are on average a little shorter than asked for. The seed determines the lengths.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

# Standard deviations of the logarithms, as in chat logs: one length in twenty is three to four times the median.
_PROMPT_SIGMA, _OUTPUT_SIGMA = 0.8, 0.7
_CORRELATION = 0.4  # of the logarithms


def main() -> None:
    parser, flags = _flags()
    try:
        with _opened(flags.output) as file:
            for prompt_tokens, output_tokens in lengths(flags):
                file.write(f'{{"prompt_tokens": {prompt_tokens}, "output_tokens": {output_tokens}}}\n')
    except BrokenPipeError:
        return  # `| head` has read enough
    except OSError as error:
        parser.exit(1, f"error: {flags.output or 'standard output'}: it cannot be written ({error.strerror})\n")


def _opened(path: Path | None) -> IO[str]:
    """With the same line ends on every system."""
    return open(path or 1, "w", encoding="ascii", newline="\n", closefd=path is not None)


def lengths(flags: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """(prompt tokens, output tokens) of each request; both are at least 1, and together at most `longest`."""
    draw = random.Random(flags.seed)
    prompt_median = math.log(flags.mean_prompt) - _PROMPT_SIGMA**2 / 2
    output_median = math.log(flags.mean_output) - _OUTPUT_SIGMA**2 / 2
    own = math.sqrt(1 - _CORRELATION**2)
    for _ in range(flags.requests):
        prompt, other = draw.gauss(0, 1), draw.gauss(0, 1)
        output = _CORRELATION * prompt + own * other
        output_tokens = _tokens(output_median + _OUTPUT_SIGMA * output, flags.longest - 1)
        yield _tokens(prompt_median + _PROMPT_SIGMA * prompt, flags.longest - output_tokens), output_tokens


def _tokens(logarithm: float, most: int) -> int:
    return min(max(1, round(math.exp(logarithm))), most)


def _flags() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The defaults make a job for the tiny model of the quick start on a machine without a GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--requests", type=_at_least(1), default=400, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=_at_least(0), default=0, metavar="N", help="default: %(default)s")
    for name, mean in (("prompt", 60), ("output", 24)):
        about = f"mean {name} length in tokens; default: %(default)s"
        parser.add_argument(f"--mean-{name}", type=_at_least(1), default=mean, metavar="N", help=about)
    about = "most tokens of a prompt and its output together; default: %(default)s"
    parser.add_argument("--longest", type=_at_least(2), default=512, metavar="N", help=about)
    parser.add_argument("--output", type=Path, metavar="FILE", help="overwritten if there; default: standard output")
    flags = parser.parse_args()
    if flags.mean_prompt + flags.mean_output > flags.longest:
        parser.error(f"--longest {flags.longest}: the mean lengths are longer; raise it")
    return parser, flags


def _at_least(low: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) >= low):
            raise argparse.ArgumentTypeError(f"{text[:40]!r} was given; a whole number of at least {low} is needed")
        return int(text)

    return parse


if __name__ == "__main__":
    main()
