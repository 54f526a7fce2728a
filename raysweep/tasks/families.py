"""Downstream tasks by form. To add a form: a file beside this one, and its name in the last line."""

from typing import Annotated

from pydantic import Field

from raysweep.tasks.balance import BracketBalance
from raysweep.tasks.classification import Classification
from raysweep.tasks.multiple_choice import MultipleChoice
from raysweep.tasks.qa import QA
from raysweep.tasks.spans import PCFGSpan
from raysweep.tasks.states import HMMState

Task = Annotated[
    Classification | MultipleChoice | QA | PCFGSpan | HMMState | BracketBalance, Field(discriminator="form")
]
