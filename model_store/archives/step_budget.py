"""A bound on the work of reading untrusted bytes. Pure; runs in loader threads.

A bound on bytes is none on work: 16 MB can hold four million records of four bytes, each a step of an interpreter that
other threads need. Every reader of an archive counts its steps, and stops before the first one too many.
"""

from dataclasses import dataclass

from model_store.errors import ArchiveTooLarge


@dataclass(slots=True)
class StepBudget:
    """At most `limit` steps; `what` names them in the message."""

    limit: int
    what: str
    spent: int = 0

    def spend(self, steps: int = 1) -> None:
        """Count steps before they are taken. Raises ArchiveTooLarge."""
        self.spent += steps
        if self.spent > self.limit:
            raise ArchiveTooLarge(f"it has more than the {self.limit} {self.what} allowed")
