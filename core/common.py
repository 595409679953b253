"""The error for users, and the entry point that prints it: what every program here needs, with or without torch."""
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can put right. The message is one line that names the thing and says what to do."""


def run(main: Callable[[], None]) -> None:
    """Run a program's main(): a UserError becomes `error: ...` on stderr and exit status 2, Ctrl-C becomes 130."""
    try:
        main()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
