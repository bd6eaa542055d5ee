"""A folder of generated speech scored against a list; `python -m imf_kernels.evaluate --help`.

`lists.py` reads what the field lists its test sets in, `scorers.py` says what each metric asks for,
`workers.py` scores utterances, and `scores.py` keeps the report: nothing is scored twice.
"""

from imf_kernels.evaluate.lists import Entry, read_list
from imf_kernels.evaluate.scorers import SCORERS
from imf_kernels.evaluate.scores import evaluate

__all__ = ["SCORERS", "Entry", "evaluate", "read_list"]
