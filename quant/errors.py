"""The errors a user can cause, and the exit code each one ends a command with.

    Error             3  bad model, checkpoint or input file
    |- UsageError     2  an option out of range, an output that exists
    |- ResourceError  4  memory, disk or permissions
    `- Interrupted    5  stopped before the end; nothing lost, can be run again

A message is one line: it names the file, tensor or key, what was found and what was needed.
Anything else that is raised is a bug of ours and keeps its traceback.
"""


class Error(Exception):
    """An expected failure; the command line prints it as one line."""

    exit_code = 3


class UsageError(Error):
    """An option or argument that cannot be used as given."""

    exit_code = 2


class ResourceError(Error):
    """The machine cannot do it: memory, disk space, permissions, input or output."""

    exit_code = 4


class Interrupted(Error):
    """Stopped before the end; running the same command again is safe."""

    exit_code = 5
