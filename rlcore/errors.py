"""Mistakes in what the user gave, told apart from faults of the program."""


class InputError(ValueError):
    """A value from outside that cannot work.

    Its message is one line that names the field, the value and what would be valid. Command line programs
    print it and leave with exit code 2; no work has begun when it is raised.
    """
