"""What is known of a command before it is imported."""

from dataclasses import dataclass

from saescope import plugins


@dataclass(frozen=True, kw_only=True)
class Command:
    """Where a command lives, and what its help says."""

    module: str
    config: str
    function: str
    summary: str
    examples: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """lines of help that no option shows"""
    positional: str | None = None
    """the field, or the fields separated by spaces, that words without options are the values of;
    one that ends in ... takes all that are left"""
    resumes: bool = False
    gives_exit_code: bool = False
    """whether what the function returns is the exit code"""
    loads_saes: bool = False
    """whether it makes SAEs, of architectures of other packages too (`saescope.plugins`)"""

    def help_lines(self) -> list[str]:
        """The lines above the options in the command's help."""
        notes = (*self.notes, *(plugins.HELP if self.loads_saes else ()))
        return [self.summary, "", "Examples:", *(f"  {e}" for e in self.examples), *notes]
