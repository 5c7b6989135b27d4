"""Result files to answers: the table of points, comparisons, the decision, report, page, plots and exports.

Imports `core`; never vLLM or torch, and nothing of `measure`.
"""
