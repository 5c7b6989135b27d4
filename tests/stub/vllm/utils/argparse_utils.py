import argparse


class FlexibleArgumentParser(argparse.ArgumentParser):
    """Takes --some_flag for --some-flag, as vLLM's does."""

    def parse_args(self, args=None, namespace=None):
        words = [_with_dashes(word) for word in args] if args is not None else None
        return super().parse_args(words, namespace)


def _with_dashes(word):
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word
