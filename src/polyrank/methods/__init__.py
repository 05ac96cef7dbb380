"""The answers that methods are composed of, each in a table; and the published methods, by name.

Every table is a plain dict literal. To add an answer, write one function and add one line to its table; the laws
of its slot are tested from the table.
"""

from polyrank.methods.aggregate import AGGREGATORS
from polyrank.methods.allocate import ALLOCATORS
from polyrank.methods.dispatch import DISPATCHERS
from polyrank.methods.estimate import ESTIMATORS
from polyrank.methods.factors import SCHEDULES
from polyrank.methods.importance import SCORERS
from polyrank.methods.named import METHODS

__all__ = ["AGGREGATORS", "ALLOCATORS", "DISPATCHERS", "ESTIMATORS", "METHODS", "SCHEDULES", "SCORERS"]
