"""Result files to answers: the table of points, comparisons, the decision, report, page, plots, exports, and the
winner as files to be used.

Imports `core`; never vLLM or torch, and nothing of `measure`.
"""
