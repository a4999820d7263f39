"""What can go wrong, as a tree of exceptions.

AutoquantError
├── UserError          the user can mend it: one line that says what, where and what to do; exit 2
│   ├── ModelFileError a model file that is missing, unsafe, unreadable or holds no model
│   ├── TaskError      a task file or data file that is missing something or contradicts itself
│   ├── SpecError      a recipe or search space with a wrong, missing or unknown field
│   └── StudyError     a study that does not exist, is corrupt, or belongs to another model
└── TrialError         one candidate failed; it is recorded as failed and the search goes on
    └── OutOfMemory    it needed more memory than there was
"""

from __future__ import annotations


class AutoquantError(Exception):
    """Base of every exception that autoquant raises on purpose."""


class UserError(AutoquantError):
    """A mistake the user can mend; the message is one line."""


class ModelFileError(UserError):
    """A model file is missing, unsafe to load, unreadable, or holds nothing to quantize."""


class TaskError(UserError):
    """A task file or data file is missing something or contradicts itself."""


class SpecError(UserError):
    """A recipe or a search space has a wrong, missing or unknown field."""


class StudyError(UserError):
    """A study does not exist, is corrupt, or belongs to another model, task or space."""


class TrialError(AutoquantError):
    """One candidate failed; the search records the reason and goes on."""


class OutOfMemory(TrialError):
    """A candidate needs more memory than there is."""
